"""Normalised and rotated rows, and the way back for their gradients.

A head of D dims is held as two halves of D / 2 columns that rotation pairs up: column c of the first half turns with
column c of the second by angle c (dims c and c + R); the dims that are not rotated fill up both halves. Prepared rows,
in tiles and in scratch memory, are the first half, filled up with zeros to HALF columns, and then the second.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)
LOG2_E = tl.constexpr(1.4426950408889634)
# Cosines bound the logits. Up to this, in units of log 2, their exponentials need no row's largest subtracted: in types
# with float32's range neither they nor their sums overflow, and none is lost.
LARGEST_EXPONENT = tl.constexpr(64.0)
HALF_PI_INVERSE = tl.constexpr(0.6366197723675814)
# pi / 2 in three parts; the first two have so few bits that their products with a quadrant number are exact.
HALF_PI_1 = tl.constexpr(1.5703125)
HALF_PI_2 = tl.constexpr(4.837512969970703e-4)
HALF_PI_3 = tl.constexpr(7.549789948768648e-8)


class Rows(NamedTuple):
    """A tensor [B, H, N, columns], or one head of it, as kernels take it."""

    ptr: Any
    b: Any
    """Stride from item to item, in elements; h, n, d likewise."""
    h: Any
    n: Any
    d: Any


class Head(NamedTuple):
    """Compile-time facts of a head."""

    D: int
    """Dims."""
    R: int
    """Angles; 2 R dims turn."""
    HALF: int
    """Columns of a half in a tile: D / 2 up to a power of two."""
    RUN: int
    """Neighbouring dims stay neighbours in a half in runs of this many, which begin at multiples of it."""
    WIDTH: int
    """Columns of a tile: 2 HALF."""
    ALIGN: int
    """Rows of all tensors but angles begin at multiples of this many elements."""


@triton.jit
def head_of(x, b, h, ALIGN: tl.constexpr):
    """One head of `Rows`."""
    offset = b.to(tl.int64) * x.b + h.to(tl.int64) * x.h
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
    return Rows(x.ptr + offset, x.b, x.h, x.n, x.d)


@triton.jit
def pointers(x, rows, columns, ALIGN: tl.constexpr):
    """[rows, columns] of a head."""
    offsets = rows.to(tl.int64) * x.n
    if ALIGN > 1:
        offsets = tl.multiple_of(offsets, ALIGN)
    return x.ptr + offsets[:, None] + columns[None, :] * x.d


@triton.jit
def load_tile(x, rows, in_rows, HEAD: tl.constexpr):
    """[rows, WIDTH] of a head in the order of its dims, 0 outside."""
    columns = tl.arange(0, HEAD.WIDTH)
    return tl.load(
        pointers(x, rows, columns, HEAD.ALIGN), mask=in_rows[:, None] & (columns < HEAD.D)[None, :], other=0.0
    )


@triton.jit
def store_tile(x, value, rows, in_rows, HEAD: tl.constexpr):
    columns = tl.arange(0, HEAD.WIDTH)
    mask = in_rows[:, None] & (columns < HEAD.D)[None, :]
    tl.store(pointers(x, rows, columns, HEAD.ALIGN), value.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def joined(first, second, HEAD: tl.constexpr):
    """[rows, WIDTH] from its halves."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (first.shape[0], HEAD.WIDTH))


@triton.jit
def tile_of(ptr, rows, STRIDE: tl.constexpr, HEAD: tl.constexpr):
    """Pointers to rows of scratch memory [rows, STRIDE]: [rows, WIDTH]."""
    return ptr + rows[:, None] * STRIDE + tl.arange(0, HEAD.WIDTH)[None, :]


@triton.jit
def load_halves(ptr, rows, STRIDE: tl.constexpr, HEAD: tl.constexpr):
    """Both halves of rows of scratch memory [rows, STRIDE]."""
    places = ptr + rows[:, None] * STRIDE + tl.arange(0, HEAD.HALF)[None, :]
    return tl.load(places), tl.load(places + HEAD.HALF)


@triton.jit
def strength_of(scale_ptr, h):
    """What multiplies a head's cosines: |s| + 1e-6."""
    return tl.abs(tl.load(scale_ptr + h)) + EPS


@triton.jit
def turns_of(theta, b, h, rows, in_rows, HEAD: tl.constexpr):
    """Sine and cosine of some rows' angles [rows, HALF]; columns from R on do not turn. Costs more than a product."""
    if HEAD.R > 0:
        c = tl.arange(0, HEAD.HALF)
        places = pointers(head_of(theta, b, h, 1), rows, c, 1)
        angle = tl.load(places, mask=in_rows[:, None] & (c < HEAD.R)[None, :], other=0.0)
        sin, cos = _sin_cos(angle.to(tl.float32))
    else:
        sin, cos = 0.0, 1.0
    return sin, cos


@triton.jit
def unit_rotated(x, sin, cos, rows, in_rows, HEAD: tl.constexpr):
    """Both halves of some rows of a head, normalised and rotated, float32; and the factor that normalised them."""
    first, second, valid = _half_columns(HEAD)
    keep = in_rows[:, None] & valid[None, :]
    x1 = tl.load(pointers(x, rows, first, HEAD.ALIGN), mask=keep, other=0.0).to(tl.float32)
    x2 = tl.load(pointers(x, rows, second, HEAD.ALIGN), mask=keep, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) + EPS)
    x1 = x1 * inverse[:, None]
    x2 = x2 * inverse[:, None]
    if HEAD.R > 0:
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
    else:
        y1 = x1
        y2 = x2
    return y1, y2, inverse


@triton.jit
def store_input_gradient(gradient, sin, cos, g1, g2, y1, y2, factor, rows, writable, HEAD: tl.constexpr):
    """From the gradient g of the normalised, rotated rows y to that of the rows as given; returns <g, y> per row.

    With y = rotate(x * inverse): dx = factor * unrotate(g - y <g, y>), where factor = inverse times what multiplies y.
    """
    along = tl.sum(g1 * y1 + g2 * y2, axis=1)
    g1 = (g1 - y1 * along[:, None]) * factor[:, None]
    g2 = (g2 - y2 * along[:, None]) * factor[:, None]
    if HEAD.R > 0:
        x1 = g1 * cos + g2 * sin
        x2 = g2 * cos - g1 * sin
    else:
        x1 = g1
        x2 = g2
    first, second, valid = _half_columns(HEAD)
    keep = writable[:, None] & valid[None, :]
    tl.store(pointers(gradient, rows, first, HEAD.ALIGN), x1.to(gradient.ptr.dtype.element_ty), mask=keep)
    tl.store(pointers(gradient, rows, second, HEAD.ALIGN), x2.to(gradient.ptr.dtype.element_ty), mask=keep)
    return along


@triton.jit
def prepare_keys_kernel(
    k,  # Rows [B, H, M, D]
    v,  # Rows [B, H, M, D]
    theta_k,  # Rows [B, H, M, R], or None
    prepared_ptr,  # [B, H, padded, WIDTH], contiguous: written
    values_ptr,  # [B, H, padded, WIDTH], contiguous: written; None where v itself has WIDTH columns
    lengths,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Shared keys, normalised and rotated once for all the rows that meet them; zeros behind the last.

    Their values too, with zeros up to the width of a tile: loops then load whole rows.
    """
    blocks = lengths.padded // BLOCK
    head = tl.program_id(0) // blocks
    b, h = head // lengths.H, head % lengths.H
    rows = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    in_rows = rows < lengths.num_shared
    sin, cos = turns_of(theta_k, b, h, rows, in_rows, HEAD)
    y1, y2, _ = unit_rotated(head_of(k, b, h, HEAD.ALIGN), sin, cos, rows, in_rows, HEAD)
    before = head.to(tl.int64) * lengths.padded * HEAD.WIDTH
    store_prepared(prepared_ptr + before, y1, y2, rows, HEAD.WIDTH, HEAD)
    if values_ptr is not None:
        values = load_tile(head_of(v, b, h, HEAD.ALIGN), rows, in_rows, HEAD)
        tl.store(tile_of(values_ptr + before, rows, HEAD.WIDTH, HEAD), values.to(values_ptr.dtype.element_ty))


@triton.jit
def store_prepared(prepared_ptr, y1, y2, rows, STRIDE: tl.constexpr, HEAD: tl.constexpr):
    """Prepared rows of one head into scratch memory [rows, STRIDE]."""
    places = prepared_ptr + rows[:, None] * STRIDE + tl.arange(0, HEAD.HALF)[None, :]
    tl.store(places, y1.to(prepared_ptr.dtype.element_ty))
    tl.store(places + HEAD.HALF, y2.to(prepared_ptr.dtype.element_ty))


@triton.jit
def _half_columns(HEAD: tl.constexpr):
    """Dims of the first and second half, and which of the HALF columns exist."""
    c = tl.arange(0, HEAD.HALF)
    if HEAD.R == 0 or 2 * HEAD.R == HEAD.D:
        first = c
        second = c + HEAD.D // 2
    else:
        first = _in_runs(tl.where(c < HEAD.R, c, c + HEAD.R), HEAD.RUN)
        second = _in_runs(tl.where(c < HEAD.R, c + HEAD.R, c + HEAD.D // 2), HEAD.RUN)
    return first, second, c < HEAD.D // 2


@triton.jit
def _in_runs(columns, RUN: tl.constexpr):
    """Tells the compiler what it does not see: runs of RUN neighbouring dims, from multiples of RUN on."""
    return tl.max_contiguous(tl.multiple_of(columns, RUN), RUN)


@triton.jit
def _sin_cos(angle):
    """Sine and cosine to 2e-7 for |angle| up to 10^4; without the branches and local memory of the library's."""
    quadrant = tl.floor(angle * HALF_PI_INVERSE + 0.5)
    x = ((angle - quadrant * HALF_PI_1) - quadrant * HALF_PI_2) - quadrant * HALF_PI_3
    square = x * x
    # Taylor series on [-pi/4, pi/4]: the first terms left out are 2e-9 and 3e-8.
    sin = x + x * square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880))))
    cos = 1 + square * (-0.5 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    turns = quadrant.to(tl.int32)
    odd = (turns & 1) != 0
    swapped_sin = tl.where(odd, cos, sin)
    swapped_cos = tl.where(odd, sin, cos)
    sin = tl.where((turns & 2) != 0, -swapped_sin, swapped_sin)
    cos = tl.where(((turns + 1) & 2) != 0, -swapped_cos, swapped_cos)
    return sin, cos
