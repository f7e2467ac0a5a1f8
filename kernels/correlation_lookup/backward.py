"""Backward pass without atomics, so that the same input gives the same bytes.

- The lattice gradient is the adjoint of the blend, a gather of up to four values.
- The gradient of fmap1 is a gather: each query tile visits the blocks it visited forward.
- The gradient of fmap2 is a scatter turned into a gather: a tile of targets scans the bounding boxes of the windows of
  all query tiles (four integers per tile, 32 at a time), and multiplies with those that reach it, in ascending order.
  No index is stored, so memory is linear in H W for any motion.
"""

import triton
import triton.language as tl

from kinema.kernels.correlation_lookup.geometry import (
    band_of,
    block_pixels,
    diagonal,
    is_wanted,
    point_of,
    span,
    tile_pixels,
    tile_windows,
)


@triton.jit
def unblend_kernel(
    grad_ptr,  # [B, H, W, L P] float32, contiguous; moved to the level's first channel
    coords,
    lattice_ptr,  # [B, H, W, K, K] float32, contiguous: written everywhere, 0 outside the map
    level,
    scale,  # 1 / sqrt(C)
    count,  # H W K K
    channels,  # L P
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
    query, point = element // (K * K), element % (K * K)
    iy, ix = point // K, point % K
    y, x, fy, fx, finite = point_of(coords, b, query, iy, ix, known, level, RADIUS)
    inside = known & finite & (y >= 0) & (y < level.h) & (x >= 0) & (x < level.w)
    step_y: tl.constexpr = k if Y_MAJOR else 1
    step_x: tl.constexpr = 1 if Y_MAJOR else k
    grad = grad_ptr + b * (level.H * level.W * channels) + query * channels + iy * step_y + ix * step_x
    up, down, left, right = inside & (iy < k), inside & (iy > 0), ix < k, ix > 0
    value = tl.load(grad, mask=up & left, other=0.0) * (1.0 - fy) * (1.0 - fx)
    value += tl.load(grad - step_x, mask=up & right, other=0.0) * (1.0 - fy) * fx
    value += tl.load(grad - step_y, mask=down & left, other=0.0) * fy * (1.0 - fx)
    value += tl.load(grad - step_y - step_x, mask=down & right, other=0.0) * fy * fx
    lattice_ptr += b * (level.H * level.W * K * K)
    tl.store(lattice_ptr + element, tl.where(inside, value * scale, 0.0), mask=known)


@triton.jit
def query_grad_kernel(
    lattice_ptr,  # [B, H, W, K, K] float32, contiguous: gradient of the lattices
    f2,  # Map [B, h, w, C]
    coords,
    grad_ptr,  # [B, H, W, C] float32, contiguous
    level,
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
    qy, qx, known, y0, x0, seen = tile_windows(coords, tl.program_id(0), b, level, RADIUS, TILE)
    query = qy * level.W + qx
    lattice_ptr += b * (level.H * level.W * K * K)
    f2_image = f2.ptr + b * f2.b
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    out = grad_ptr + b * (level.H * level.W * level.C) + query[:, None] * level.C + channel[None, :]
    total = tl.zeros([TILE * TILE, BC], tl.float32)
    if ADD:
        total = tl.load(out, mask=known[:, None], other=0.0)
    top, bottom = span(y0, seen, level.h, K)
    for row in range(top, bottom, BY):
        in_band, left, right = band_of(y0, x0, seen, row, level, BY, K)
        for column in range(left, right, BX):
            if is_wanted(x0, in_band, column, BX, K):
                ty, tx, inside = block_pixels(row, column, level, BY, BX)
                offset, mine = diagonal(query, y0, x0, ty, tx, inside, K)
                weights = tl.load(lattice_ptr + offset, mask=mine, other=0.0)
                f2_rows = f2_image + ty * f2.y + tx * f2.x
                features = tl.load(f2_rows[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
                total = tl.dot(weights.to(COMPUTE), features.to(COMPUTE), total, input_precision=PRECISION)
    tl.store(out, total, mask=known[:, None])


@triton.jit
def boxes_kernel(
    coords,
    boxes_ptr,  # [B, T, 4] int32, contiguous: top, bottom, left, right
    level,
    RADIUS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Bounding box of the windows of each query tile, inside the target map; ends are exclusive."""
    K: tl.constexpr = 2 * RADIUS + 2
    b = tl.program_id(1).to(tl.int64)
    _, _, _, y0, x0, seen = tile_windows(coords, tl.program_id(0), b, level, RADIUS, TILE)
    top, bottom = span(y0, seen, level.h, K)
    left, right = span(x0, seen, level.w, K)
    box = boxes_ptr + (b * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(box, top)
    tl.store(box + 1, bottom)
    tl.store(box + 2, left)
    tl.store(box + 3, right)


@triton.jit
def target_grad_kernel(
    lattice_ptr,  # [B, H, W, K, K] float32, contiguous: gradient of the lattices
    f1,  # Map [B, H, W, C]
    coords,
    boxes_ptr,  # [B, T, 4] int32, contiguous
    grad_ptr,  # [B, h, w, C] in the type of the maps, items contiguous
    grad_b,  # stride from item to item
    level,
    num_tiles,  # T
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
    ty, tx, inside = tile_pixels(tl.program_id(0), level.h, level.w, TILE)
    lattice_ptr += b * (level.H * level.W * K * K)
    f1_image = f1.ptr + b * f1.b
    boxes_ptr += b * num_tiles * 4
    across = (level.w + TILE - 1) // TILE
    top, left = (tl.program_id(0) // across) * TILE, (tl.program_id(0) % across) * TILE
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([TILE * TILE, BC], tl.float32)
    lane = tl.arange(0, SCAN)
    for first in range(0, num_tiles, SCAN):
        box = boxes_ptr + (first + lane) * 4
        exists = first + lane < num_tiles
        # Boxes that do not exist end before they begin.
        reach = (tl.load(box, mask=exists, other=0) < top + TILE) & (tl.load(box + 1, mask=exists, other=0) > top)
        reach &= tl.load(box + 2, mask=exists, other=0) < left + TILE
        reach &= tl.load(box + 3, mask=exists, other=0) > left
        begin = tl.min(tl.where(reach, lane, SCAN), 0)
        end = tl.max(tl.where(reach, lane + 1, 0), 0)
        for nth in range(begin, end):
            if tl.max(tl.where(lane == nth, reach.to(tl.int32), 0), 0) > 0:
                qy, qx, known, y0, x0, _ = tile_windows(coords, first + nth, b, level, RADIUS, TILE)
                offset, mine = diagonal(qy * level.W + qx, y0, x0, ty, tx, inside, K)
                weights = tl.trans(tl.load(lattice_ptr + offset, mask=mine, other=0.0))
                f1_rows = f1_image + qy * f1.y + qx * f1.x
                features = tl.load(f1_rows[:, None] + channel[None, :], mask=known[:, None], other=0.0)
                total = tl.dot(weights.to(COMPUTE), features.to(COMPUTE), total, input_precision=PRECISION)
    out = grad_ptr + b * grad_b + (ty * level.w + tx)[:, None] * level.C + channel[None, :]
    tl.store(out, total.to(grad_ptr.dtype.element_ty), mask=inside[:, None])
