"""Backward pass in two kernels, without atomics: the same input gives the same bytes.

One kernel walks over rows and gives the gradients of q, of the scale, and of keys that only their own row sees; on its
way it stores the prepared queries. The other walks over the shared keys and meets all rows that see them.
"""

import triton
import triton.language as tl

from kinema.kernels.cosine_attention.prepare import (
    LOG2_E,
    halves,
    head_of,
    joined,
    load_tile,
    pointers,
    store_input_gradient,
    store_prepared,
    store_tile,
    strength_of,
    unit_rotated,
)
from kinema.kernels.cosine_attention.visibility import (
    CAUSAL,
    FULL,
    QUERY_CAUSAL,
    QUERY_INFERENCE,
    limits_of,
    seen_by_all,
    seen_by_some,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def backward_rows_kernel(
    q,  # Rows [B, H, N, D]
    k,  # Rows [B, H, M, D]
    v,  # Rows [B, H, M, D]
    theta_q,  # Rows [B, H, N, R], or None
    theta_k,  # Rows [B, H, M, R], or None
    prepared_ptr,  # [B, H, padded, WIDTH], contiguous: shared keys
    scale_ptr,  # [H] float32, contiguous
    out,  # Rows [B, H, N, D]
    dout,  # Rows [B, H, N, D]
    lse_ptr,  # [B, H, N] float32, contiguous
    delta_ptr,  # [B, H, N] float32, contiguous: written, <dout, out> per row
    queries_ptr,  # [B, H, N up to whole blocks, WIDTH], contiguous: written, prepared and scaled
    dq,  # Rows [B, H, N, D]: written
    dk,  # Rows [B, H, M, D]: written for queries, whose keys no other row sees
    dv,  # Rows [B, H, M, D]: written for queries
    dscale_ptr,  # [B, H, blocks] float32, contiguous: written, this block's share of the gradient of |s|
    lengths,
    KIND: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_blocks = tl.cdiv(lengths.N, BLOCK_ROWS)
    head = tl.program_id(0) // num_blocks
    b, h = head // lengths.H, head % lengths.H
    start = (tl.program_id(0) % num_blocks) * BLOCK_ROWS
    rows = start + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < lengths.N
    row_offset = head.to(tl.int64) * lengths.N
    q, k, v, dout = (
        head_of(q, b, h, HEAD.ALIGN),
        head_of(k, b, h, HEAD.ALIGN),
        head_of(v, b, h, HEAD.ALIGN),
        head_of(dout, b, h, HEAD.ALIGN),
    )
    theta_q = head_of(theta_q, b, h, 1) if HEAD.R > 0 else None
    theta_k = head_of(theta_k, b, h, 1) if HEAD.R > 0 else None
    strength = strength_of(scale_ptr, h)
    lse = tl.load(lse_ptr + row_offset + rows, mask=in_rows, other=0.0)
    dout_tile = load_tile(dout, rows, in_rows, HEAD)
    delta = tl.sum(
        load_tile(head_of(out, b, h, HEAD.ALIGN), rows, in_rows, HEAD).to(tl.float32) * dout_tile.to(tl.float32), axis=1
    )
    tl.store(delta_ptr + row_offset + rows, delta, mask=in_rows)

    q1, q2, _ = unit_rotated(q, theta_q, rows, in_rows, HEAD)
    q1 = (q1 * (strength * LOG2_E)).to(DOT_DTYPE)
    q2 = (q2 * (strength * LOG2_E)).to(DOT_DTYPE)
    store_prepared(queries_ptr + head.to(tl.int64) * num_blocks * BLOCK_ROWS * HEAD.WIDTH, q1, q2, rows, HEAD)

    last = tl.minimum(start + BLOCK_ROWS, lengths.N) - 1
    stop = seen_by_some(start, last, lengths, KIND)
    plain = seen_by_all(start, last, lengths, KIND) // BLOCK_KEYS * BLOCK_KEYS
    limits = limits_of(rows, lengths, KIND)
    prepared = prepared_ptr + head.to(tl.int64) * lengths.padded * HEAD.WIDTH
    q_tile, dout_tile = joined(q1, q2, HEAD), dout_tile.to(DOT_DTYPE)
    total = tl.full([BLOCK_ROWS, HEAD.WIDTH], 0.0, tl.float32)
    total = _add_keys(
        total, q_tile, dout_tile, lse, delta, prepared, v, 0, plain, limits, lengths, False,
        HEAD, BLOCK_KEYS, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    total = _add_keys(
        total, q_tile, dout_tile, lse, delta, prepared, v, plain, stop, limits, lengths, True,
        HEAD, BLOCK_KEYS, DOT_DTYPE, PRECISION,
    )  # fmt: skip

    # Loads stay behind stores: what comes later does not take registers now.
    dq1, dq2 = halves(total, HEAD)
    if KIND != FULL:
        gradient = load_tile(dout, rows, in_rows, HEAD).to(tl.float32)
        dweight = tl.sum(gradient * load_tile(v, rows, in_rows, HEAD).to(tl.float32), axis=1) - delta
    q1, q2, q_inverse = unit_rotated(q, theta_q, rows, in_rows, HEAD)
    if KIND != FULL:
        own1, own2, own_inverse = unit_rotated(k, theta_k, rows, in_rows, HEAD)
        weight = tl.exp2(tl.sum(q1 * own1 + q2 * own2, axis=1) * (strength * LOG2_E) - lse)
        dlogit = weight * dweight
        dq1 += dlogit[:, None] * own1
        dq2 += dlogit[:, None] * own2
    along = store_input_gradient(
        head_of(dq, b, h, HEAD.ALIGN), theta_q, dq1, dq2, q1, q2, q_inverse * strength, rows, in_rows, in_rows, HEAD
    )
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(along, axis=0))
    if KIND == QUERY_CAUSAL or KIND == QUERY_INFERENCE:
        is_query = in_rows & (rows >= lengths.P)
        gradient = load_tile(dout, rows, in_rows, HEAD).to(tl.float32)
        store_tile(head_of(dv, b, h, HEAD.ALIGN), weight[:, None] * gradient, rows, is_query, HEAD)
        q1, q2, _ = unit_rotated(q, theta_q, rows, in_rows, HEAD)
        own1, own2, own_inverse = unit_rotated(k, theta_k, rows, in_rows, HEAD)
        dlogit = dlogit * strength
        store_input_gradient(
            head_of(dk, b, h, HEAD.ALIGN), theta_k, dlogit[:, None] * q1, dlogit[:, None] * q2, own1, own2, own_inverse,
            rows, in_rows, is_query, HEAD,
        )  # fmt: skip


@triton.jit
def _add_keys(
    total,  # [rows, WIDTH] gradient of the prepared rows so far
    q_tile,  # [rows, WIDTH] prepared and scaled
    dout_tile,  # [rows, WIDTH]
    lse,  # [rows]
    delta,  # [rows]
    prepared,  # one head of shared keys
    v,  # Rows, one head
    first,
    stop,
    limits,  # [rows]
    lengths,
    MASKED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the keys first..stop give; without MASKED every row sees all of them."""
    lane, columns = tl.arange(0, BLOCK_KEYS), tl.arange(0, HEAD.WIDTH)
    k_tile = prepared + (first + lane)[:, None] * HEAD.WIDTH + columns[None, :]
    v_tile = pointers(v, first + lane, columns, HEAD.ALIGN)
    real = (columns < HEAD.D)[None, :]
    for key in range(first, stop, BLOCK_KEYS):
        keys = tl.load(k_tile)
        logits = tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION)
        weights = tl.exp2(logits - lse[:, None])
        if MASKED:
            weights = tl.where((key + lane)[None, :] < limits[:, None], weights, 0.0)
            values = tl.load(v_tile, mask=real & (key + lane < lengths.M)[:, None], other=0.0)
        else:
            values = tl.load(v_tile, mask=real, other=0.0)
        dweights = tl.dot(dout_tile, tl.trans(values.to(DOT_DTYPE)), input_precision=PRECISION)
        dlogits = (weights * (dweights - delta[:, None])).to(DOT_DTYPE)
        total = tl.dot(dlogits, keys, total, input_precision=PRECISION)
        k_tile += BLOCK_KEYS * HEAD.WIDTH
        v_tile += BLOCK_KEYS * v.n
    return total


@triton.jit
def backward_keys_kernel(
    k,  # Rows [B, H, M, D]
    v,  # Rows [B, H, M, D]
    theta_k,  # Rows [B, H, M, R], or None
    prepared_ptr,  # [B, H, padded, WIDTH], contiguous: shared keys
    queries_ptr,  # [B, H, padded_rows, WIDTH], contiguous: prepared and scaled
    dout,  # Rows [B, H, N, D]
    lse_ptr,  # [B, H, N] float32, contiguous
    delta_ptr,  # [B, H, N] float32, contiguous
    dk,  # Rows [B, H, M, D]: written for shared keys
    dv,  # Rows [B, H, M, D]: written for shared keys
    padded_rows,
    lengths,
    KIND: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_blocks = tl.cdiv(lengths.num_shared, BLOCK_KEYS)
    head = tl.program_id(0) // num_blocks
    b, h = head // lengths.H, head % lengths.H
    start = (tl.program_id(0) % num_blocks) * BLOCK_KEYS
    keys = start + tl.arange(0, BLOCK_KEYS)
    in_keys = keys < lengths.num_shared
    columns = tl.arange(0, HEAD.WIDTH)
    row_offset = head.to(tl.int64) * lengths.N
    prepared = prepared_ptr + head.to(tl.int64) * lengths.padded * HEAD.WIDTH
    k_tile = tl.load(prepared + keys[:, None] * HEAD.WIDTH + columns[None, :])
    v_tile = load_tile(head_of(v, b, h, HEAD.ALIGN), keys, in_keys, HEAD).to(DOT_DTYPE)
    queries = queries_ptr + head.to(tl.int64) * padded_rows * HEAD.WIDTH
    dout = head_of(dout, b, h, HEAD.ALIGN)
    dk_tile = tl.full([BLOCK_KEYS, HEAD.WIDTH], 0.0, tl.float32)
    dv_tile = tl.full([BLOCK_KEYS, HEAD.WIDTH], 0.0, tl.float32)

    # Rows that see some keys of this block, and those among them that see all: pokes and queries of the query patterns,
    # any rows of the others.
    N, P, n = lengths.N, lengths.P, lengths.n
    end = start + BLOCK_KEYS
    if KIND == FULL:
        some_pokes, all_pokes, stop_pokes, some_queries, all_queries = 0, 0, N, N, N
    elif KIND == CAUSAL:
        some_pokes, all_pokes, stop_pokes, some_queries, all_queries = start, tl.minimum(end, N), N, N, N
    elif KIND == QUERY_CAUSAL:
        some_pokes, all_pokes, stop_pokes = start, tl.minimum(end, P), P
        some_queries, all_queries = tl.minimum(P + (start + 1) * n, N), tl.minimum(P + end * n, N)
    else:
        some_pokes, all_pokes, stop_pokes, some_queries, all_queries = start, tl.minimum(end, P), P, P, P
    if KIND != FULL:
        dk_tile, dv_tile = _add_rows(
            dk_tile, dv_tile, k_tile, v_tile, queries, dout, lse_ptr + row_offset, delta_ptr + row_offset, keys,
            some_pokes, all_pokes, some_queries, all_queries, lengths, True, HEAD, BLOCK_ROWS, DOT_DTYPE, PRECISION,
        )  # fmt: skip
    dk_tile, dv_tile = _add_rows(
        dk_tile, dv_tile, k_tile, v_tile, queries, dout, lse_ptr + row_offset, delta_ptr + row_offset, keys,
        all_pokes, stop_pokes, all_queries, N, lengths, False, HEAD, BLOCK_ROWS, DOT_DTYPE, PRECISION,
    )  # fmt: skip

    store_tile(head_of(dv, b, h, HEAD.ALIGN), dv_tile, keys, in_keys, HEAD)
    theta = head_of(theta_k, b, h, 1) if HEAD.R > 0 else None
    k1, k2, k_inverse = unit_rotated(head_of(k, b, h, HEAD.ALIGN), theta, keys, in_keys, HEAD)
    dk1, dk2 = halves(dk_tile * LN_2, HEAD)
    store_input_gradient(
        head_of(dk, b, h, HEAD.ALIGN), theta, dk1, dk2, k1, k2, k_inverse, keys, in_keys, in_keys, HEAD
    )


@triton.jit
def _add_rows(
    dk_tile,  # [keys, WIDTH] gradient of the prepared keys so far
    dv_tile,  # [keys, WIDTH]
    k_tile,  # [keys, WIDTH]
    v_tile,  # [keys, WIDTH]
    queries,  # one head of prepared and scaled rows
    dout,  # Rows, one head
    lse_ptr,  # one head
    delta_ptr,  # one head
    keys,
    first_poke,
    stop_pokes,
    first_query,
    stop_queries,
    lengths,
    MASKED: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what two ranges of rows give; without MASKED each sees all keys of the block."""
    lane, columns = tl.arange(0, BLOCK_ROWS), tl.arange(0, HEAD.WIDTH)
    poke_blocks = tl.cdiv(stop_pokes - first_poke, BLOCK_ROWS)
    query_blocks = tl.cdiv(stop_queries - first_query, BLOCK_ROWS)
    for block in range(0, poke_blocks + query_blocks):
        is_poke = block < poke_blocks
        row = tl.where(is_poke, first_poke + block * BLOCK_ROWS, first_query + (block - poke_blocks) * BLOCK_ROWS)
        rows = row + lane
        in_rows = rows < tl.where(is_poke, stop_pokes, stop_queries)
        q_tile = tl.load(queries + rows[:, None] * HEAD.WIDTH + columns[None, :], mask=in_rows[:, None], other=0.0)
        # Rows that are none get no weight from an infinite sum.
        lse = tl.load(lse_ptr + rows, mask=in_rows, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=in_rows, other=0.0)
        gradient = tl.load(
            pointers(dout, rows, columns, HEAD.ALIGN), mask=in_rows[:, None] & (columns < HEAD.D)[None, :], other=0.0
        ).to(DOT_DTYPE)
        logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)  # [keys, rows]
        weights = tl.exp2(logits - lse[None, :])
        if MASKED:
            # A poke sees itself and the pokes before it; key c is below the limit of the queries from P + (c + 1) n on.
            seen_from = keys * tl.where(is_poke, 1, lengths.n) + tl.where(is_poke, 0, lengths.P + lengths.n)
            weights = tl.where(rows[None, :] >= seen_from[:, None], weights, 0.0)
        dv_tile = tl.dot(weights.to(DOT_DTYPE), gradient, dv_tile, input_precision=PRECISION)
        dweights = tl.dot(v_tile, tl.trans(gradient), input_precision=PRECISION)
        dlogits = (weights * (dweights - delta[None, :])).to(DOT_DTYPE)
        dk_tile = tl.dot(dlogits, q_tile, dk_tile, input_precision=PRECISION)
    return dk_tile, dv_tile
