"""Correlation lookup in Triton: matrix products of query tiles with the part of the target that they see.

Neighbouring queries have overlapping windows, so a tile of 8 x 8 queries is multiplied with blocks of target pixels
on tensor cores, and each query keeps the diagonal band of the products that is its window. Which blocks are visited
follows from the coordinates: rows from the first to the last that the tile sees, columns likewise for each band of
rows, and blocks that no query sees are skipped. Any motion gives the right result; smooth motion is fast. The
products of the (2 radius + 2)^2 lattice points of each query go to a scratch buffer that all levels share, and an
elementwise kernel blends them with the fraction that all points of a window have in common.

Backward, without atomics, so that the same input gives the same bytes:
- the lattice gradient is the adjoint of the blend, a gather of up to four values;
- the gradient of fmap1 is a gather: each query tile visits the blocks it visited forward;
- the gradient of fmap2 is a scatter turned into a gather: a tile of targets scans the bounding boxes of the windows of
  all query tiles (four integers per tile, 32 at a time), and multiplies with those that reach it, in
  ascending order. No index is stored, so memory is linear in H W for any motion.

Shapes in the kernels: B batch, H W query map, h w target map of one level, C channels (padded to
whole blocks), K = 2 RADIUS + 2,
P = (2 RADIUS + 1)^2, L levels, T query tiles of an image, QUERIES = TILE^2, BT = BY BX targets of a block.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kinema.kernels.ahead_of_time import Case
from kinema.kernels.dispatch import INTERPRETING

TILE = 8
SCAN = 32
SMALLEST_BLOCK_C = 16
"""Matrix instructions take no fewer."""
ELEMENTS = 8192 if INTERPRETING else 512
FAR = tl.constexpr(2**29)


@triton.jit
def _tile_queries(tile, H, W, TILE: tl.constexpr):
    """Rows, columns and validity of the queries of a tile."""
    lane = tl.arange(0, TILE * TILE)
    across = (W + TILE - 1) // TILE
    y = (tile // across) * TILE + lane // TILE
    x = (tile % across) * TILE + lane % TILE
    return y, x, (y < H) & (x < W)


@triton.jit
def _centre(coords_ptr, offset, stride_axis, known, shrink, h, w, RADIUS: tl.constexpr):
    """First lattice point and fraction of windows, and whether their coordinates are finite.

    Windows without coordinates, or with coordinates that are not finite, lie outside the map. Clamped before the cast:
    a coordinate far outside does not fit an integer.
    """
    x = tl.load(coords_ptr + offset, mask=known, other=float("nan"))
    y = tl.load(coords_ptr + offset + stride_axis, mask=known, other=float("nan"))
    finite = (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
    x = tl.where(finite, x * shrink, -1.0e9)
    y = tl.where(finite, y * shrink, -1.0e9)
    x_lower, y_lower = tl.floor(x), tl.floor(y)
    x_first = tl.minimum(tl.maximum(x_lower, -RADIUS - 2.0), w + (RADIUS + 1.0)).to(tl.int32) - RADIUS
    y_first = tl.minimum(tl.maximum(y_lower, -RADIUS - 2.0), h + (RADIUS + 1.0)).to(tl.int32) - RADIUS
    return y_first, x_first, y - y_lower, x - x_lower, finite


@triton.jit
def _span(first, seen, size, K: tl.constexpr):
    """First and end position, inside the map, of the windows that are seen; an empty range if none is."""
    begin = tl.min(tl.where(seen, first, size), 0)
    end = tl.max(tl.where(seen, first + K, 0), 0)
    return tl.maximum(begin, 0), tl.minimum(end, size)


@triton.jit
def _diagonal(query, y0, x0, ty, tx, K: tl.constexpr):
    """Offsets [queries, targets] of targets in the lattices of queries, and whether they are points of them."""
    offset = (query * (K * K) - y0 * K - x0)[:, None] + (ty * K + tx)[None, :]
    # Unsigned, a negative distance is a large one.
    dy, dx = (ty[None, :] - y0[:, None]).to(tl.uint32), (tx[None, :] - x0[:, None]).to(tl.uint32)
    return offset, (dy < K) & (dx < K)


@triton.jit
def _form_kernel(
    f1_ptr,  # [B, H, W, C], channels contiguous
    f2_ptr,  # [B, h, w, C], channels contiguous
    coords_ptr,  # [B, 2, H, W] float32
    lattice_ptr,  # [B, H, W, K, K] float32, contiguous, written inside the map only
    H,
    W,
    h,
    w,
    C,
    shrink,  # 2^-level
    f1_b,
    f1_y,
    f1_x,
    f2_b,
    f2_y,
    f2_x,
    coords_b,
    coords_axis,
    coords_y,
    coords_x,
    RADIUS: tl.constexpr,
    TILE: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of the queries of one tile with the lattice points of their windows."""
    K: tl.constexpr = 2 * RADIUS + 2
    b = tl.program_id(1).to(tl.int64)
    qy, qx, known = _tile_queries(tl.program_id(0), H, W, TILE)
    at = qy * coords_y + qx * coords_x
    y0, x0, _, _, _ = _centre(coords_ptr + b * coords_b, at, coords_axis, known, shrink, h, w, RADIUS)
    query = qy * W + qx
    lattice_ptr += b * (H * W * K * K)
    f2_ptr += b * f2_b
    f1_rows = f1_ptr + b * f1_b + qy * f1_y + qx * f1_x
    target = tl.arange(0, BY * BX)
    channel = tl.arange(0, BC)
    seen = known & (y0 < h) & (y0 + K > 0) & (x0 < w) & (x0 + K > 0)
    top, bottom = _span(y0, seen, h, K)
    for row in range(top, bottom, BY):
        in_band = seen & (y0 < row + BY) & (y0 + K > row)
        left, right = _span(x0, in_band, w, K)
        for column in range(left, right, BX):
            wanted = in_band & (x0 < column + BX) & (x0 + K > column)
            if tl.max(wanted.to(tl.int32), 0) > 0:
                ty, tx = row + target // BX, column + target % BX
                inside = (ty < h) & (tx < w)
                f2_rows = f2_ptr + ty * f2_y + tx * f2_x
                products = tl.zeros([TILE * TILE, BY * BX], tl.float32)
                for start in range(0, C, BC):
                    f1 = tl.load(f1_rows[:, None] + (start + channel)[None, :], mask=known[:, None], other=0.0)
                    f2 = tl.load(f2_rows[None, :] + (start + channel)[:, None], mask=inside[None, :], other=0.0)
                    products = tl.dot(f1.to(COMPUTE), f2.to(COMPUTE), products, input_precision=PRECISION)
                offset, mine = _diagonal(query, y0, x0, tl.where(inside, ty, FAR), tx, K)
                tl.store(lattice_ptr + offset, products, mask=mine)


@triton.jit
def _blend_kernel(
    lattice_ptr,  # [B, H, W, K, K] float32, contiguous
    coords_ptr,  # [B, 2, H, W] float32
    out_ptr,  # [B, H, W, L P] float32, contiguous; moved to the level's first channel
    H,
    W,
    h,
    w,
    shrink,  # 2^-level
    scale,  # 1 / sqrt(C)
    count,  # H W P
    channels,  # L P
    coords_b,
    coords_axis,
    coords_y,
    coords_x,
    RADIUS: tl.constexpr,
    Y_MAJOR: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Windows of one level from their lattices: bilinear, 0 outside the map."""
    K: tl.constexpr = 2 * RADIUS + 2
    k: tl.constexpr = 2 * RADIUS + 1
    b = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    known = element < count
    lattice_ptr += b * (H * W * K * K)
    query, point = element // (k * k), element % (k * k)
    iy, ix = point % k, point // k
    if Y_MAJOR:
        iy, ix = ix, iy
    at = (query // W) * coords_y + (query % W) * coords_x
    y0, x0, fy, fx, finite = _centre(coords_ptr + b * coords_b, at, coords_axis, known, shrink, h, w, RADIUS)
    y, x = y0 + iy, x0 + ix
    lattice = lattice_ptr + query * (K * K) + iy * K + ix
    up, down = known & (y >= 0) & (y < h), known & (y + 1 >= 0) & (y + 1 < h)
    left, right = (x >= 0) & (x < w), (x + 1 >= 0) & (x + 1 < w)
    upper = tl.load(lattice, mask=up & left, other=0.0) * (1.0 - fx)
    upper += tl.load(lattice + 1, mask=up & right, other=0.0) * fx
    lower = tl.load(lattice + K, mask=down & left, other=0.0) * (1.0 - fx)
    lower += tl.load(lattice + K + 1, mask=down & right, other=0.0) * fx
    value = tl.where(finite, (upper * (1.0 - fy) + lower * fy) * scale, float("nan"))
    tl.store(out_ptr + b * (H * W * channels) + query * channels + point, value, mask=known)


@triton.jit
def _unblend_kernel(
    grad_ptr,  # [B, H, W, L P] float32, contiguous; moved to the level's first channel
    coords_ptr,  # [B, 2, H, W] float32
    lattice_ptr,  # [B, H, W, K, K] float32, contiguous: written everywhere, 0 outside the map
    H,
    W,
    h,
    w,
    shrink,  # 2^-level
    scale,  # 1 / sqrt(C)
    count,  # H W K K
    channels,  # L P
    coords_b,
    coords_axis,
    coords_y,
    coords_x,
    RADIUS: tl.constexpr,
    Y_MAJOR: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Gradient of the lattices of one level: each point is a neighbour of up to four window points."""
    K: tl.constexpr = 2 * RADIUS + 2
    k: tl.constexpr = 2 * RADIUS + 1
    b = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    known = element < count
    lattice_ptr += b * (H * W * K * K)
    query, point = element // (K * K), element % (K * K)
    iy, ix = point // K, point % K
    at = (query // W) * coords_y + (query % W) * coords_x
    y0, x0, fy, fx, finite = _centre(coords_ptr + b * coords_b, at, coords_axis, known, shrink, h, w, RADIUS)
    y, x = y0 + iy, x0 + ix
    inside = known & finite & (y >= 0) & (y < h) & (x >= 0) & (x < w)
    step_y: tl.constexpr = k if Y_MAJOR else 1
    step_x: tl.constexpr = 1 if Y_MAJOR else k
    grad = grad_ptr + b * (H * W * channels) + query * channels + iy * step_y + ix * step_x
    up, down, left, right = inside & (iy < k), inside & (iy > 0), ix < k, ix > 0
    value = tl.load(grad, mask=up & left, other=0.0) * (1.0 - fy) * (1.0 - fx)
    value += tl.load(grad - step_x, mask=up & right, other=0.0) * (1.0 - fy) * fx
    value += tl.load(grad - step_y, mask=down & left, other=0.0) * fy * (1.0 - fx)
    value += tl.load(grad - step_y - step_x, mask=down & right, other=0.0) * fy * fx
    tl.store(lattice_ptr + element, tl.where(inside, value * scale, 0.0), mask=known)


@triton.jit
def _query_grad_kernel(
    lattice_ptr,  # [B, H, W, K, K] float32, contiguous: gradient of the lattices
    f2_ptr,  # [B, h, w, C], channels contiguous
    coords_ptr,  # [B, 2, H, W] float32
    grad_ptr,  # [B, H, W, C] float32, contiguous
    H,
    W,
    h,
    w,
    C,
    shrink,  # 2^-level
    f2_b,
    f2_y,
    f2_x,
    coords_b,
    coords_axis,
    coords_y,
    coords_x,
    RADIUS: tl.constexpr,
    TILE: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    ADD: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries of one tile, some channels; added to what other levels gave."""
    K: tl.constexpr = 2 * RADIUS + 2
    b = tl.program_id(2).to(tl.int64)
    qy, qx, known = _tile_queries(tl.program_id(0), H, W, TILE)
    at = qy * coords_y + qx * coords_x
    y0, x0, _, _, _ = _centre(coords_ptr + b * coords_b, at, coords_axis, known, shrink, h, w, RADIUS)
    query = qy * W + qx
    lattice_ptr += b * (H * W * K * K)
    f2_ptr += b * f2_b
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    target = tl.arange(0, BY * BX)
    out = grad_ptr + b * (H * W * C) + query[:, None] * C + channel[None, :]
    total = tl.zeros([TILE * TILE, BC], tl.float32)
    if ADD:
        total = tl.load(out, mask=known[:, None], other=0.0)
    seen = known & (y0 < h) & (y0 + K > 0) & (x0 < w) & (x0 + K > 0)
    top, bottom = _span(y0, seen, h, K)
    for row in range(top, bottom, BY):
        in_band = seen & (y0 < row + BY) & (y0 + K > row)
        left, right = _span(x0, in_band, w, K)
        for column in range(left, right, BX):
            wanted = in_band & (x0 < column + BX) & (x0 + K > column)
            if tl.max(wanted.to(tl.int32), 0) > 0:
                ty, tx = row + target // BX, column + target % BX
                inside = (ty < h) & (tx < w)
                offset, mine = _diagonal(query, y0, x0, tl.where(inside, ty, FAR), tx, K)
                weights = tl.load(lattice_ptr + offset, mask=mine, other=0.0)
                f2_rows = f2_ptr + ty * f2_y + tx * f2_x
                f2 = tl.load(f2_rows[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
                total = tl.dot(weights.to(COMPUTE), f2.to(COMPUTE), total, input_precision=PRECISION)
    tl.store(out, total, mask=known[:, None])


@triton.jit
def _boxes_kernel(
    coords_ptr,  # [B, 2, H, W] float32
    boxes_ptr,  # [B, T, 4] int32, contiguous: top, bottom, left, right
    H,
    W,
    h,
    w,
    shrink,  # 2^-level
    coords_b,
    coords_axis,
    coords_y,
    coords_x,
    RADIUS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Bounding box of the windows of each query tile, inside the target map; ends are exclusive."""
    K: tl.constexpr = 2 * RADIUS + 2
    b = tl.program_id(1).to(tl.int64)
    qy, qx, known = _tile_queries(tl.program_id(0), H, W, TILE)
    at = qy * coords_y + qx * coords_x
    y0, x0, _, _, _ = _centre(coords_ptr + b * coords_b, at, coords_axis, known, shrink, h, w, RADIUS)
    seen = known & (y0 < h) & (y0 + K > 0) & (x0 < w) & (x0 + K > 0)
    top, bottom = _span(y0, seen, h, K)
    left, right = _span(x0, seen, w, K)
    box = boxes_ptr + (b * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(box, top)
    tl.store(box + 1, bottom)
    tl.store(box + 2, left)
    tl.store(box + 3, right)


@triton.jit
def _target_grad_kernel(
    lattice_ptr,  # [B, H, W, K, K] float32, contiguous: gradient of the lattices
    f1_ptr,  # [B, H, W, C], channels contiguous
    coords_ptr,  # [B, 2, H, W] float32
    boxes_ptr,  # [B, T, 4] int32, contiguous
    grad_ptr,  # [B, h, w, C] in the type of the maps, contiguous
    H,
    W,
    h,
    w,
    C,
    num_tiles,  # T
    shrink,  # 2^-level
    f1_b,
    f1_y,
    f1_x,
    coords_b,
    coords_axis,
    coords_y,
    coords_x,
    RADIUS: tl.constexpr,
    TILE: tl.constexpr,
    SCAN: tl.constexpr,
    BC: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the targets of one tile, some channels, from all query tiles whose windows reach it."""
    K: tl.constexpr = 2 * RADIUS + 2
    b = tl.program_id(2).to(tl.int64)
    ty, tx, inside = _tile_queries(tl.program_id(0), h, w, TILE)
    targets_y, targets_x = tl.where(inside, ty, FAR), tx
    lattice_ptr += b * (H * W * K * K)
    coords_ptr += b * coords_b
    f1_ptr += b * f1_b
    boxes_ptr += b * num_tiles * 4
    across = (w + TILE - 1) // TILE
    top, left = (tl.program_id(0) // across) * TILE, (tl.program_id(0) % across) * TILE
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([TILE * TILE, BC], tl.float32)
    lane = tl.arange(0, SCAN)
    for first in range(0, num_tiles, SCAN):
        box = boxes_ptr + (first + lane) * 4
        exists = first + lane < num_tiles
        # Boxes that do not exist end before they begin.
        reach = (tl.load(box, mask=exists, other=0) < top + TILE) & (tl.load(box + 1, mask=exists, other=0) > top)
        reach &= (tl.load(box + 2, mask=exists, other=0) < left + TILE) & (
            tl.load(box + 3, mask=exists, other=0) > left
        )
        begin = tl.min(tl.where(reach, lane, SCAN), 0)
        end = tl.max(tl.where(reach, lane + 1, 0), 0)
        for nth in range(begin, end):
            if tl.max(tl.where(lane == nth, reach.to(tl.int32), 0), 0) > 0:
                qy, qx, known = _tile_queries(first + nth, H, W, TILE)
                at = qy * coords_y + qx * coords_x
                y0, x0, _, _, _ = _centre(coords_ptr, at, coords_axis, known, shrink, h, w, RADIUS)
                offset, mine = _diagonal(qy * W + qx, y0, x0, targets_y, targets_x, K)
                weights = tl.trans(tl.load(lattice_ptr + offset, mask=mine, other=0.0))
                f1_rows = f1_ptr + qy * f1_y + qx * f1_x
                f1 = tl.load(f1_rows[:, None] + channel[None, :], mask=known[:, None], other=0.0)
                total = tl.dot(weights.to(COMPUTE), f1.to(COMPUTE), total, input_precision=PRECISION)
    out = grad_ptr + b * (h * w * C) + (ty * w + tx)[:, None] * C + channel[None, :]
    tl.store(out, total.to(grad_ptr.dtype.element_ty), mask=inside[:, None])


class Config(NamedTuple):
    """Blocks and launch options of one kernel."""

    block_y: int
    """Rows of a block of targets."""
    block_x: int
    """Columns of a block of targets."""
    block_c: int
    """Channels handled at once."""
    warps: int
    stages: int


TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_LANGUAGE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def form_config(dtype: torch.dtype, level: int) -> Config:
    """Coarse levels see a tile of queries closer together: blocks get narrower.

    float32 takes three matrix products and their operands' parts, hence smaller blocks, here and below.
    """
    if dtype == torch.float32:
        return Config(*_block(64, level), 16, 8, 3)
    return Config(*_block(128, level), 64, 8, 3)


def query_grad_config(dtype: torch.dtype, level: int) -> Config:
    """The weights of a block are held beside the sums, so that it has fewer targets than forward."""
    if dtype == torch.float32:
        return Config(*_block(32, level), 64, 8, 2)
    return Config(*_block(64, level), 128, 8, 2)


def target_grad_config(dtype: torch.dtype) -> Config:
    """Blocks are tiles here."""
    if dtype == torch.float32:
        return Config(TILE, TILE, 32, 4, 2)
    return Config(TILE, TILE, 128, 8, 2)


def _block(targets: int, level: int) -> tuple[int, int]:
    block_x = 32 if level < 2 else 16
    return targets // block_x, block_x


def forward_types(dtype: torch.dtype) -> dict[str, Any]:
    """Type in which products are formed, and how: exact enough for 1e-5 in float32."""
    if dtype == torch.bfloat16 and INTERPRETING:
        dtype = torch.float32  # numpy has no bfloat16
    return {"COMPUTE": _LANGUAGE[dtype], "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}


def backward_types(dtype: torch.dtype) -> dict[str, Any]:
    """As forward, but float16 is multiplied as TF32: as many mantissa bits, and small gradients stay."""
    if dtype == torch.float16:
        return {"COMPUTE": tl.float32, "PRECISION": "tf32"}
    return forward_types(dtype)


def lookup_forward(
    fmap1: Tensor, fmap2_pyramid: list[Tensor], coords: Tensor, radius: int, window_order: str
) -> Tensor:
    """[B, L P, H, W], float32, channels-last in memory; see `reference.correlation_lookup_reference`."""
    return _lookup(fmap1, fmap2_pyramid, coords, radius, window_order == "y_major")


@torch.library.custom_op("kinema::correlation_lookup", mutates_args=())
def _lookup(fmap1: Tensor, pyramid: list[Tensor], coords: Tensor, radius: int, y_major: bool) -> Tensor:
    with torch.cuda.device_of(fmap1):  # triton launches on the current device; nothing to do on the CPU
        return _form_windows(fmap1, pyramid, coords, radius, y_major)


def _form_windows(fmap1: Tensor, pyramid: list[Tensor], coords: Tensor, radius: int, y_major: bool) -> Tensor:
    f1, levels, coords = _prepare(fmap1, pyramid, coords)
    B, H, W, C = f1.shape
    points, scale = (2 * radius + 1) ** 2, 1.0 / math.sqrt(fmap1.shape[1])
    out = torch.empty(B, H, W, len(levels) * points, dtype=torch.float32, device=f1.device)
    lattice = torch.empty(B, H, W, (2 * radius + 2) ** 2, dtype=torch.float32, device=f1.device)
    count = H * W * points
    for level, f2 in enumerate(levels):
        h, w = f2.shape[1:3]
        config, shrink = form_config(f1.dtype, level), 1.0 / 2**level
        _form_kernel[(_tiles(H, W), B)](
            *(f1, f2, coords, lattice, H, W, h, w, C, shrink),
            *(*f1.stride()[:3], *f2.stride()[:3], *coords.stride()),
            RADIUS=radius,
            TILE=TILE,
            BY=config.block_y,
            BX=config.block_x,
            BC=_block_c(C, config),
            **forward_types(f1.dtype),
            num_warps=config.warps,
            num_stages=config.stages,
        )
        _blend_kernel[(triton.cdiv(count, ELEMENTS), B)](
            *(lattice, coords, out[..., level * points :], H, W, h, w, shrink, scale),
            *(count, out.shape[-1], *coords.stride()),
            RADIUS=radius,
            Y_MAJOR=y_major,
            ELEMENTS=ELEMENTS,
            num_warps=4,
        )
    return out.permute(0, 3, 1, 2)


@_lookup.register_fake
def _lookup_shape(fmap1, pyramid, coords, radius, y_major):  # type: ignore[no-untyped-def]
    B, _, H, W = fmap1.shape
    out = fmap1.new_empty(B, H, W, len(pyramid) * (2 * radius + 1) ** 2, dtype=torch.float32)
    return out.permute(0, 3, 1, 2)


@torch.library.custom_op("kinema::correlation_lookup_backward", mutates_args=())
def _lookup_backward(
    grad: Tensor,
    fmap1: Tensor,
    pyramid: list[Tensor],
    coords: Tensor,
    radius: int,
    y_major: bool,
    needs_query: bool,
    needs_target: bool,
) -> list[Tensor]:
    """The gradient of fmap1 if it is needed, then those of all levels if one is needed."""
    with torch.cuda.device_of(fmap1):
        return _form_gradients(grad, fmap1, pyramid, coords, radius, y_major, needs_query, needs_target)


def _form_gradients(
    grad: Tensor,
    fmap1: Tensor,
    pyramid: list[Tensor],
    coords: Tensor,
    radius: int,
    y_major: bool,
    needs_query: bool,
    needs_target: bool,
) -> list[Tensor]:
    f1, levels, coords = _prepare(fmap1, pyramid, coords)
    grad, scale = _channels_last(grad.float()), 1.0 / math.sqrt(fmap1.shape[1])
    B, H, W, C = f1.shape
    points, count = (2 * radius + 1) ** 2, H * W * (2 * radius + 2) ** 2
    lattice = torch.empty(B, count, dtype=torch.float32, device=f1.device)
    query_grad = torch.empty(B, H, W, C, dtype=torch.float32, device=f1.device) if needs_query else None
    grads = []
    for level, f2 in enumerate(levels):
        shrink = 1.0 / 2**level
        _unblend_kernel[(triton.cdiv(count, ELEMENTS), B)](
            *(grad[..., level * points :], coords, lattice, H, W, *f2.shape[1:3], shrink, scale),
            *(count, grad.shape[-1], *coords.stride()),
            RADIUS=radius,
            Y_MAJOR=y_major,
            ELEMENTS=ELEMENTS,
            num_warps=4,
        )
        if query_grad is not None:
            _add_query_grad(query_grad, lattice, f2, coords, radius, level)
        if needs_target:
            grads.append(_target_grad(lattice, f1, f2, coords, radius, level))
    if query_grad is not None:
        grads.insert(0, query_grad.to(f1.dtype))
    return [rows[..., : fmap1.shape[1]].contiguous().permute(0, 3, 1, 2) for rows in grads]


@_lookup_backward.register_fake
def _lookup_backward_shape(grad, fmap1, pyramid, coords, radius, y_major, needs_query, needs_target):  # type: ignore[no-untyped-def]
    maps = [fmap1] * needs_query + list(pyramid) * needs_target
    return [fmap.new_empty(fmap.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) for fmap in maps]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    fmap1, pyramid, coords, radius, y_major = inputs
    ctx.save_for_backward(fmap1, coords, *pyramid)
    ctx.window = radius, y_major


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    fmap1, coords, *pyramid = ctx.saved_tensors
    needs_query, needs_target = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])
    grads = list(_lookup_backward(grad, fmap1, pyramid, coords, *ctx.window, needs_query, needs_target))
    query_grad = grads.pop(0) if needs_query else None
    return query_grad, grads if needs_target else [None] * len(pyramid), None, None, None


_lookup.register_autograd(_differentiate, setup_context=_save)


def _add_query_grad(total: Tensor, lattice: Tensor, f2: Tensor, coords: Tensor, radius: int, level: int) -> None:
    B, H, W, C = total.shape
    config = query_grad_config(f2.dtype, level)
    _query_grad_kernel[(_tiles(H, W), C // _block_c(C, config), B)](
        *(lattice, f2, coords, total, H, W, *f2.shape[1:], 1.0 / 2**level),
        *(*f2.stride()[:3], *coords.stride()),
        RADIUS=radius,
        TILE=TILE,
        BY=config.block_y,
        BX=config.block_x,
        BC=_block_c(C, config),
        ADD=level > 0,
        **backward_types(f2.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _target_grad(lattice: Tensor, f1: Tensor, f2: Tensor, coords: Tensor, radius: int, level: int) -> Tensor:
    """[B, h, w, C]."""
    B, H, W, C = f1.shape
    h, w = f2.shape[1:3]
    num_tiles, shrink = _tiles(H, W), 1.0 / 2**level
    boxes = torch.empty(B, num_tiles, 4, dtype=torch.int32, device=f1.device)
    _boxes_kernel[(num_tiles, B)](
        *(coords, boxes, H, W, h, w, shrink, *coords.stride()), RADIUS=radius, TILE=TILE, num_warps=2
    )
    grad = torch.empty(B, h, w, C, dtype=f2.dtype, device=f2.device)
    config = target_grad_config(f1.dtype)
    _target_grad_kernel[(_tiles(h, w), C // _block_c(C, config), B)](
        *(lattice, f1, coords, boxes, grad, H, W, h, w, C, num_tiles, shrink),
        *(*f1.stride()[:3], *coords.stride()),
        RADIUS=radius,
        TILE=TILE,
        SCAN=SCAN,
        BC=_block_c(C, config),
        **backward_types(f1.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return grad


def _prepare(fmap1: Tensor, pyramid: list[Tensor], coords: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Maps as [B, H, W, C] with contiguous channels in whole blocks, without a copy where they are so already."""
    missing = -fmap1.shape[1] % SMALLEST_BLOCK_C
    maps = [_channels_last(fmap) for fmap in (fmap1, *pyramid)]
    if missing:
        # Zeros add nothing to a product, and kernels without masks on channels need fewer registers.
        maps = [F.pad(fmap, (0, missing)) for fmap in maps]
    return maps[0], maps[1:], coords.float()


def _block_c(channels: int, config: Config) -> int:
    """The largest block of channels, up to the configured one, that divides them."""
    return min(config.block_c, channels & -channels)


def _channels_last(fmap: Tensor) -> Tensor:
    return fmap.permute(0, 2, 3, 1).contiguous()


def _tiles(height: int, width: int) -> int:
    return triton.cdiv(height, TILE) * triton.cdiv(width, TILE)


def ahead_of_time_cases() -> list[Case]:
    """Every kernel in every configuration that a launch can choose."""
    sizes = dict.fromkeys(("H", "W", "h", "w"), "i32")
    coords = {"coords_ptr": "*fp32", **dict.fromkeys(("coords_b", "coords_axis", "coords_y", "coords_x"), "i32")}
    shared = {**sizes, **coords, "shrink": "fp32"}
    window = {"RADIUS": 4, "Y_MAJOR": False, "ELEMENTS": ELEMENTS}
    elementwise = {**shared, "lattice_ptr": "*fp32", "scale": "fp32", "count": "i32", "channels": "i32"}
    cases = [
        Case("blend", _blend_kernel, {**elementwise, "out_ptr": "*fp32"}, window),
        Case("unblend", _unblend_kernel, {**elementwise, "grad_ptr": "*fp32"}, window),
        Case("boxes", _boxes_kernel, {**shared, "boxes_ptr": "*i32"}, {"RADIUS": 4, "TILE": TILE}, num_warps=2),
    ]
    f1 = dict.fromkeys(("f1_b", "f1_y", "f1_x"), "i32")
    f2 = dict.fromkeys(("f2_b", "f2_y", "f2_x"), "i32")
    products = {**shared, "lattice_ptr": "*fp32", "C": "i32"}
    aligned = ("f1_ptr", "f2_ptr", "lattice_ptr", "grad_ptr", "C", *f1, *f2)
    for dtype, name in TYPES.items():
        pointers = {"f1_ptr": f"*{name}", "f2_ptr": f"*{name}"}
        add = functools.partial(_product_case, aligned=aligned)
        for level in (0, 2):
            signature = {**products, **pointers, **f1, **f2}
            config, types = form_config(dtype, level), forward_types(dtype)
            cases.append(add(f"form {name} level {level}", _form_kernel, signature, config, types))
            signature = {**products, **f2, "f2_ptr": f"*{name}", "grad_ptr": "*fp32"}
            config, types = query_grad_config(dtype, level), {**backward_types(dtype), "ADD": True}
            cases.append(add(f"query gradient {name} level {level}", _query_grad_kernel, signature, config, types))
        signature = {**products, **f1, "f1_ptr": f"*{name}", "grad_ptr": f"*{name}"}
        signature |= {"boxes_ptr": "*i32", "num_tiles": "i32"}
        config, types = target_grad_config(dtype), {**backward_types(dtype), "SCAN": SCAN}
        cases.append(add(f"target gradient {name}", _target_grad_kernel, signature, config, types))
    smallest = [_smallest_channels(case) for case in cases if "fp32 level 0" in case.name or case.name.endswith("bf16")]
    return cases + smallest


def _smallest_channels(case: Case) -> Case:
    """The same for maps whose channels only the smallest block divides."""
    return dataclasses.replace(
        case,
        name=f"{case.name}, {SMALLEST_BLOCK_C} channels",
        constexprs={**case.constexprs, "BC": SMALLEST_BLOCK_C},
    )


def _product_case(
    name: str, kernel: Any, signature: dict[str, str], config: Config, types: dict[str, Any], aligned: tuple[str, ...]
) -> Case:
    blocks = {"BY": config.block_y, "BX": config.block_x, "BC": config.block_c}
    constants = {"RADIUS": 4, "TILE": TILE, **blocks, **types}
    return Case(
        name,
        kernel,
        signature,
        {key: value for key, value in constants.items() if key in kernel.arg_names},
        num_warps=config.warps,
        num_stages=config.stages,
        has_dot=True,
        divisible=tuple(argument for argument in aligned if argument in signature),
    )
