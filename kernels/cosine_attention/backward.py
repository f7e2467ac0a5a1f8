"""Backward pass in two kernels, without atomics: the same input gives the same bytes.

One kernel walks over rows and gives the gradients of q, of the scale, and of keys that only their own row sees. The
other walks over the shared keys and meets all rows that see them, as the first has prepared and stored them: in whole
blocks, pokes first, so that neither loop asks where rows end. Between preparation, loop and the way back, tiles go
through memory: they are handled a few rows at a time, and the loop has all registers to itself.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kinema.kernels.cosine_attention.prepare import (
    LARGEST_EXPONENT,
    LOG2_E,
    head_of,
    load_halves,
    load_tile,
    pointers,
    store_input_gradient,
    store_prepared,
    store_tile,
    strength_of,
    tile_of,
    turns_of,
    unit_rotated,
)
from kinema.kernels.cosine_attention.visibility import CAUSAL, FULL, QUERY_CAUSAL, QUERY_INFERENCE, limits_of

LN_2 = tl.constexpr(0.6931471805599453)


class Placed(NamedTuple):
    """What the pass over keys needs of rows, at their places: as they come, but queries after whole blocks of pokes.

    Places without a row hold zeros and minus an infinite sum.
    """

    rows: Any
    """[B, H, num, 2 WIDTH], contiguous: queries, prepared and scaled, beside the output's gradients."""
    sums: Any
    """[B, H, 2, num] float32, contiguous: minus log2 of the sum of exponentials; <gradient, output>."""
    num: int
    """Places of a head, in whole blocks."""
    queries_from: int
    """Place of the first query of the query patterns."""


@triton.jit
def backward_rows_kernel(
    q,  # Rows [B, H, N, D]
    k,  # Rows [B, H, M, D]
    v,  # Rows [B, H, M, D]
    theta_q,  # Rows [B, H, N, R], or None
    theta_k,  # Rows [B, H, M, R], or None
    prepared_ptr,  # [B, H, padded, WIDTH], contiguous: shared keys
    values,  # Rows [B, H, at least num_shared, WIDTH]: their values; in whole blocks with WHOLE
    scale_ptr,  # [H] float32, contiguous
    out,  # Rows [B, H, N, D]
    dout,  # Rows [B, H, N, D]
    lse_ptr,  # [B, H, N] float32, contiguous
    placed,  # Placed: written
    totals_ptr,  # [B, H, places, WIDTH] float32, contiguous: written, gradient of the prepared rows
    dq,  # Rows [B, H, N, D]: written
    dk,  # Rows [B, H, M, D]: written for queries, whose keys no other row sees
    dv,  # Rows [B, H, M, D]: written for queries
    dscale_ptr,  # [B, H, blocks] float32, contiguous: written, this block's share of the gradient of |s|
    lengths,
    KIND: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME_ANGLES: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
):
    num_blocks = placed.num // BLOCK_ROWS
    head = tl.program_id(0) // num_blocks
    b, h = head // lengths.H, head % lengths.H
    first = (tl.program_id(0) % num_blocks) * BLOCK_ROWS
    start, end = _rows_at(first, placed, lengths, KIND)
    q, dout = head_of(q, b, h, HEAD.ALIGN), head_of(dout, b, h, HEAD.ALIGN)
    strength = strength_of(scale_ptr, h)
    place = head.to(tl.int64) * placed.num + first
    rows_ptr = placed.rows + place * (2 * HEAD.WIDTH)
    totals_ptr += place * HEAD.WIDTH
    sums_ptr = placed.sums + head.to(tl.int64) * placed.num + place

    for chunk in range(0, BLOCK_ROWS, CHUNK):
        _take_in(
            q, head_of(out, b, h, HEAD.ALIGN), dout, theta_q, b, h, lse_ptr + head.to(tl.int64) * lengths.N,
            rows_ptr, sums_ptr, placed.num, strength, chunk + tl.arange(0, CHUNK), start, end, HEAD, DOT_DTYPE,
        )  # fmt: skip
    # What all threads wrote, all may read from here on.
    tl.debug_barrier()

    lane = tl.arange(0, BLOCK_ROWS)
    last = tl.minimum(start + BLOCK_ROWS, end) - 1
    stop = tl.where(start < end, limits_of(last, lengths, KIND), 0)
    plain = tl.where(start < end, limits_of(start, lengths, KIND), 0) // BLOCK_KEYS * BLOCK_KEYS
    limits = limits_of(start + lane, lengths, KIND)
    prepared = prepared_ptr + head.to(tl.int64) * lengths.padded * HEAD.WIDTH
    q_tile = tl.load(tile_of(rows_ptr, lane, 2 * HEAD.WIDTH, HEAD))
    dout_tile = tl.load(tile_of(rows_ptr + HEAD.WIDTH, lane, 2 * HEAD.WIDTH, HEAD))
    shift, delta = tl.load(sums_ptr + lane), tl.load(sums_ptr + placed.num + lane)
    values = head_of(values, b, h, HEAD.ALIGN)
    total = tl.full([BLOCK_ROWS, HEAD.WIDTH], 0.0, tl.float32)
    if WIDE:
        # Rows are divided by their sums behind the loop.
        bounded = strength * LOG2_E <= LARGEST_EXPONENT
        done = tl.where(bounded, stop, 0)
        total = _add_keys(
            total, q_tile, dout_tile, None, delta, prepared, values, 0, tl.minimum(plain, done), limits, lengths,
            False, WHOLE, HEAD, BLOCK_KEYS, DOT_DTYPE, PRECISION, None,
        )  # fmt: skip
        total = _add_keys(
            total, q_tile, dout_tile, None, delta, prepared, values, plain, done, limits, lengths, True, WHOLE,
            HEAD, BLOCK_KEYS, DOT_DTYPE, PRECISION, None,
        )  # fmt: skip
        total *= tl.exp2(tl.where(bounded, shift, 0.0))[:, None]
    else:
        total = _add_keys(
            total, q_tile, dout_tile, shift, delta, prepared, values, 0, plain, limits, lengths, False, WHOLE,
            HEAD, BLOCK_KEYS, DOT_DTYPE, PRECISION, None,
        )  # fmt: skip
        done = plain
    total = _add_keys(
        total, q_tile, dout_tile, shift, delta, prepared, values, done, stop, limits, lengths, True, WHOLE,
        HEAD, BLOCK_KEYS, DOT_DTYPE, PRECISION, 1 if WIDE else None,
    )  # fmt: skip
    tl.store(tile_of(totals_ptr, lane, HEAD.WIDTH, HEAD), total)
    tl.debug_barrier()

    # A few rows at a time: all at once do not fit into registers.
    dscale = tl.zeros([CHUNK], tl.float32)
    for chunk in range(0, BLOCK_ROWS, CHUNK):
        dscale += _give_back(
            q, head_of(k, b, h, HEAD.ALIGN), head_of(v, b, h, HEAD.ALIGN), dout,
            head_of(dq, b, h, HEAD.ALIGN), head_of(dk, b, h, HEAD.ALIGN), head_of(dv, b, h, HEAD.ALIGN),
            theta_q, theta_k, b, h, totals_ptr, sums_ptr, placed.num, strength,
            chunk + tl.arange(0, CHUNK), start, end, lengths, KIND, HEAD, SAME_ANGLES,
        )  # fmt: skip
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(dscale, axis=0))


@triton.jit
def _rows_at(first, placed, lengths, KIND: tl.constexpr):
    """The row at the place `first`, and the one behind the last of its kind.

    Pokes and queries never share a block, so that one limit rises over its rows.
    """
    shift = 0
    end = lengths.N
    if KIND == QUERY_CAUSAL or KIND == QUERY_INFERENCE:
        shift = tl.where(first < placed.queries_from, 0, placed.queries_from - lengths.P)
        end = tl.where(first < placed.queries_from, lengths.P, lengths.N)
    return first - shift, end


@triton.jit
def _take_in(
    q,  # Rows, one head; likewise out, dout
    out,
    dout,
    theta_q,  # Rows [B, H, N, R], or None
    b,
    h,
    lse_ptr,  # [N] of this head
    rows_ptr,  # places of this block: written
    sums_ptr,  # likewise; <gradient, output> lies `apart` behind
    apart,
    strength,
    piece,  # [rows] of this block
    start,
    end,
    HEAD: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Some rows as `Placed` has them."""
    rows = start + piece
    known = rows < end
    sin, cos = turns_of(theta_q, b, h, rows, known, HEAD)
    q1, q2, _ = unit_rotated(q, sin, cos, rows, known, HEAD)
    strength = strength * LOG2_E
    store_prepared(rows_ptr, q1 * strength, q2 * strength, piece, 2 * HEAD.WIDTH, HEAD)
    gradient = load_tile(dout, rows, known, HEAD)
    tl.store(tile_of(rows_ptr + HEAD.WIDTH, piece, 2 * HEAD.WIDTH, HEAD), gradient.to(DOT_DTYPE))
    product = load_tile(out, rows, known, HEAD).to(tl.float32) * gradient.to(tl.float32)
    tl.store(sums_ptr + apart + piece, tl.sum(product, axis=1))
    # Places without a row get no weight from an infinite sum.
    tl.store(sums_ptr + piece, -tl.load(lse_ptr + rows, mask=known, other=float("inf")))


@triton.jit
def _give_back(
    q,  # Rows, one head; likewise up to dv
    k,
    v,
    dout,
    dq,  # written
    dk,  # written for queries; likewise dv
    dv,
    theta_q,  # Rows [B, H, N, R], or None; likewise theta_k
    theta_k,
    b,
    h,
    totals_ptr,  # gradient of the prepared rows of this block
    sums_ptr,  # as `_take_in` wrote them
    apart,
    strength,
    piece,  # [rows] of this block
    start,
    end,
    lengths,
    KIND: tl.constexpr,
    HEAD: tl.constexpr,
    SAME_ANGLES: tl.constexpr,
):
    """Gradients of some rows, and of keys that only they see; returns the rows' terms of the scale's gradient."""
    rows = start + piece
    known = rows < end
    dq1, dq2 = load_halves(totals_ptr, piece, HEAD.WIDTH, HEAD)
    sin, cos = turns_of(theta_q, b, h, rows, known, HEAD)
    q1, q2, q_inverse = unit_rotated(q, sin, cos, rows, known, HEAD)
    if KIND != FULL:
        own_sin, own_cos = sin, cos
        if not SAME_ANGLES:
            own_sin, own_cos = turns_of(theta_k, b, h, rows, known, HEAD)
        own1, own2, own_inverse = unit_rotated(k, own_sin, own_cos, rows, known, HEAD)
        gradient = load_tile(dout, rows, known, HEAD).to(tl.float32)
        value = load_tile(v, rows, known, HEAD).to(tl.float32)
        dweight = tl.sum(gradient * value, axis=1) - tl.load(sums_ptr + apart + piece)
        weight = tl.exp2(tl.sum(q1 * own1 + q2 * own2, axis=1) * (strength * LOG2_E) + tl.load(sums_ptr + piece))
        dlogit = weight * dweight
        dq1 += dlogit[:, None] * own1
        dq2 += dlogit[:, None] * own2
    dscale = store_input_gradient(dq, sin, cos, dq1, dq2, q1, q2, q_inverse * strength, rows, known, HEAD)
    if KIND == QUERY_CAUSAL or KIND == QUERY_INFERENCE:
        is_query = known & (rows >= lengths.P)
        store_tile(dv, weight[:, None] * gradient, rows, is_query, HEAD)
        dlogit = (dlogit * strength)[:, None]
        store_input_gradient(
            dk, own_sin, own_cos, dlogit * q1, dlogit * q2, own1, own2, own_inverse, rows, is_query, HEAD
        )
    return dscale


@triton.jit
def _add_keys(
    total,  # [rows, WIDTH] gradient of the prepared rows so far
    q_tile,  # [rows, WIDTH] prepared and scaled
    dout_tile,  # [rows, WIDTH]
    shift,  # [rows] added to logits, or None: weights are left undivided
    delta,  # [rows]
    prepared,  # one head of shared keys
    values,  # Rows, one head
    first,
    stop,
    limits,  # [rows]
    lengths,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds what the keys first..stop give; without MASKED every row sees all of them."""
    lane, columns = tl.arange(0, BLOCK_KEYS), tl.arange(0, HEAD.WIDTH)
    k_tile = tile_of(prepared, first + lane, HEAD.WIDTH, HEAD)
    v_tile = pointers(values, first + lane, columns, HEAD.ALIGN)
    for key in tl.range(first, stop, BLOCK_KEYS, num_stages=STAGES):
        keys = tl.load(k_tile)
        logits = tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION)
        if shift is None:
            weights = tl.exp2(logits)
        else:
            # Subtracted, not added: a sum would become the product's beginning.
            weights = tl.exp2(logits - (-shift)[:, None])
        if MASKED:
            weights = tl.where(lane[None, :] < (limits - key)[:, None], weights, 0.0)
        if MASKED and not WHOLE:
            value = tl.load(v_tile, mask=(key + lane < lengths.num_shared)[:, None], other=0.0)
        else:
            value = tl.load(v_tile)
        dweights = tl.dot(dout_tile, tl.trans(value.to(DOT_DTYPE)), input_precision=PRECISION)
        dlogits = (weights * (dweights - delta[:, None])).to(DOT_DTYPE)
        total = tl.dot(dlogits, keys, total, input_precision=PRECISION)
        k_tile += BLOCK_KEYS * HEAD.WIDTH
        v_tile += BLOCK_KEYS * values.n
    return total


@triton.jit
def backward_keys_kernel(
    k,  # Rows [B, H, M, D]
    theta_k,  # Rows [B, H, M, R], or None
    prepared_ptr,  # [B, H, padded, WIDTH], contiguous: shared keys
    values,  # Rows [B, H, at least num_shared, WIDTH]: their values
    placed,  # Placed
    totals_ptr,  # [B, H, padded, 2 WIDTH] float32, contiguous: written, gradients of prepared keys and of values
    dk,  # Rows [B, H, M, D]: written for shared keys
    dv,  # Rows [B, H, M, D]: written for shared keys
    lengths,
    KIND: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_blocks = tl.cdiv(lengths.num_shared, BLOCK_KEYS)
    head = tl.program_id(0) // num_blocks
    b, h = head // lengths.H, head % lengths.H
    start = (tl.program_id(0) % num_blocks) * BLOCK_KEYS
    keys = start + tl.arange(0, BLOCK_KEYS)
    prepared_ptr += head.to(tl.int64) * lengths.padded * HEAD.WIDTH
    k_tile = tl.load(tile_of(prepared_ptr, keys, HEAD.WIDTH, HEAD))
    v_tile = pointers(head_of(values, b, h, HEAD.ALIGN), keys, tl.arange(0, HEAD.WIDTH), HEAD.ALIGN)
    v_tile = tl.load(v_tile, mask=(keys < lengths.num_shared)[:, None], other=0.0).to(DOT_DTYPE)
    dk_tile = tl.full([BLOCK_KEYS, HEAD.WIDTH], 0.0, tl.float32)
    dv_tile = tl.full([BLOCK_KEYS, HEAD.WIDTH], 0.0, tl.float32)

    # Places whose rows see some keys of this block, and those among them whose rows see all, both in whole blocks:
    # pokes and queries of the query patterns, any rows of the others.
    num, queries_from, n = placed.num, placed.queries_from, lengths.n
    end = start + BLOCK_KEYS
    if KIND == FULL:
        some_pokes, all_pokes, stop_pokes, some_queries, all_queries = 0, 0, num, num, num
    else:
        some_pokes = start // BLOCK_ROWS * BLOCK_ROWS
        stop_pokes, some_queries, all_queries = num, num, num
        if KIND != CAUSAL:
            stop_pokes, some_queries, all_queries = queries_from, queries_from, queries_from
        if KIND == QUERY_CAUSAL:
            some_queries = tl.minimum(queries_from + (start + 1) * n // BLOCK_ROWS * BLOCK_ROWS, num)
            all_queries = tl.minimum(queries_from + tl.cdiv(end * n, BLOCK_ROWS) * BLOCK_ROWS, num)
        all_pokes = tl.minimum(tl.cdiv(end, BLOCK_ROWS) * BLOCK_ROWS, stop_pokes)
        dk_tile, dv_tile = _add_rows(
            dk_tile, dv_tile, k_tile, v_tile, placed, head, keys,
            some_pokes, all_pokes, some_queries, all_queries, lengths, KIND, True, HEAD, BLOCK_ROWS, DOT_DTYPE,
            PRECISION,
        )  # fmt: skip
    dk_tile, dv_tile = _add_rows(
        dk_tile, dv_tile, k_tile, v_tile, placed, head, keys,
        all_pokes, stop_pokes, all_queries, num, lengths, KIND, False, HEAD, BLOCK_ROWS, DOT_DTYPE, PRECISION,
    )  # fmt: skip

    totals_ptr += (head.to(tl.int64) * lengths.padded + start) * (2 * HEAD.WIDTH)
    lane = tl.arange(0, BLOCK_KEYS)
    tl.store(tile_of(totals_ptr, lane, 2 * HEAD.WIDTH, HEAD), dk_tile * LN_2)
    tl.store(tile_of(totals_ptr + HEAD.WIDTH, lane, 2 * HEAD.WIDTH, HEAD), dv_tile)
    tl.debug_barrier()
    for chunk in range(0, BLOCK_KEYS, CHUNK):
        piece = chunk + tl.arange(0, CHUNK)
        value_gradient = tl.load(tile_of(totals_ptr + HEAD.WIDTH, piece, 2 * HEAD.WIDTH, HEAD))
        dk1, dk2 = load_halves(totals_ptr, piece, 2 * HEAD.WIDTH, HEAD)
        piece += start
        known = piece < lengths.num_shared
        store_tile(head_of(dv, b, h, HEAD.ALIGN), value_gradient, piece, known, HEAD)
        sin, cos = turns_of(theta_k, b, h, piece, known, HEAD)
        k1, k2, k_inverse = unit_rotated(head_of(k, b, h, HEAD.ALIGN), sin, cos, piece, known, HEAD)
        store_input_gradient(head_of(dk, b, h, HEAD.ALIGN), sin, cos, dk1, dk2, k1, k2, k_inverse, piece, known, HEAD)


@triton.jit
def _add_rows(
    dk_tile,  # [keys, WIDTH] gradient of the prepared keys so far
    dv_tile,  # [keys, WIDTH]
    k_tile,  # [keys, WIDTH]
    v_tile,  # [keys, WIDTH]
    placed,  # Placed
    head,
    keys,
    first_poke,
    stop_pokes,
    first_query,
    stop_queries,
    lengths,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the rows in two ranges of places give; without MASKED each sees all keys of the block."""
    rows_ptr = placed.rows + head.to(tl.int64) * placed.num * (2 * HEAD.WIDTH)
    sums_ptr = placed.sums + head.to(tl.int64) * placed.num * 2
    lane = tl.arange(0, BLOCK_ROWS)
    poke_blocks = (stop_pokes - first_poke) // BLOCK_ROWS
    blocks = poke_blocks + (stop_queries - first_query) // BLOCK_ROWS
    for block in range(0, blocks):
        if KIND == CAUSAL:
            place = first_poke + block * BLOCK_ROWS
        else:
            is_poke = block < poke_blocks
            place = block * BLOCK_ROWS + tl.where(is_poke, first_poke, first_query - poke_blocks * BLOCK_ROWS)
        tile = tile_of(rows_ptr + place * (2 * HEAD.WIDTH), lane, 2 * HEAD.WIDTH, HEAD)
        q_tile, gradient = tl.load(tile), tl.load(tile + HEAD.WIDTH)
        # One load for both: where a product begins with it alone, it is not copied ahead.
        sums = tl.load(sums_ptr + place + lane[:, None] + tl.arange(0, 2)[None, :] * placed.num)
        shift, delta = tl.split(sums)
        # Both products before what is made of them: fewer registers at a time.
        dweights = tl.dot(v_tile, tl.trans(gradient), input_precision=PRECISION)  # [keys, rows]
        if MASKED:
            # A poke sees itself and the pokes before it; key c is below the limit of the queries from (c + 1) n on.
            if KIND == CAUSAL:
                seen_from = keys - place
            else:
                seen_from = keys * tl.where(is_poke, 1, lengths.n)
                seen_from += tl.where(is_poke, 0, placed.queries_from + lengths.n) - place
            # The product begins with what is added to it, and at -inf where a key is not seen: no mask behind it.
            logits = tl.where(lane[None, :] >= seen_from[:, None], shift[None, :], float("-inf"))
            weights = tl.exp2(tl.dot(k_tile, tl.trans(q_tile), logits, input_precision=PRECISION))
        else:
            # Added, it would become the product's beginning: spills, above 64 columns in the loop.
            weights = tl.exp2(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) - (-shift)[None, :])
        dlogits = (weights * (dweights - delta[None, :])).to(DOT_DTYPE)
        dv_tile = tl.dot(weights.to(DOT_DTYPE), gradient, dv_tile, input_precision=PRECISION)
        dk_tile = tl.dot(dlogits, q_tile, dk_tile, input_precision=PRECISION)
    return dk_tile, dv_tile
