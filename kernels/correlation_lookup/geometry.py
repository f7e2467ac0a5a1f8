"""Where windows lie, inside kernels: tiles of queries, lattices of their windows, blocks of targets.

B batch, H W query map, h w target map of one level, C channels, K = 2 RADIUS + 2 lattice points along a side.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

FAR = tl.constexpr(2**29)


class Map(NamedTuple):
    """A map [B, height, width, C] with contiguous channels, as kernels take it."""

    ptr: Any
    b: Any
    """Stride from item to item, in elements; y, x likewise."""
    y: Any
    x: Any


class Parts(NamedTuple):
    """Pixels [B, pixels, C], contiguous, as they are multiplied."""

    ptr: Any
    b: int
    """Stride from item to item, in elements."""
    pixels: int
    low: int = 0
    """Distance from a value to its low part, where float32 is held as two float16."""
    scales: Any = None
    """[B, pixels] float32, contiguous: what multiplies the parts of a pixel."""


class Coords(NamedTuple):
    """Window centres [B, 2, H, W], float32, (x, y) in pixels of level 0."""

    ptr: Any
    b: Any
    axis: Any
    y: Any
    x: Any


class Level(NamedTuple):
    """Sizes of one level."""

    H: int
    W: int
    h: int
    w: int
    C: int
    """Channels, padded to whole blocks."""
    shrink: float
    """2^-level."""


@triton.jit
def level_of(number, H, W, heights, widths, firsts, C, LEVELS: tl.constexpr):
    """Sizes of a level, and the pixel that it begins with."""
    h, w, first = heights[0], widths[0], firsts[0]
    for other in tl.static_range(1, LEVELS):
        h = tl.where(number >= other, heights[other], h)
        w = tl.where(number >= other, widths[other], w)
        first = tl.where(number >= other, firsts[other], first)
    # 2^-number, by its bits.
    shrink = ((127 - number) << 23).to(tl.float32, bitcast=True)
    return Level(H, W, h, w, C, shrink), first


@triton.jit
def tile_pixels(tile, height, width, TILE: tl.constexpr):
    """Rows, columns and validity of the pixels of a tile of a map."""
    lane = tl.arange(0, TILE * TILE)
    across = (width + TILE - 1) // TILE
    y = (tile // across) * TILE + lane // TILE
    x = (tile % across) * TILE + lane % TILE
    return y, x, (y < height) & (x < width)


@triton.jit
def window_of(coords, b, qy, qx, known, level, RADIUS: tl.constexpr):
    """First lattice point and fraction of windows, and whether their coordinates are finite.

    Windows without coordinates, or with coordinates that are not finite, lie outside the map. Clamped before the cast:
    a coordinate far outside does not fit an integer.
    """
    place = coords.ptr + b * coords.b + (qy * coords.y + qx * coords.x)
    x = tl.load(place, mask=known, other=float("nan"))
    y = tl.load(place + coords.axis, mask=known, other=float("nan"))
    finite = (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
    x = tl.where(finite, x * level.shrink, -1.0e9)
    y = tl.where(finite, y * level.shrink, -1.0e9)
    x_lower, y_lower = tl.floor(x), tl.floor(y)
    x_first = tl.minimum(tl.maximum(x_lower, -RADIUS - 2.0), level.w + (RADIUS + 1.0)).to(tl.int32) - RADIUS
    y_first = tl.minimum(tl.maximum(y_lower, -RADIUS - 2.0), level.h + (RADIUS + 1.0)).to(tl.int32) - RADIUS
    return y_first, x_first, y - y_lower, x - x_lower, finite


@triton.jit
def tile_windows(coords, tile, b, level, RADIUS: tl.constexpr, TILE: tl.constexpr):
    """Queries of a tile: rows, columns, validity, first lattice point, and whether they see anything of the map."""
    K: tl.constexpr = 2 * RADIUS + 2
    qy, qx, known = tile_pixels(tile, level.H, level.W, TILE)
    y0, x0, _, _, _ = window_of(coords, b, qy, qx, known, level, RADIUS)
    seen = known & (y0 < level.h) & (y0 + K > 0) & (x0 < level.w) & (x0 + K > 0)
    return qy, qx, known, y0, x0, seen


@triton.jit
def span(first, seen, size, K: tl.constexpr):
    """First and end position, inside the map, of the windows that are seen; an empty range if none is."""
    begin = tl.min(tl.where(seen, first, size), 0)
    end = tl.max(tl.where(seen, first + K, 0), 0)
    return tl.maximum(begin, 0), tl.minimum(end, size)


@triton.jit
def band_of(y0, x0, seen, row, level, BY: tl.constexpr, K: tl.constexpr):
    """Windows that reach the rows row .. row + BY, and the range of columns that they see there."""
    in_band = seen & (y0 < row + BY) & (y0 + K > row)
    left, right = span(x0, in_band, level.w, K)
    return in_band, left, right


@triton.jit
def is_wanted(x0, in_band, column, BX: tl.constexpr, K: tl.constexpr):
    """Whether a window of the band reaches the columns column .. column + BX."""
    return tl.max((in_band & (x0 < column + BX) & (x0 + K > column)).to(tl.int32), 0) > 0


@triton.jit
def block_pixels(row, column, level, BY: tl.constexpr, BX: tl.constexpr):
    """Rows, columns and validity of the targets of a block."""
    target = tl.arange(0, BY * BX)
    ty, tx = row + target // BX, column + target % BX
    return ty, tx, (ty < level.h) & (tx < level.w)


@triton.jit
def diagonal(query, y0, x0, ty, tx, inside, K: tl.constexpr):
    """Offsets [queries, targets] of targets in the lattices of queries, and whether they are points of them."""
    ty = tl.where(inside, ty, FAR)
    offset = (query * (K * K) - y0 * K - x0)[:, None] + (ty * K + tx)[None, :]
    # Unsigned, a negative distance is a large one.
    dy, dx = (ty[None, :] - y0[:, None]).to(tl.uint32), (tx[None, :] - x0[:, None]).to(tl.uint32)
    return offset, (dy < K) & (dx < K)


@triton.jit
def point_of(coords, b, query, iy, ix, known, level, RADIUS: tl.constexpr):
    """Position of a lattice point in the map, the fraction of its window, and whether that has coordinates."""
    y0, x0, fy, fx, finite = window_of(coords, b, query // level.W, query % level.W, known, level, RADIUS)
    return y0 + iy, x0 + ix, fy, fx, finite
