"""Local correlation as Triton kernels: a block of pixels against the rectangle that its windows cover.

A program takes a block of 8x8 pixels of frame 1 and a strip of the rectangle of (8 + 2r)^2 pixels of frame 2 that
the block's windows cover, multiplies all against all on the tensor cores and stores the products that are
displacements: with r = 4, 81 of 256, where a row of 64 pixels against its windows would use 81 of 648. Features
are read where they lie, with any strides; nothing is padded, unfolded or transposed.

The gradients are the same product the other way: weights per displacement, gathered into a [64, strip] matrix with
0 off the windows, times the strip's features. Towards frame 2 the weights are gathered from the pixels that are
reached (`mirrored`), so each gradient element is summed by one program in one order: no atomics, same bytes each time.

Rounding: float16 and bfloat16 products are exact, sums are float32. float32 products take three TF32 passes. In the
gradients of float16 and bfloat16 maps the float32 weights are rounded to TF32, which holds such features exactly and
has the range that unscaled gradients need.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.dispatch import INTERPRETING
from kinema.kernels.launch import launch, on_device
from kinema.kernels.local_correlation.reference import memory_format_of

SIDE = 8
"""Pixels along each side of a block: 64 rows, the height of a Hopper matrix instruction."""


@triton.jit
def _block_and_strip(
    tile,
    strip,
    tiles_x,
    SIDE: tl.constexpr,
    RADIUS: tl.constexpr,
    STRIP_WIDTH: tl.constexpr,
    STRIP_ROWS: tl.constexpr,
):
    """(y, x) of a block's pixels [SIDE^2] and of a strip of the rectangle around it [STRIP_ROWS * STRIP_WIDTH]."""
    y0 = tile // tiles_x * SIDE
    x0 = tile % tiles_x * SIDE
    m = tl.arange(0, SIDE * SIDE)
    n = tl.arange(0, STRIP_WIDTH * STRIP_ROWS)
    strip_y = y0 - RADIUS + strip * STRIP_ROWS + n // STRIP_WIDTH
    strip_x = x0 - RADIUS + n % STRIP_WIDTH
    return y0 + m // SIDE, x0 + m % SIDE, strip_y, strip_x


@triton.jit
def correlate_kernel(
    query_ptr,  # [B, C, H, W]
    target_ptr,  # [B, C, H, W]
    out_ptr,  # [B, (2 RADIUS + 1)^2, H, W], float32
    height,
    width,
    tiles_x,
    num_tiles,
    query_stride_b,
    query_stride_c,
    query_stride_y,
    query_stride_x,
    target_stride_b,
    target_stride_c,
    target_stride_y,
    target_stride_x,
    out_stride_b,
    out_stride_c,
    out_stride_y,
    out_stride_x,
    scale,
    CHANNELS: tl.constexpr,
    RADIUS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIP_WIDTH: tl.constexpr,
    STRIP_ROWS: tl.constexpr,
    NUM_STRIPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One strip of the rectangle around one block: its displacements, 0 outside the image."""
    program = tl.program_id(0)
    strip = program % NUM_STRIPS
    tile = program // NUM_STRIPS % num_tiles
    batch = (program // NUM_STRIPS // num_tiles).to(tl.int64)
    y, x, strip_y, strip_x = _block_and_strip(tile, strip, tiles_x, SIDE, RADIUS, STRIP_WIDTH, STRIP_ROWS)
    inside = (y < height) & (x < width)
    strip_inside = (strip_y >= 0) & (strip_y < height) & (strip_x >= 0) & (strip_x < width)

    query = query_ptr + batch * query_stride_b + y.to(tl.int64) * query_stride_y + x.to(tl.int64) * query_stride_x
    target = (
        target_ptr
        + batch * target_stride_b
        + strip_y.to(tl.int64) * target_stride_y
        + strip_x.to(tl.int64) * target_stride_x
    )
    products = tl.zeros((SIDE * SIDE, STRIP_WIDTH * STRIP_ROWS), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        channel = c.to(tl.int64)[None, :]
        a = tl.load(query[:, None] + channel * query_stride_c, inside[:, None] & (c < CHANNELS)[None, :], other=0.0)
        b = tl.load(
            target[:, None] + channel * target_stride_c, strip_inside[:, None] & (c < CHANNELS)[None, :], other=0.0
        )
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, tl.trans(b), products, input_precision="tf32x3")

    dy = strip_y[None, :] - y[:, None] + RADIUS
    dx = strip_x[None, :] - x[:, None] + RADIUS
    window = 2 * RADIUS + 1
    kept = inside[:, None] & (dy >= 0) & (dy < window) & (dx >= 0) & (dx < window)
    # A product with a pixel outside is 0 times a feature, which is no 0 when the feature is infinite.
    products = tl.where(strip_inside[None, :], products * scale, 0.0)
    out = out_ptr + batch * out_stride_b + y.to(tl.int64) * out_stride_y + x.to(tl.int64) * out_stride_x
    tl.store(out[:, None] + (dy * window + dx).to(tl.int64) * out_stride_c, products, kept)


@triton.jit
def window_sum_kernel(
    weight_ptr,  # [B, (2 RADIUS + 1)^2, H, W], float32
    fmap_ptr,  # [B, C, H, W]
    out_ptr,  # [B, C, H, W]
    height,
    width,
    tiles_x,
    num_tiles,
    weight_stride_b,
    weight_stride_c,
    weight_stride_y,
    weight_stride_x,
    fmap_stride_b,
    fmap_stride_c,
    fmap_stride_y,
    fmap_stride_x,
    out_stride_b,
    out_stride_c,
    out_stride_y,
    out_stride_x,
    scale,
    CHANNELS: tl.constexpr,
    RADIUS: tl.constexpr,
    MIRRORED: tl.constexpr,
    SIDE: tl.constexpr,
    STRIP_WIDTH: tl.constexpr,
    STRIP_ROWS: tl.constexpr,
    NUM_STRIPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_BLOCKS_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weighted features of the whole rectangle around one block, for BLOCK_C channels."""
    program = tl.program_id(0)
    c = program % NUM_BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = program // NUM_BLOCKS_C % num_tiles
    batch = (program // NUM_BLOCKS_C // num_tiles).to(tl.int64)
    channel = c.to(tl.int64)[None, :]
    window = 2 * RADIUS + 1
    weight_batch = weight_ptr + batch * weight_stride_b
    fmap_batch = fmap_ptr + batch * fmap_stride_b + channel * fmap_stride_c

    summed = tl.zeros((SIDE * SIDE, BLOCK_C), tl.float32)
    for strip in range(0, NUM_STRIPS):
        y, x, strip_y, strip_x = _block_and_strip(tile, strip, tiles_x, SIDE, RADIUS, STRIP_WIDTH, STRIP_ROWS)
        strip_inside = (strip_y >= 0) & (strip_y < height) & (strip_x >= 0) & (strip_x < width)
        dy = strip_y[None, :] - y[:, None] + RADIUS
        dx = strip_x[None, :] - x[:, None] + RADIUS
        kept = strip_inside[None, :] & (dy >= 0) & (dy < window) & (dx >= 0) & (dx < window)
        kept = kept & ((y < height) & (x < width))[:, None]
        # (dy window + dx) stride_c is a difference of a term of n and a term of m: so the addresses are a sum.
        m_plane = (y * window + x).to(tl.int64) * weight_stride_c
        n_plane = ((strip_y + RADIUS) * window + strip_x + RADIUS).to(tl.int64) * weight_stride_c
        if MIRRORED:
            # The weight that the reached pixel holds for the way back: plane window^2 - 1 - (dy window + dx).
            last = (window * window - 1) * weight_stride_c
            m_offset = m_plane + last
            n_offset = strip_y.to(tl.int64) * weight_stride_y + strip_x.to(tl.int64) * weight_stride_x - n_plane
        else:
            m_offset = y.to(tl.int64) * weight_stride_y + x.to(tl.int64) * weight_stride_x - m_plane
            n_offset = n_plane
        weights = (weight_batch + m_offset)[:, None] + n_offset[None, :]
        a = tl.load(weights, kept, other=0.0)
        features = strip_y.to(tl.int64) * fmap_stride_y + strip_x.to(tl.int64) * fmap_stride_x
        b = tl.load(fmap_batch + features[:, None], strip_inside[:, None] & (c < CHANNELS)[None, :], other=0.0)
        summed = tl.dot(a, b.to(tl.float32), summed, input_precision=PRECISION)

    y, x, _, _ = _block_and_strip(tile, 0, tiles_x, SIDE, RADIUS, STRIP_WIDTH, STRIP_ROWS)
    place = batch * out_stride_b + y.to(tl.int64) * out_stride_y + x.to(tl.int64) * out_stride_x
    written = ((y < height) & (x < width))[:, None] & (c < CHANNELS)[None, :]
    tl.store(out_ptr + place[:, None] + channel * out_stride_c, (summed * scale).to(out_ptr.dtype.element_ty), written)


@dataclass(frozen=True)
class Strip:
    """How the rectangle around a block is cut: `rows` of `width` pixels, `count` strips."""

    width: int
    rows: int
    count: int

    @classmethod
    def of(cls, radius: int, pixels: int) -> "Strip":
        """Of `pixels`, or one row if that is more; the width is a power of two that holds the block and its reach."""
        width = triton.next_power_of_2(SIDE + 2 * radius)
        rows = max(1, pixels // width)
        return cls(width, rows, -(-(SIDE + 2 * radius) // rows))


def correlate_constants(dtype: torch.dtype, channels: int, radius: int) -> dict[str, int | bool]:
    """Compile-time arguments of `correlate_kernel`."""
    strip = Strip.of(radius, 64)
    deepest = 32 if dtype == torch.float32 else 64
    return {
        "CHANNELS": channels,
        "RADIUS": radius,
        "SIDE": SIDE,
        "STRIP_WIDTH": strip.width,
        "STRIP_ROWS": strip.rows,
        "NUM_STRIPS": strip.count,
        "BLOCK_C": min(deepest, max(16, triton.next_power_of_2(channels))),
        "UPCAST": INTERPRETING and dtype == torch.bfloat16,
    }


def window_sum_constants(dtype: torch.dtype, channels: int, radius: int, mirrored: bool) -> dict[str, int | bool | str]:
    """Compile-time arguments of `window_sum_kernel`."""
    single = dtype == torch.float32
    strip = Strip.of(radius, 32 if single else 64)
    # Three TF32 passes keep both operands twice in registers; a wide strip then leaves room for fewer channels.
    widest = (64 if strip.width <= 32 else 32) if single else 128
    block = min(widest, max(16, triton.next_power_of_2(channels)))
    return {
        "CHANNELS": channels,
        "RADIUS": radius,
        "MIRRORED": mirrored,
        "SIDE": SIDE,
        "STRIP_WIDTH": strip.width,
        "STRIP_ROWS": strip.rows,
        "NUM_STRIPS": strip.count,
        "BLOCK_C": block,
        "NUM_BLOCKS_C": -(-channels // block),
        "PRECISION": "tf32x3" if single else "tf32",
    }


def correlate_options(dtype: torch.dtype) -> dict[str, int]:
    """Warps of a program and depth of its pipeline."""
    return {"num_warps": 4, "num_stages": 2 if dtype == torch.float32 else 3}


WINDOW_SUM_OPTIONS = {"num_warps": 8, "num_stages": 2}
"""Gathering weights takes registers: 4 warps spill them."""


def _tiles(height: int, width: int) -> tuple[int, int]:
    """Blocks along x, and in the image."""
    tiles_x = -(-width // SIDE)
    return tiles_x, tiles_x * -(-height // SIDE)


def _empty_windows(fmap1: Tensor, radius: int) -> Tensor:
    shape = (fmap1.shape[0], (2 * radius + 1) ** 2, *fmap1.shape[2:])
    return torch.empty(shape, dtype=torch.float32, device=fmap1.device, memory_format=memory_format_of(fmap1))


def _empty_like(fmap: Tensor) -> Tensor:
    return torch.empty(fmap.shape, dtype=fmap.dtype, device=fmap.device, memory_format=memory_format_of(fmap))


@torch.library.custom_op("kinema::local_correlation", mutates_args=())
def _correlate(fmap1: Tensor, fmap2: Tensor, radius: int) -> Tensor:
    with on_device(fmap1):
        return correlate(fmap1, fmap2, radius)


def correlate(fmap1: Tensor, fmap2: Tensor, radius: int) -> Tensor:
    """The correlation on the current device."""
    out = _empty_windows(fmap1, radius)
    B, C, H, W = fmap1.shape
    tiles_x, num_tiles = _tiles(H, W)
    constants = correlate_constants(fmap1.dtype, C, radius)
    if B == 0:
        return out
    strides, options = (*fmap1.stride(), *fmap2.stride(), *out.stride()), correlate_options(fmap1.dtype)
    launch(
        correlate_kernel,
        (B * num_tiles * constants["NUM_STRIPS"],),
        *(fmap1, fmap2, out, H, W, tiles_x, num_tiles, *strides, C**-0.5),
        **constants,
        **options,
    )
    return out


@torch.library.custom_op("kinema::local_correlation_window_sum", mutates_args=())
def _window_sum(weight: Tensor, fmap: Tensor, radius: int, mirrored: bool) -> Tensor:
    with on_device(fmap):
        return window_sum(weight, fmap, radius, mirrored)


def window_sum(weight: Tensor, fmap: Tensor, radius: int, mirrored: bool) -> Tensor:
    """The weighted sum on the current device."""
    out = _empty_like(fmap)
    B, C, H, W = fmap.shape
    tiles_x, num_tiles = _tiles(H, W)
    constants = window_sum_constants(fmap.dtype, C, radius, mirrored)
    if B == 0:
        return out
    strides, options = (*weight.stride(), *fmap.stride(), *out.stride()), WINDOW_SUM_OPTIONS
    launch(
        window_sum_kernel,
        (B * num_tiles * constants["NUM_BLOCKS_C"],),
        *(weight, fmap, out, H, W, tiles_x, num_tiles, *strides, C**-0.5),
        **constants,
        **options,
    )
    return out


@_correlate.register_fake
def _(fmap1: Tensor, fmap2: Tensor, radius: int) -> Tensor:
    return _empty_windows(fmap1, radius)


@_window_sum.register_fake
def _(weight: Tensor, fmap: Tensor, radius: int, mirrored: bool) -> Tensor:
    return _empty_like(fmap)


def _keep_maps(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    fmap1, fmap2, ctx.radius = inputs
    ctx.save_for_backward(fmap1, fmap2)


def _correlate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    fmap1, fmap2 = ctx.saved_tensors
    grad1 = _window_sum(grad, fmap2, ctx.radius, False) if ctx.needs_input_grad[0] else None
    grad2 = _window_sum(grad, fmap1, ctx.radius, True) if ctx.needs_input_grad[1] else None
    return grad1, grad2, None


def _keep_weight_and_map(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
    weight, fmap, ctx.radius, ctx.mirrored = inputs
    ctx.save_for_backward(weight, fmap)


def _window_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    weight, fmap = ctx.saved_tensors
    grad_weight = grad_fmap = None
    if ctx.needs_input_grad[0]:
        pair = (fmap, grad) if ctx.mirrored else (grad, fmap)
        grad_weight = _correlate(*pair, ctx.radius)
    if ctx.needs_input_grad[1]:
        grad_fmap = _window_sum(weight, grad, ctx.radius, not ctx.mirrored)
    return grad_weight, grad_fmap, None, None


_correlate.register_autograd(_correlate_backward, setup_context=_keep_maps)
_window_sum.register_autograd(_window_sum_backward, setup_context=_keep_weight_and_map)


def local_correlation_triton(
    fmap1: Float[Tensor, "B C H W"], fmap2: Float[Tensor, "B C H W"], radius: int
) -> Float[Tensor, "B P H W"]:
    """`reference.local_correlation_plain` by the kernels; arguments are checked by the caller."""
    return _correlate(fmap1, fmap2, radius)
