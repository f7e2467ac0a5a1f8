"""Forward pass: a block of pixels times the strips of the rectangle that its windows cover.

The block's features are read once and stay while the strips pass by; each strip's products are stored where they are
displacements: with radius 4, 81 of 256, where a row of 64 pixels against its windows would use 81 of 648.

Rounding: products of float16 and bfloat16 are exact, sums are float32. float32 is multiplied as two float16 parts of
pixels that are divided by a power of two (`kernels/halves.py`): 22 of its 24 bits.
"""

import triton
import triton.language as tl

from kinema.kernels.halves import halves
from kinema.kernels.local_correlation.geometry import (
    corner,
    features_of,
    in_window,
    pixels_of_block,
    pixels_of_strip,
    tile_of,
    wide,
)


@triton.jit
def correlate_kernel(
    query,  # Map [B, C, H, W]
    target,  # Map [B, C, H, W]
    out,  # Map [B, (2 RADIUS + 1)^2, H, W], float32: written
    height,
    width,
    scale,  # 1 / sqrt(C)
    CHANNELS: tl.constexpr,
    RADIUS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIP_WIDTH: tl.constexpr,
    STRIP_ROWS: tl.constexpr,
    NUM_STRIPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_BLOCKS_C: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """All displacements of one block, 0 outside the image. With SPLIT, float32 is multiplied as float16 halves."""
    window: tl.constexpr = 2 * RADIUS + 1
    batch, y0, x0 = tile_of(tl.program_id(0), height, width, SIDE)
    my, mx, inside = pixels_of_block(y0, x0, height, width, SIDE)
    query_pixels = corner(query, batch, y0, x0) + (wide(my, WIDE) * query.y + wide(mx, WIDE) * query.x)
    target_corner = corner(target, batch, y0 - RADIUS, x0 - RADIUS)
    out_corner = corner(out, batch, y0, x0)
    # (dy window + dx) out.c is a difference of a term of n and a term of m, so that places are a sum.
    out_pixels = wide(my, WIDE) * out.y + wide(mx, WIDE) * out.x - wide(my * window + mx, WIDE) * out.c
    if NUM_BLOCKS_C == 1:
        features = features_of(query_pixels, inside, query.c, 0, CHANNELS, BLOCK_C, WIDE)
        if SPLIT:
            high, low, size = halves(features, 1)
    for strip in range(0, NUM_STRIPS):
        ny, nx, strip_inside = pixels_of_strip(strip, y0, x0, height, width, RADIUS, STRIP_WIDTH, STRIP_ROWS)
        target_pixels = target_corner + (wide(ny, WIDE) * target.y + wide(nx, WIDE) * target.x)
        products = tl.zeros((SIDE * SIDE, STRIP_WIDTH * STRIP_ROWS), tl.float32)
        for first in range(0, CHANNELS, BLOCK_C):
            if NUM_BLOCKS_C > 1:
                features = features_of(query_pixels, inside, query.c, first, CHANNELS, BLOCK_C, WIDE)
                if SPLIT:
                    high, low, size = halves(features, 1)
            reached = features_of(target_pixels, strip_inside, target.c, first, CHANNELS, BLOCK_C, WIDE)
            if SPLIT:
                reached_high, reached_low, reached_size = halves(reached, 1)
                parts = tl.dot(low, tl.trans(reached_high))
                parts = tl.dot(high, tl.trans(reached_low), parts)
                parts = tl.dot(high, tl.trans(reached_high), parts)
                products += parts * size[:, None] * reached_size[None, :]
            elif UPCAST:
                products = tl.dot(features.to(tl.float32), tl.trans(reached.to(tl.float32)), products)
            else:
                products = tl.dot(features, tl.trans(reached), products)
        kept = inside[:, None] & in_window(my, mx, ny, nx, RADIUS)
        # A product with a pixel outside is 0 times a feature, which is no 0 when the feature is infinite.
        products = tl.where(strip_inside[None, :], products * scale, 0.0)
        planes = wide(ny * window + nx, WIDE) * out.c
        tl.store(out_corner + (out_pixels[:, None] + planes[None, :]), products, kept)
