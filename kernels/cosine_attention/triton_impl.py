"""Cosine attention on a GPU: normalisation, rotation, scale and attention in one Triton kernel.

Every row starts from its own key and then meets the keys below its limit, block by block, so that blocks nobody may see
are never touched and no row is ever without a key. The backward needs two kernels and no atomics: one walks over rows
(gradients of q, of the scale, and of keys that only their own row sees), the other over the keys that other rows see.

A head of D dims is held as two halves of D / 2 columns that rotation pairs up: column c of the first half turns with
column c of the second by angle c (dims c and c + R); the dims that are not rotated fill up both halves.

Shapes: B batch, H heads, N rows, M keys, D head size, R angles, P pokes, n queries per poke.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinema.kernels.ahead_of_time import Case
from kinema.kernels.cosine_attention.patterns import AttentionPattern
from kinema.kernels.dispatch import INTERPRETING

FULL = tl.constexpr(0)
CAUSAL = tl.constexpr(1)
QUERY_CAUSAL = tl.constexpr(2)
QUERY_INFERENCE = tl.constexpr(3)
_KIND_CODES = {"full": 0, "causal": 1, "query_causal": 2, "query_inference": 3}
EPS = tl.constexpr(1e-6)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
HALF_PI_INVERSE = tl.constexpr(0.6366197723675814)
# pi / 2 in three parts; the first two have so few bits that their products with a quadrant number are exact.
HALF_PI_1 = tl.constexpr(1.5703125)
HALF_PI_2 = tl.constexpr(4.837512969970703e-4)
HALF_PI_3 = tl.constexpr(7.549789948768648e-8)


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


@triton.jit
def _head(pointer, b, h, stride_b, stride_h):
    return pointer + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def _load(pointer, rows, columns, keep, stride_n, stride_d):
    """[rows, columns] of one head; 0 where not kept."""
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    return tl.load(pointer + offsets, mask=keep, other=0.0)


@triton.jit
def _store(pointer, value, rows, columns, keep, stride_n, stride_d):
    offsets = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    tl.store(pointer + offsets, value, mask=keep)


@triton.jit
def _half_columns(D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, RUN: tl.constexpr):
    """Dims of the first and second half, and which of the HALF columns exist."""
    c = tl.arange(0, HALF)
    if R == 0 or 2 * R == D:
        first = c
        second = c + D // 2
    else:
        first = _in_runs(tl.where(c < R, c, c + R), RUN)
        second = _in_runs(tl.where(c < R, c + R, c + D // 2), RUN)
    return first, second, c < D // 2


@triton.jit
def _in_runs(columns, RUN: tl.constexpr):
    """Tells the compiler what it does not see: runs of RUN neighbouring dims, from multiples of RUN on."""
    return tl.max_contiguous(tl.multiple_of(columns, RUN), RUN)


@triton.jit
def _angles(theta_ptr, rows, in_rows, stride_n, stride_r, R: tl.constexpr, HALF: tl.constexpr):
    """Sine and cosine per row and column; columns from R on do not turn."""
    c = tl.arange(0, HALF)
    theta = _load(theta_ptr, rows, c, in_rows[:, None] & (c < R)[None, :], stride_n, stride_r)
    return _sin_cos(theta.to(tl.float32))


@triton.jit
def _unit_rotated(
    x_ptr,  # one head of [B, H, N, D]
    theta_ptr,  # one head of [B, H, N, R]
    rows,
    in_rows,
    stride_n,
    stride_d,
    theta_stride_n,
    theta_stride_r,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
):
    """Both halves of some rows, normalised and rotated, float32; and the factor that normalised them."""
    first, second, valid = _half_columns(D, R, HALF, RUN)
    keep = in_rows[:, None] & valid[None, :]
    x1 = _load(x_ptr, rows, first, keep, stride_n, stride_d).to(tl.float32)
    x2 = _load(x_ptr, rows, second, keep, stride_n, stride_d).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) + EPS)
    x1 = x1 * inverse[:, None]
    x2 = x2 * inverse[:, None]
    if R > 0:
        sin, cos = _angles(theta_ptr, rows, in_rows, theta_stride_n, theta_stride_r, R, HALF)
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
    else:
        y1 = x1
        y2 = x2
    return y1, y2, inverse


@triton.jit
def _store_input_gradient(
    gradient_ptr,  # one head of [B, H, N, D]
    theta_ptr,  # one head of [B, H, N, R]
    g1,
    g2,
    y1,
    y2,
    factor,
    rows,
    in_rows,
    writable,
    stride_n,
    stride_d,
    theta_stride_n,
    theta_stride_r,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
):
    """From the gradient g of the normalised, rotated rows y to that of the rows as given; returns <g, y> per row.

    With y = rotate(x * inverse): dx = factor * unrotate(g - y <g, y>), where factor = inverse times what multiplies y.
    """
    along = tl.sum(g1 * y1 + g2 * y2, axis=1)
    g1 = (g1 - y1 * along[:, None]) * factor[:, None]
    g2 = (g2 - y2 * along[:, None]) * factor[:, None]
    if R > 0:
        sin, cos = _angles(theta_ptr, rows, in_rows, theta_stride_n, theta_stride_r, R, HALF)
        x1 = g1 * cos + g2 * sin
        x2 = g2 * cos - g1 * sin
    else:
        x1 = g1
        x2 = g2
    first, second, valid = _half_columns(D, R, HALF, RUN)
    keep = writable[:, None] & valid[None, :]
    _store(gradient_ptr, x1, rows, first, keep, stride_n, stride_d)
    _store(gradient_ptr, x2, rows, second, keep, stride_n, stride_d)
    return along


@triton.jit
def _limits(rows, M, P, n, KIND: tl.constexpr):
    """Number of keys from the front that each row sees, itself not counted."""
    if KIND == FULL:
        limits = rows * 0 + M
    elif KIND == CAUSAL:
        limits = rows
    elif KIND == QUERY_CAUSAL:
        limits = tl.where(rows < P, rows, (rows - P) // n)
    else:
        limits = tl.where(rows < P, rows, P)
    return limits


@triton.jit
def _largest_limit(first, last, M, P, n, KIND: tl.constexpr):
    """The largest limit among rows first..last: limits rise over the pokes, and again over the queries."""
    if KIND == FULL:
        largest = M
    elif KIND == CAUSAL:
        largest = last
    else:
        of_pokes = tl.where(first < P, tl.minimum(last, P - 1), 0)
        largest = tl.maximum(of_pokes, _limits(last, M, P, n, KIND))
    return largest


@triton.jit
def _logits(q1, q2, k1, k2, PRECISION: tl.constexpr):
    partial = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    return tl.dot(q2, tl.trans(k2), partial, input_precision=PRECISION)


@triton.jit
def _forward_kernel(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, H, M, D]
    v_ptr,  # [B, H, M, D]
    theta_q_ptr,  # [B, H, N, R]
    theta_k_ptr,  # [B, H, M, R]
    scale_ptr,  # [H]
    out_ptr,  # [B, H, N, D]
    lse_ptr,  # [B, H, N], contiguous: log2 of the sum of exponentials of the logits
    q_b, q_h, q_n, q_d,
    k_b, k_h, k_n, k_d,
    v_b, v_h, v_n, v_d,
    tq_b, tq_h, tq_n, tq_r,
    tk_b, tk_h, tk_n, tk_r,
    scale_h,
    o_b, o_h, o_n, o_d,
    H, N, M, P, n,
    KIND: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(N, BLOCK_ROWS)
    head = tl.program_id(0) // num_blocks
    b, h = head // H, head % H
    start = (tl.program_id(0) % num_blocks) * BLOCK_ROWS
    rows = start + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < N
    columns = tl.arange(0, WIDTH)
    q_ptr = _head(q_ptr, b, h, q_b, q_h)
    k_ptr = _head(k_ptr, b, h, k_b, k_h)
    v_ptr = _head(v_ptr, b, h, v_b, v_h)
    theta_q_ptr = _head(theta_q_ptr, b, h, tq_b, tq_h)
    theta_k_ptr = _head(theta_k_ptr, b, h, tk_b, tk_h)
    strength = (tl.abs(tl.load(scale_ptr + h * scale_h).to(tl.float32)) + EPS) * LOG2_E

    q1, q2, q_inverse = _unit_rotated(q_ptr, theta_q_ptr, rows, in_rows, q_n, q_d, tq_n, tq_r, D, R, HALF, RUN)
    q1 = q1 * strength
    q2 = q2 * strength
    if KIND == FULL:
        top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
    else:
        own1, own2, own_inverse = _unit_rotated(
            k_ptr, theta_k_ptr, rows, in_rows, k_n, k_d, tk_n, tk_r, D, R, HALF, RUN
        )
        top = tl.sum(q1 * own1 + q2 * own2, axis=1)
        total = tl.full([BLOCK_ROWS], 1.0, tl.float32)
        acc = _load(v_ptr, rows, columns, in_rows[:, None] & (columns < D)[None, :], v_n, v_d).to(tl.float32)
    q1 = q1.to(DOT_DTYPE)
    q2 = q2.to(DOT_DTYPE)

    limits = _limits(rows, M, P, n, KIND)
    stop = _largest_limit(start, tl.minimum(start + BLOCK_ROWS, N) - 1, M, P, n, KIND)
    for key in range(0, stop, BLOCK_KEYS):
        keys = key + tl.arange(0, BLOCK_KEYS)
        in_keys = keys < M
        k1, k2, k_inverse = _unit_rotated(k_ptr, theta_k_ptr, keys, in_keys, k_n, k_d, tk_n, tk_r, D, R, HALF, RUN)
        logits = _logits(q1, q2, k1.to(DOT_DTYPE), k2.to(DOT_DTYPE), PRECISION)
        logits = tl.where(keys[None, :] < limits[:, None], logits, float("-inf"))
        raised = tl.maximum(top, tl.max(logits, axis=1))
        weights = tl.exp2(logits - raised[:, None])
        fade = tl.exp2(top - raised)
        total = total * fade + tl.sum(weights, axis=1)
        v = _load(v_ptr, keys, columns, in_keys[:, None] & (columns < D)[None, :], v_n, v_d).to(DOT_DTYPE)
        acc = tl.dot(weights.to(DOT_DTYPE), v, acc * fade[:, None], input_precision=PRECISION)
        top = raised

    out_ptr = _head(out_ptr, b, h, o_b, o_h)
    keep = in_rows[:, None] & (columns < D)[None, :]
    _store(out_ptr, acc / total[:, None], rows, columns, keep, o_n, o_d)
    tl.store(lse_ptr + head.to(tl.int64) * N + rows, top + tl.log2(total), mask=in_rows)


@triton.jit
def _backward_rows_kernel(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, H, M, D]
    v_ptr,  # [B, H, M, D]
    theta_q_ptr,  # [B, H, N, R]
    theta_k_ptr,  # [B, H, M, R]
    scale_ptr,  # [H]
    out_ptr,  # [B, H, N, D]
    dout_ptr,  # [B, H, N, D]
    lse_ptr,  # [B, H, N], contiguous
    delta_ptr,  # [B, H, N], contiguous: written, <dout, out> per row
    dq_ptr,  # [B, H, N, D]: written
    dk_ptr,  # [B, H, M, D]: written for queries, whose keys no other row sees
    dv_ptr,  # [B, H, M, D]: written for queries
    dscale_ptr,  # [B, H, blocks], contiguous: written, this block's share of the gradient of |s|
    q_b, q_h, q_n, q_d,
    k_b, k_h, k_n, k_d,
    v_b, v_h, v_n, v_d,
    tq_b, tq_h, tq_n, tq_r,
    tk_b, tk_h, tk_n, tk_r,
    scale_h,
    o_b, o_h, o_n, o_d,
    do_b, do_h, do_n, do_d,
    dq_b, dq_h, dq_n, dq_d,
    dk_b, dk_h, dk_n, dk_d,
    dv_b, dv_h, dv_n, dv_d,
    H, N, M, P, n,
    KIND: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(N, BLOCK_ROWS)
    head = tl.program_id(0) // num_blocks
    b, h = head // H, head % H
    start = (tl.program_id(0) % num_blocks) * BLOCK_ROWS
    rows = start + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < N
    columns = tl.arange(0, WIDTH)
    keep = in_rows[:, None] & (columns < D)[None, :]
    q_ptr = _head(q_ptr, b, h, q_b, q_h)
    k_ptr = _head(k_ptr, b, h, k_b, k_h)
    v_ptr = _head(v_ptr, b, h, v_b, v_h)
    theta_q_ptr = _head(theta_q_ptr, b, h, tq_b, tq_h)
    theta_k_ptr = _head(theta_k_ptr, b, h, tk_b, tk_h)
    strength = tl.abs(tl.load(scale_ptr + h * scale_h).to(tl.float32)) + EPS
    row_offset = head.to(tl.int64) * N
    lse = tl.load(lse_ptr + row_offset + rows, mask=in_rows, other=0.0)
    dout_ptr = _head(dout_ptr, b, h, do_b, do_h)
    dout = _load(dout_ptr, rows, columns, keep, do_n, do_d)
    out = _load(_head(out_ptr, b, h, o_b, o_h), rows, columns, keep, o_n, o_d)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)

    q1, q2, q_inverse = _unit_rotated(q_ptr, theta_q_ptr, rows, in_rows, q_n, q_d, tq_n, tq_r, D, R, HALF, RUN)
    q1 = q1 * (strength * LOG2_E)
    q2 = q2 * (strength * LOG2_E)
    if KIND == FULL:
        dq1 = tl.zeros([BLOCK_ROWS, HALF], tl.float32)
        dq2 = tl.zeros([BLOCK_ROWS, HALF], tl.float32)
    else:
        own1, own2, own_inverse = _unit_rotated(
            k_ptr, theta_k_ptr, rows, in_rows, k_n, k_d, tk_n, tk_r, D, R, HALF, RUN
        )
        weight = tl.exp2(tl.sum(q1 * own1 + q2 * own2, axis=1) - lse)
        v_own = _load(v_ptr, rows, columns, keep, v_n, v_d).to(tl.float32)
        dlogit = weight * (tl.sum(dout.to(tl.float32) * v_own, axis=1) - delta)
        dq1 = dlogit[:, None] * own1
        dq2 = dlogit[:, None] * own2
    q1 = q1.to(DOT_DTYPE)
    q2 = q2.to(DOT_DTYPE)
    dout = dout.to(DOT_DTYPE)

    limits = _limits(rows, M, P, n, KIND)
    stop = _largest_limit(start, tl.minimum(start + BLOCK_ROWS, N) - 1, M, P, n, KIND)
    for key in range(0, stop, BLOCK_KEYS):
        keys = key + tl.arange(0, BLOCK_KEYS)
        in_keys = keys < M
        k1, k2, k_inverse = _unit_rotated(k_ptr, theta_k_ptr, keys, in_keys, k_n, k_d, tk_n, tk_r, D, R, HALF, RUN)
        k1 = k1.to(DOT_DTYPE)
        k2 = k2.to(DOT_DTYPE)
        logits = _logits(q1, q2, k1, k2, PRECISION)
        weights = tl.where(keys[None, :] < limits[:, None], tl.exp2(logits - lse[:, None]), 0.0)
        v = _load(v_ptr, keys, columns, in_keys[:, None] & (columns < D)[None, :], v_n, v_d).to(DOT_DTYPE)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dlogits = (weights * (dweights - delta[:, None])).to(DOT_DTYPE)
        dq1 = tl.dot(dlogits, k1, dq1, input_precision=PRECISION)
        dq2 = tl.dot(dlogits, k2, dq2, input_precision=PRECISION)

    # A store between equal loads keeps the compiler from holding the first results in registers throughout the loop.
    tl.store(delta_ptr + row_offset + rows, delta, mask=in_rows)
    q1, q2, q_inverse = _unit_rotated(q_ptr, theta_q_ptr, rows, in_rows, q_n, q_d, tq_n, tq_r, D, R, HALF, RUN)
    along = _store_input_gradient(
        _head(dq_ptr, b, h, dq_b, dq_h), theta_q_ptr, dq1, dq2, q1, q2, q_inverse * strength,
        rows, in_rows, in_rows, dq_n, dq_d, tq_n, tq_r, D, R, HALF, RUN,
    )  # fmt: skip
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(along, axis=0))
    if KIND == QUERY_CAUSAL or KIND == QUERY_INFERENCE:
        is_query = in_rows & (rows >= P)
        dv = weight[:, None] * _load(dout_ptr, rows, columns, keep, do_n, do_d).to(tl.float32)
        _store(_head(dv_ptr, b, h, dv_b, dv_h), dv, rows, columns, keep & is_query[:, None], dv_n, dv_d)
        own1, own2, own_inverse = _unit_rotated(
            k_ptr, theta_k_ptr, rows, in_rows, k_n, k_d, tk_n, tk_r, D, R, HALF, RUN
        )
        dlogit = dlogit * strength
        _store_input_gradient(
            _head(dk_ptr, b, h, dk_b, dk_h), theta_k_ptr, dlogit[:, None] * q1, dlogit[:, None] * q2,
            own1, own2, own_inverse, rows, in_rows, is_query, dk_n, dk_d, tk_n, tk_r, D, R, HALF, RUN,
        )  # fmt: skip


@triton.jit
def _backward_keys_kernel(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, H, M, D]
    v_ptr,  # [B, H, M, D]
    theta_q_ptr,  # [B, H, N, R]
    theta_k_ptr,  # [B, H, M, R]
    scale_ptr,  # [H]
    dout_ptr,  # [B, H, N, D]
    lse_ptr,  # [B, H, N], contiguous
    delta_ptr,  # [B, H, N], contiguous
    dk_ptr,  # [B, H, M, D]: written below num_keys
    dv_ptr,  # [B, H, M, D]: written below num_keys
    q_b, q_h, q_n, q_d,
    k_b, k_h, k_n, k_d,
    v_b, v_h, v_n, v_d,
    tq_b, tq_h, tq_n, tq_r,
    tk_b, tk_h, tk_n, tk_r,
    scale_h,
    do_b, do_h, do_n, do_d,
    dk_b, dk_h, dk_n, dk_d,
    dv_b, dv_h, dv_n, dv_d,
    H, N, M, P, n,
    num_keys,
    KIND: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(num_keys, BLOCK_KEYS)
    head = tl.program_id(0) // num_blocks
    b, h = head // H, head % H
    start = (tl.program_id(0) % num_blocks) * BLOCK_KEYS
    keys = start + tl.arange(0, BLOCK_KEYS)
    in_keys = keys < num_keys
    columns = tl.arange(0, WIDTH)
    keep = in_keys[:, None] & (columns < D)[None, :]
    q_ptr = _head(q_ptr, b, h, q_b, q_h)
    dout_ptr = _head(dout_ptr, b, h, do_b, do_h)
    k_ptr = _head(k_ptr, b, h, k_b, k_h)
    theta_q_ptr = _head(theta_q_ptr, b, h, tq_b, tq_h)
    theta_k_ptr = _head(theta_k_ptr, b, h, tk_b, tk_h)
    strength = (tl.abs(tl.load(scale_ptr + h * scale_h).to(tl.float32)) + EPS) * LOG2_E
    row_offset = head.to(tl.int64) * N

    k1, k2, k_inverse = _unit_rotated(k_ptr, theta_k_ptr, keys, in_keys, k_n, k_d, tk_n, tk_r, D, R, HALF, RUN)
    k1 = k1.to(DOT_DTYPE)
    k2 = k2.to(DOT_DTYPE)
    v = _load(_head(v_ptr, b, h, v_b, v_h), keys, columns, keep, v_n, v_d).to(DOT_DTYPE)
    dk1 = tl.zeros([BLOCK_KEYS, HALF], tl.float32)
    dk2 = tl.zeros([BLOCK_KEYS, HALF], tl.float32)
    dv = tl.zeros([BLOCK_KEYS, WIDTH], tl.float32)

    # Rows that see a key of this block: one range of rows, or one of pokes and one of queries.
    if KIND == FULL:
        first_poke, stop_pokes, first_query = 0, N, N
    elif KIND == CAUSAL:
        first_poke, stop_pokes, first_query = start, N, N
    elif KIND == QUERY_CAUSAL:
        first_poke, stop_pokes, first_query = start, P, P + (start + 1) * n
    else:
        first_poke, stop_pokes, first_query = start, P, P
    poke_blocks = tl.cdiv(stop_pokes - first_poke, BLOCK_ROWS)
    query_blocks = tl.cdiv(tl.maximum(N - first_query, 0), BLOCK_ROWS)
    for block in range(0, poke_blocks + query_blocks):
        is_poke = block < poke_blocks
        row = tl.where(is_poke, first_poke + block * BLOCK_ROWS, first_query + (block - poke_blocks) * BLOCK_ROWS)
        rows = row + tl.arange(0, BLOCK_ROWS)
        in_rows = rows < tl.where(is_poke, stop_pokes, N)
        q1, q2, q_inverse = _unit_rotated(q_ptr, theta_q_ptr, rows, in_rows, q_n, q_d, tq_n, tq_r, D, R, HALF, RUN)
        q1 = (q1 * strength).to(DOT_DTYPE)
        q2 = (q2 * strength).to(DOT_DTYPE)
        lse = tl.load(lse_ptr + row_offset + rows, mask=in_rows, other=0.0)
        delta = tl.load(delta_ptr + row_offset + rows, mask=in_rows, other=0.0)
        dout = _load(dout_ptr, rows, columns, in_rows[:, None] & (columns < D)[None, :], do_n, do_d).to(DOT_DTYPE)
        visible = keys[:, None] < _limits(rows, M, P, n, KIND)[None, :]
        if KIND != FULL:
            visible = visible | (keys[:, None] == rows[None, :])
        logits = _logits(k1, k2, q1, q2, PRECISION)  # [keys, rows]
        weights = tl.where(visible & in_rows[None, :], tl.exp2(logits - lse[None, :]), 0.0)
        dv = tl.dot(weights.to(DOT_DTYPE), dout, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dlogits = (weights * (dweights - delta[None, :])).to(DOT_DTYPE)
        dk1 = tl.dot(dlogits, q1, dk1, input_precision=PRECISION)
        dk2 = tl.dot(dlogits, q2, dk2, input_precision=PRECISION)

    _store(_head(dv_ptr, b, h, dv_b, dv_h), dv, keys, columns, keep, dv_n, dv_d)
    k1, k2, k_inverse = _unit_rotated(k_ptr, theta_k_ptr, keys, in_keys, k_n, k_d, tk_n, tk_r, D, R, HALF, RUN)
    _store_input_gradient(
        _head(dk_ptr, b, h, dk_b, dk_h), theta_k_ptr, dk1 * LN_2, dk2 * LN_2, k1, k2, k_inverse,
        keys, in_keys, in_keys, dk_n, dk_d, tk_n, tk_r, D, R, HALF, RUN,
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of a kernel."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int = 2


# By kernel, whether operands are 16 bits wide, and whether a head is padded to more than 64 columns: the largest tiles
# that keep everything in registers on compute capability 8.0 and 9.0, where rows of "full" have no own key to handle.
CONFIGS = {
    ("forward", True, False): Config(128, 64, 8),
    ("forward", True, True): Config(128, 64, 8),
    ("forward", False, False): Config(32, 32, 4),
    ("forward", False, True): Config(32, 32, 4, 1),
    ("rows", True, False): Config(128, 64, 8),
    ("rows", True, True): Config(32, 32, 8, 1),
    ("rows full", True, True): Config(128, 32, 8),
    ("rows", False, False): Config(32, 16, 4, 1),
    ("rows", False, True): Config(16, 16, 8, 1),
    ("keys", True, False): Config(32, 64, 4),
    ("keys", True, True): Config(32, 32, 4),
    ("keys", False, False): Config(32, 16, 4, 1),
    ("keys", False, True): Config(16, 16, 8, 1),
}


def padded_head(D: int) -> tuple[int, int]:
    """Columns that a half and a whole head take in a tile: powers of two, at least a matrix instruction's 16."""
    return max(16, triton.next_power_of_2(D // 2)), max(16, triton.next_power_of_2(D))


def choose_config(kernel: str, dtype: torch.dtype, kind: str, D: int) -> Config:
    """What a kernel runs with."""
    size = (dtype != torch.float32, padded_head(D)[1] > 64)
    return CONFIGS.get((f"{kernel} {kind}", *size)) or CONFIGS[kernel, *size]


def _constants(kernel: str, dtype: torch.dtype, pattern: AttentionPattern, D: int, R: int) -> dict[str, Any]:
    """Compile-time arguments and launch options."""
    config = choose_config(kernel, dtype, pattern.kind, D)
    half, width = padded_head(D)
    # The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
    operand = torch.float32 if INTERPRETING and dtype == torch.bfloat16 else dtype
    return {
        "KIND": _KIND_CODES[pattern.kind],
        "D": D,
        "R": R,
        "HALF": half,
        "RUN": math.gcd(R, D // 2, 16),
        "WIDTH": width,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_KEYS": config.block_keys,
        "DOT_DTYPE": _TRITON_DTYPES[operand],
        "PRECISION": "tf32x3",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _angles_or_none(theta_q: Tensor | None, theta_k: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, int]:
    """Angles of queries and keys at full size, with stride 0 where they repeat, and their number R.

    None beside angles becomes zeros. Without any, R is 0 and the tensors are stand-ins that are never read.
    """
    given = theta_q if theta_q is not None else theta_k
    if given is None:
        return q, k, 0
    R = given.shape[-1]
    still = given.new_zeros(())
    expanded = [
        (still if theta is None else theta).expand(*x.shape[:3], R) for theta, x in ((theta_q, q), (theta_k, k))
    ]
    return expanded[0], expanded[1], R


def _as_pattern(kind: str, num_pokes: int, N: int) -> AttentionPattern:
    """Pokes alone are a causal sequence; without this, their groups would have no queries to divide by."""
    if kind in ("query_causal", "query_inference") and N == num_pokes:
        return AttentionPattern("causal")
    return AttentionPattern(kind, num_pokes)


def _sizes(q: Tensor, k: Tensor, pattern: AttentionPattern) -> tuple[int, int, int, int, int]:
    """H, N, M, P, n as the kernels take them; what a pattern does not use is 1."""
    H, N, M = q.shape[1], q.shape[2], k.shape[2]
    n = pattern.queries_per_poke(N) if pattern.kind == "query_causal" else 1
    return H, N, M, pattern.num_pokes, n


@torch.library.custom_op("kinema::cosine_attention", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta_q: Tensor | None,
    theta_k: Tensor | None,
    scale: Tensor,
    kind: str,
    num_pokes: int,
) -> tuple[Tensor, Tensor]:
    """The attention [B, H, N, D] and, for its backward, log2 of each row's sum of exponentials [B, H, N]."""
    B, H, N, D = q.shape
    pattern = _as_pattern(kind, num_pokes, N)
    angles_q, angles_k, R = _angles_or_none(theta_q, theta_k, q, k)
    out, lse = _empty_outputs(q)
    constants = _constants("forward", q.dtype, pattern, D, R)
    grid = (triton.cdiv(N, constants["BLOCK_ROWS"]) * B * H,)
    with _on_device(q):
        _forward_kernel[grid](
            q, k, v, angles_q, angles_k, scale, out, lse,
            *q.stride(), *k.stride(), *v.stride(), *angles_q.stride(), *angles_k.stride(), *scale.stride(),
            *out.stride(), *_sizes(q, k, pattern), **constants,
        )  # fmt: skip
    return out, lse


@attention_forward.register_fake
def _(q, k, v, theta_q, theta_k, scale, kind, num_pokes):
    return _empty_outputs(q)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@torch.library.custom_op("kinema::cosine_attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta_q: Tensor | None,
    theta_k: Tensor | None,
    scale: Tensor,
    out: Tensor,
    lse: Tensor,
    kind: str,
    num_pokes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and scale."""
    B, H, N, D = q.shape
    pattern = _as_pattern(kind, num_pokes, N)
    angles_q, angles_k, R = _angles_or_none(theta_q, theta_k, q, k)
    sizes = _sizes(q, k, pattern)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    by_rows = _constants("rows", q.dtype, pattern, D, R)
    num_blocks = triton.cdiv(N, by_rows["BLOCK_ROWS"])
    dscale = torch.empty((B, H, num_blocks), dtype=torch.float32, device=q.device)
    inputs = (*q.stride(), *k.stride(), *v.stride(), *angles_q.stride(), *angles_k.stride(), *scale.stride())
    with _on_device(q):
        _backward_rows_kernel[(num_blocks * B * H,)](
            q, k, v, angles_q, angles_k, scale, out, dout, lse, delta, dq, dk, dv, dscale,
            *inputs, *out.stride(), *dout.stride(), *dq.stride(), *dk.stride(), *dv.stride(), *sizes, **by_rows,
        )  # fmt: skip
        num_keys = pattern.num_pokes if pattern.num_pokes else k.shape[2]
        if pattern.kind != "query_inference" or pattern.num_pokes > 0:
            by_keys = _constants("keys", q.dtype, pattern, D, R)
            _backward_keys_kernel[(triton.cdiv(num_keys, by_keys["BLOCK_KEYS"]) * B * H,)](
                q, k, v, angles_q, angles_k, scale, dout, lse, delta, dk, dv,
                *inputs, *dout.stride(), *dk.stride(), *dv.stride(), *sizes, num_keys, **by_keys,
            )  # fmt: skip
    return dq, dk, dv, (dscale.sum(dim=(0, 2)) * scale.sign()).to(scale.dtype)


@attention_backward.register_fake
def _(dout, q, k, v, theta_q, theta_k, scale, out, lse, kind, num_pokes):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(scale)


def _setup_context(ctx, inputs, output):
    q, k, v, theta_q, theta_k, scale, ctx.kind, ctx.num_pokes = inputs
    ctx.save_for_backward(q, k, v, theta_q, theta_k, scale, *output)


def _backward(ctx, dout, dlse):
    dq, dk, dv, dscale = attention_backward(dout, *ctx.saved_tensors, ctx.kind, ctx.num_pokes)
    return dq, dk, dv, None, None, dscale, None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def cosine_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta_q: Tensor | None,
    theta_k: Tensor | None,
    scale: Tensor,
    pattern: AttentionPattern,
) -> Tensor:
    """`reference.cosine_attention_reference` on a GPU; no gradient for the angles."""
    return attention_forward(q, k, v, theta_q, theta_k, scale, pattern.kind, pattern.num_pokes)[0]


def _on_device(x: Tensor) -> Any:
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


_FLOAT_POINTERS = ("theta_q_ptr", "theta_k_ptr", "scale_ptr", "lse_ptr", "delta_ptr", "dscale_ptr")
_UNIT_STRIDES = ("tq_r", "tk_r", "scale_h", "q_d", "k_d", "v_d", "o_d", "do_d", "dq_d", "dk_d", "dv_d")


def ahead_of_time_cases() -> list[Case]:
    """Every configuration: training on pokes with head size 64, and 72, which pads to 128 and is read in short runs."""
    pokes, full = AttentionPattern("query_causal", 128), AttentionPattern("full")
    small = [(dtype, 64, 32, pokes) for dtype in _TRITON_DTYPES]
    large = [(dtype, 72, 18, pokes) for dtype in (torch.bfloat16, torch.float32)]
    cases = [_case(name, *variant) for name in _KERNELS for variant in (*small, *large)]
    return [*cases, _case("rows", torch.bfloat16, 72, 18, full)]


_KERNELS = {"forward": _forward_kernel, "rows": _backward_rows_kernel, "keys": _backward_keys_kernel}


def _case(name: str, dtype: torch.dtype, D: int, R: int, pattern: AttentionPattern) -> Case:
    kernel = _KERNELS[name]
    constexprs = _constants(name, dtype, pattern, D, R)
    num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
    constexprs |= {argument: 1 for argument in _UNIT_STRIDES if argument in kernel.arg_names}
    element = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    signature = {}
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in _FLOAT_POINTERS else element
        elif argument not in constexprs:
            signature[argument] = "i32"
    tile = f"{constexprs['BLOCK_ROWS']}x{constexprs['BLOCK_KEYS']}"
    return Case(
        name=f"{name} {element[1:]} D{D} R{R} {pattern.kind} {tile}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=num_stages,
        has_dot=True,
        divisible=tuple(a for a in signature if a.endswith(("_ptr", "_b", "_h", "_n"))),
    )
