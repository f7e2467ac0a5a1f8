"""Forward pass in one kernel: products of tiles of queries with the targets that they see, then their windows.

Neighbouring queries have overlapping windows, so a tile of 8 x 8 queries is multiplied with blocks of target pixels
on tensor cores, and each query keeps the diagonal band of the products that is its window. Which blocks are visited
follows from the coordinates: rows from the first to the last that the tile sees, columns likewise for each band of
rows, and blocks that no query sees are skipped. Any motion gives the right result; smooth motion is fast. The
products of the (2 radius + 2)^2 lattice points of each query go to a scratch buffer, from which the same program then
blends them with the fraction that all points of a window have in common. Programs differ in tile, level and item, so
that one launch forms all windows; maps of all levels lie behind one another.
"""

import triton
import triton.language as tl

from kinema.kernels.correlation_lookup.geometry import (
    band_of,
    block_pixels,
    diagonal,
    is_wanted,
    level_of,
    span,
    tile_windows,
    window_of,
)
from kinema.kernels.halves import halves


@triton.jit
def split_kernel(
    rows_ptr,  # [B, pixels, C] float32, contiguous
    parts_ptr,  # [1 or 2, B, pixels, C] float16, contiguous: written, high and low parts
    scales_ptr,  # [B, pixels] float32, contiguous: written
    pixels,
    low,  # B pixels C
    C,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LOW: tl.constexpr,
):
    """Each pixel's features as float16 parts and a scale (`halves`): the high parts alone without LOW."""
    b = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    known = (pixel < pixels)[:, None] & (channel < C)[None, :]
    offset = b * pixels * C + pixel[:, None] * C + channel[None, :]
    values = tl.load(rows_ptr + offset, mask=known, other=0.0)
    high, low_part, scale = halves(values, 1)
    tl.store(parts_ptr + offset, high, mask=known)
    if LOW:
        tl.store(parts_ptr + low + offset, low_part, mask=known)
    tl.store(scales_ptr + b * pixels + pixel, scale, mask=pixel < pixels)


@triton.jit
def lookup_kernel(
    f1,  # Parts [B, H W, C]
    f2,  # Parts [B, pixels, C]: levels behind one another
    coords,
    lattice_ptr,  # [B, L, H, W, K, K] float32, contiguous: written inside the map only
    out_ptr,  # [B, H, W, L P] float32, contiguous: written
    H,
    W,
    heights,  # of the levels
    widths,
    firsts,  # pixel that each level begins with
    C,
    scale,  # 1 / sqrt(channels)
    RADIUS: tl.constexpr,
    LEVELS: tl.constexpr,
    Y_MAJOR: tl.constexpr,
    TILE: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Windows of the queries of one tile at one level: bilinear, 0 outside the map.

    With SCALED, pixels are divided by their scales; with SPLIT, values come in two float16 parts, and all their
    products but that of the low parts are summed.
    """
    K: tl.constexpr = 2 * RADIUS + 2
    tile, number, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    level, first = level_of(number, H, W, heights, widths, firsts, C, LEVELS)
    qy, qx, known, y0, x0, seen = tile_windows(coords, tile, b, level, RADIUS, TILE)
    query = qy * W + qx
    lattice_ptr += (b * LEVELS + number) * (H * W * K * K)
    f1_rows = f1.ptr + b * f1.b + query * C
    f2_image = f2.ptr + b * f2.b + first.to(tl.int64) * C
    channel = tl.arange(0, BC)
    top, bottom = span(y0, seen, level.h, K)
    for row in range(top, bottom, BY):
        in_band, left, right = band_of(y0, x0, seen, row, level, BY, K)
        for column in range(left, right, BX):
            if is_wanted(x0, in_band, column, BX, K):
                ty, tx, inside = block_pixels(row, column, level, BY, BX)
                target = ty * level.w + tx
                f2_rows = f2_image + target * C
                products = tl.zeros([TILE * TILE, BY * BX], tl.float32)
                for start in range(0, C, BC):
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
                if SCALED:
                    a_scale = tl.load(f1.scales + b * f1.pixels + query, mask=known, other=0.0)
                    c_scale = tl.load(f2.scales + b * f2.pixels + first + target, mask=inside, other=0.0)
                    products = products * a_scale[:, None] * c_scale[None, :]
                offset, mine = diagonal(query, y0, x0, ty, tx, inside, K)
                tl.store(lattice_ptr + offset, products, mask=mine)
    # What all threads wrote, all may read from here on.
    tl.debug_barrier()
    _blend(lattice_ptr, coords, out_ptr, tile, number, b, level, scale, RADIUS, LEVELS, Y_MAJOR, TILE, ELEMENTS)


@triton.jit
def _blend(
    lattice_ptr,  # one item, one level
    coords,
    out_ptr,
    tile,
    number,
    b,
    level,
    scale,
    RADIUS: tl.constexpr,
    LEVELS: tl.constexpr,
    Y_MAJOR: tl.constexpr,
    TILE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Windows of a tile from their lattices."""
    K: tl.constexpr = 2 * RADIUS + 2
    k: tl.constexpr = 2 * RADIUS + 1
    across = (level.W + TILE - 1) // TILE
    for begin in range(0, TILE * TILE * k * k, ELEMENTS):
        element = begin + tl.arange(0, ELEMENTS)
        lane, point = element // (k * k), element % (k * k)
        qy, qx = (tile // across) * TILE + lane // TILE, (tile % across) * TILE + lane % TILE
        known = (lane < TILE * TILE) & (qy < level.H) & (qx < level.W)
        iy, ix = point % k, point // k
        if Y_MAJOR:
            iy, ix = ix, iy
        y0, x0, fy, fx, finite = window_of(coords, b, qy, qx, known, level, RADIUS)
        y, x = y0 + iy, x0 + ix
        query = qy * level.W + qx
        lattice = lattice_ptr + query * (K * K) + iy * K + ix
        up, down = known & (y >= 0) & (y < level.h), known & (y + 1 >= 0) & (y + 1 < level.h)
        left, right = (x >= 0) & (x < level.w), (x + 1 >= 0) & (x + 1 < level.w)
        upper = tl.load(lattice, mask=up & left, other=0.0) * (1.0 - fx)
        upper += tl.load(lattice + 1, mask=up & right, other=0.0) * fx
        lower = tl.load(lattice + K, mask=down & left, other=0.0) * (1.0 - fx)
        lower += tl.load(lattice + K + 1, mask=down & right, other=0.0) * fx
        value = tl.where(finite, (upper * (1.0 - fy) + lower * fy) * scale, float("nan"))
        place = (b * (level.H * level.W) + query) * (LEVELS * k * k) + number * (k * k) + point
        tl.store(out_ptr + place, value, mask=known)
