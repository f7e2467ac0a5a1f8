"""Gradients: the products of the forward pass the other way, each element summed by one program in one order.

Weights per displacement, gathered into a [64, strip] matrix with 0 off the windows, times the strip's features. Towards
frame 2 the weights are gathered from the pixels that are reached (`MIRRORED`): no atomics, same bytes each time. A
program takes as many channels as fit, so that weights are gathered once for all of them.

Rounding: weights and features of float16 and bfloat16 maps are multiplied as TF32, which holds such features exactly
and has the range that unscaled gradients need; float32 takes three TF32 products.
"""

import triton
import triton.language as tl

from kinema.kernels.local_correlation.geometry import (
    corner,
    in_window,
    pixels_of_block,
    pixels_of_strip,
    tile_of,
    wide,
)


@triton.jit
def window_sum_kernel(
    weight,  # Map [B, (2 RADIUS + 1)^2, H, W], float32
    fmap,  # Map [B, C, H, W]
    out,  # Map [B, C, H, W]: written
    height,
    width,
    scale,  # 1 / sqrt(C)
    CHANNELS: tl.constexpr,  # of fmap, whose last ones may be there to fill it up
    OUT_CHANNELS: tl.constexpr,
    RADIUS: tl.constexpr,
    MIRRORED: tl.constexpr,
    SIDE: tl.constexpr,
    STRIP_WIDTH: tl.constexpr,
    STRIP_ROWS: tl.constexpr,
    NUM_STRIPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_BLOCKS_C: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Weighted features of the whole rectangle around one block, for BLOCK_C channels."""
    window: tl.constexpr = 2 * RADIUS + 1
    batch, y0, x0 = tile_of(tl.program_id(0) // NUM_BLOCKS_C, height, width, SIDE)
    my, mx, inside = pixels_of_block(y0, x0, height, width, SIDE)
    c = tl.program_id(0) % NUM_BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = wide(c, WIDE)[None, :]
    fmap_corner = corner(fmap, batch, y0 - RADIUS, x0 - RADIUS)
    # Displacement dy window + dx is a difference of a term of n and a term of m, so that places are a sum.
    plane = wide(my * window + mx, WIDE) * weight.c
    if MIRRORED:
        # The weight that the reached pixel holds for the way back: plane window^2 - 1 - (dy window + dx).
        weight_corner = corner(weight, batch, y0 - RADIUS, x0 - RADIUS)
        weight_pixels = wide(window * window - 1, WIDE) * weight.c + plane
    else:
        weight_corner = corner(weight, batch, y0, x0)
        weight_pixels = wide(my, WIDE) * weight.y + wide(mx, WIDE) * weight.x - plane

    summed = tl.zeros((SIDE * SIDE, BLOCK_C), tl.float32)
    for strip in range(0, NUM_STRIPS):
        ny, nx, strip_inside = pixels_of_strip(strip, y0, x0, height, width, RADIUS, STRIP_WIDTH, STRIP_ROWS)
        planes = wide(ny * window + nx, WIDE) * weight.c
        if MIRRORED:
            planes = wide(ny, WIDE) * weight.y + wide(nx, WIDE) * weight.x - planes
        kept = (inside[:, None] & strip_inside[None, :]) & in_window(my, mx, ny, nx, RADIUS)
        weights = tl.load(weight_corner + (weight_pixels[:, None] + planes[None, :]), kept, other=0.0)
        pixels = wide(ny, WIDE) * fmap.y + wide(nx, WIDE) * fmap.x
        known = strip_inside[:, None]
        if CHANNELS % BLOCK_C != 0:
            known = known & (c < CHANNELS)[None, :]
        features = tl.load(fmap_corner + (pixels[:, None] + channels * fmap.c), known, other=0.0)
        summed = tl.dot(weights, features.to(tl.float32), summed, input_precision=PRECISION)

    places = (wide(my, WIDE) * out.y + wide(mx, WIDE) * out.x)[:, None] + channels * out.c
    written = inside[:, None] & (c < OUT_CHANNELS)[None, :]
    tl.store(corner(out, batch, y0, x0) + places, (summed * scale).to(out.ptr.dtype.element_ty), written)
