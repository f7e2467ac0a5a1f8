"""Where blocks of pixels and the strips around them lie, inside kernels.

A block is SIDE x SIDE pixels; the windows of its pixels cover a rectangle of (SIDE + 2 RADIUS)^2, which is cut into
NUM_STRIPS strips of ROWS rows of WIDTH pixels. Places are counted from the block's corner, or from the rectangle's,
which lies RADIUS pixels before it both ways, so that offsets are small and sums of a pixel's and a neighbour's part.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(number, height, width, SIDE: tl.constexpr):
    """(batch item, y, x) of the corner of a block, blocks being counted along x, then y, then the batch."""
    tiles_x = (width + SIDE - 1) // SIDE
    tiles_y = (height + SIDE - 1) // SIDE
    batch = (number // (tiles_x * tiles_y)).to(tl.int64)
    return batch, number // tiles_x % tiles_y * SIDE, number % tiles_x * SIDE


@triton.jit
def pixels_of_block(y0, x0, height, width, SIDE: tl.constexpr):
    """(y, x) of the pixels [SIDE^2] from the corner, and which lie inside the image."""
    m = tl.arange(0, SIDE * SIDE)
    my, mx = m // SIDE, m % SIDE
    return my, mx, (y0 + my < height) & (x0 + mx < width)


@triton.jit
def pixels_of_strip(strip, y0, x0, height, width, RADIUS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(y, x) of the pixels [ROWS * WIDTH] of a strip from the rectangle's corner, and which lie inside the image."""
    n = tl.arange(0, WIDTH * ROWS)
    ny, nx = strip * ROWS + n // WIDTH, n % WIDTH
    y, x = y0 - RADIUS + ny, x0 - RADIUS + nx
    return ny, nx, (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def in_window(my, mx, ny, nx, RADIUS: tl.constexpr):
    """Which pixels of a strip [N] lie in the windows of which pixels of a block [M]: [M, N]."""
    dy, dx = ny[None, :] - my[:, None], nx[None, :] - mx[:, None]
    window: tl.constexpr = 2 * RADIUS + 1
    return (dy >= 0) & (dy < window) & (dx >= 0) & (dx < window)


@triton.jit
def corner(map, batch, y, x):
    """A pointer to the first channel of a pixel, which may lie outside."""
    return map.ptr + (batch * map.b + y.to(tl.int64) * map.y + x.to(tl.int64) * map.x)


@triton.jit
def wide(index, WIDE: tl.constexpr):
    """An index that, times a stride, may leave 32 bits."""
    return index.to(tl.int64) if WIDE else index


@triton.jit
def features_of(pixels, known, stride_c, first, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """Channels from `first` on of pixels that pointers [P] lead to, 0 for unknown ones: [P, BLOCK_C]."""
    c = first + tl.arange(0, BLOCK_C)
    mask = known[:, None]
    if CHANNELS % BLOCK_C != 0:
        mask = mask & (c < CHANNELS)[None, :]
    return tl.load(pixels[:, None] + (wide(c, WIDE) * stride_c)[None, :], mask, other=0.0)
