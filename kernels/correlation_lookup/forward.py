"""Forward pass: products of tiles of queries with the targets that they see, then windows from their lattices.

Neighbouring queries have overlapping windows, so a tile of 8 x 8 queries is multiplied with blocks of target pixels
on tensor cores, and each query keeps the diagonal band of the products that is its window. Which blocks are visited
follows from the coordinates: rows from the first to the last that the tile sees, columns likewise for each band of
rows, and blocks that no query sees are skipped. Any motion gives the right result; smooth motion is fast. The
products of the (2 radius + 2)^2 lattice points of each query go to a scratch buffer that all levels share, and an
elementwise kernel blends them with the fraction that all points of a window have in common.
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
    tile_windows,
)


@triton.jit
def split_kernel(
    fmap,  # Map [B, h, w, C] float32
    parts_ptr,  # [2, B, h, w, C] float16, contiguous: written, high and low parts
    scales_ptr,  # [B, h, w] float32, contiguous: written
    width,
    pixels,  # h w
    low,  # B h w C
    C,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Each pixel's features, divided by a power of two that brings the largest to [1, 2), as two float16.

    Together they hold 22 of float32's 24 bits, or what is above 2^-25 of the pixel's largest.
    """
    b = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    known = (pixel < pixels)[:, None] & (channel < C)[None, :]
    places = fmap.ptr + b * fmap.b + ((pixel // width) * fmap.y + (pixel % width) * fmap.x)[:, None] + channel[None, :]
    values = tl.load(places, mask=known, other=0.0)
    exponent = tl.max(tl.abs(values), axis=1).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    values = values * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    high = values.to(tl.float16)
    target = parts_ptr + b * pixels * C + pixel[:, None] * C + channel[None, :]
    tl.store(target, high, mask=known)
    tl.store(target + low, (values - high.to(tl.float32)).to(tl.float16), mask=known)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(scales_ptr + b * pixels + pixel, scale, mask=pixel < pixels)


@triton.jit
def form_kernel(
    f1,  # Map [B, H, W, C]
    f2,  # Map [B, h, w, C]
    coords,
    lattice_ptr,  # [B, H, W, K, K] float32, contiguous, written inside the map only
    level,
    RADIUS: tl.constexpr,
    TILE: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Products of the queries of one tile with the lattice points of their windows.

    With SPLIT, values come in two float16 parts, and all their products but that of the low parts are summed.
    """
    K: tl.constexpr = 2 * RADIUS + 2
    b = tl.program_id(1).to(tl.int64)
    qy, qx, known, y0, x0, seen = tile_windows(coords, tl.program_id(0), b, level, RADIUS, TILE)
    query = qy * level.W + qx
    lattice_ptr += b * (level.H * level.W * K * K)
    f1_rows = f1.ptr + b * f1.b + qy * f1.y + qx * f1.x
    f2_image = f2.ptr + b * f2.b
    channel = tl.arange(0, BC)
    top, bottom = span(y0, seen, level.h, K)
    for row in range(top, bottom, BY):
        in_band, left, right = band_of(y0, x0, seen, row, level, BY, K)
        for column in range(left, right, BX):
            if is_wanted(x0, in_band, column, BX, K):
                ty, tx, inside = block_pixels(row, column, level, BY, BX)
                f2_rows = f2_image + ty * f2.y + tx * f2.x
                products = tl.zeros([TILE * TILE, BY * BX], tl.float32)
                for start in range(0, level.C, BC):
                    a_places = f1_rows[:, None] + (start + channel)[None, :]
                    c_places = f2_rows[None, :] + (start + channel)[:, None]
                    a = tl.load(a_places, mask=known[:, None], other=0.0).to(COMPUTE)
                    c = tl.load(c_places, mask=inside[None, :], other=0.0).to(COMPUTE)
                    products = tl.dot(a, c, products)
                    if SPLIT:
                        a_low = tl.load(a_places + f1.low, mask=known[:, None], other=0.0)
                        c_low = tl.load(c_places + f2.low, mask=inside[None, :], other=0.0)
                        products = tl.dot(a_low, c, products)
                        products = tl.dot(a, c_low, products)
                if SPLIT:
                    a_scale = tl.load(f1.scales + b * (level.H * level.W) + query, mask=known, other=0.0)
                    c_scale = tl.load(f2.scales + b * (level.h * level.w) + ty * level.w + tx, mask=inside, other=0.0)
                    products = products * a_scale[:, None] * c_scale[None, :]
                offset, mine = diagonal(query, y0, x0, ty, tx, inside, K)
                tl.store(lattice_ptr + offset, products, mask=mine)


@triton.jit
def blend_kernel(
    lattice_ptr,  # [B, H, W, K, K] float32, contiguous
    coords,
    out_ptr,  # [B, H, W, L P] float32, contiguous; moved to the level's first channel
    level,
    scale,  # 1 / sqrt(C)
    count,  # H W P
    channels,  # L P
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
    query, point = element // (k * k), element % (k * k)
    iy, ix = point % k, point // k
    if Y_MAJOR:
        iy, ix = ix, iy
    y, x, fy, fx, finite = point_of(coords, b, query, iy, ix, known, level, RADIUS)
    lattice = lattice_ptr + b * (level.H * level.W * K * K) + query * (K * K) + iy * K + ix
    up, down = known & (y >= 0) & (y < level.h), known & (y + 1 >= 0) & (y + 1 < level.h)
    left, right = (x >= 0) & (x < level.w), (x + 1 >= 0) & (x + 1 < level.w)
    upper = tl.load(lattice, mask=up & left, other=0.0) * (1.0 - fx)
    upper += tl.load(lattice + 1, mask=up & right, other=0.0) * fx
    lower = tl.load(lattice + K, mask=down & left, other=0.0) * (1.0 - fx)
    lower += tl.load(lattice + K + 1, mask=down & right, other=0.0) * fx
    value = tl.where(finite, (upper * (1.0 - fy) + lower * fy) * scale, float("nan"))
    tl.store(out_ptr + b * (level.H * level.W * channels) + query * channels + point, value, mask=known)
