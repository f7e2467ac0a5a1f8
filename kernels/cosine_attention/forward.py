"""Forward pass: a block of rows against the shared keys that it sees, block by block.

Every row meets its own key and the keys below its limit, so that blocks nobody may see are never touched and no row is
ever without a key. Blocks that every row sees need no mask, and come first. Where a head's scale bounds its logits,
exponentials are summed up as they are (WIDE, `LARGEST_EXPONENT`); other heads need each row's largest, in another loop.
"""

import triton
import triton.language as tl

from kinema.kernels.cosine_attention.prepare import (
    LARGEST_EXPONENT,
    LOG2_E,
    head_of,
    joined,
    load_tile,
    pointers,
    store_tile,
    strength_of,
    turns_of,
    unit_rotated,
)
from kinema.kernels.cosine_attention.visibility import FULL, limits_of, seen_by_all, seen_by_some


@triton.jit
def forward_kernel(
    q,  # Rows [B, H, N, D]
    k,  # Rows [B, H, M, D]
    v,  # Rows [B, H, M, D]
    theta_q,  # Rows [B, H, N, R], or None
    theta_k,  # Rows [B, H, M, R], or None
    prepared_ptr,  # [B, H, padded, WIDTH], contiguous: shared keys
    values,  # Rows [B, H, at least num_shared, WIDTH]: their values; in whole blocks with WHOLE
    scale_ptr,  # [H] float32, contiguous
    out,  # Rows [B, H, N, D]: written
    lse_ptr,  # [B, H, N] float32, contiguous: written, log2 of the sum of exponentials of the logits
    lengths,
    KIND: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SAME_ANGLES: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
):
    num_blocks = tl.cdiv(lengths.N, BLOCK_ROWS)
    head = tl.program_id(0) // num_blocks
    b, h = head // lengths.H, head % lengths.H
    start = (tl.program_id(0) % num_blocks) * BLOCK_ROWS
    rows = start + tl.arange(0, BLOCK_ROWS)
    in_rows = rows < lengths.N
    values = head_of(values, b, h, HEAD.ALIGN)
    sin, cos = turns_of(theta_q, b, h, rows, in_rows, HEAD)
    q1, q2, _ = unit_rotated(head_of(q, b, h, HEAD.ALIGN), sin, cos, rows, in_rows, HEAD)
    strength = strength_of(scale_ptr, h) * LOG2_E
    q1 = q1 * strength
    q2 = q2 * strength
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.full([BLOCK_ROWS, HEAD.WIDTH], 0.0, tl.float32)
    if KIND != FULL:
        if not SAME_ANGLES:
            sin, cos = turns_of(theta_k, b, h, rows, in_rows, HEAD)
        own1, own2, _ = unit_rotated(head_of(k, b, h, HEAD.ALIGN), sin, cos, rows, in_rows, HEAD)
        top = tl.sum(q1 * own1 + q2 * own2, axis=1)
        total = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    own = top
    q_tile = joined(q1.to(DOT_DTYPE), q2.to(DOT_DTYPE), HEAD)

    last = tl.minimum(start + BLOCK_ROWS, lengths.N) - 1
    stop = seen_by_some(start, last, lengths, KIND)
    plain = seen_by_all(start, last, lengths, KIND) // BLOCK_KEYS * BLOCK_KEYS
    limits = limits_of(rows, lengths, KIND)
    prepared = prepared_ptr + head.to(tl.int64) * lengths.padded * HEAD.WIDTH
    if WIDE:
        bounded = strength <= LARGEST_EXPONENT
        if KIND != FULL:
            total = tl.exp2(tl.where(bounded, top, 0.0))
        top = tl.where(bounded, 0.0, top)
        done = tl.where(bounded, stop, 0)
        top, total, acc = _attend(
            q_tile, prepared, values, top, total, acc, 0, tl.minimum(plain, done), limits, lengths, False, True,
            WHOLE, HEAD, BLOCK_KEYS, DOT_DTYPE, PRECISION, None,
        )  # fmt: skip
        top, total, acc = _attend(
            q_tile, prepared, values, top, total, acc, plain, done, limits, lengths, True, True,
            WHOLE, HEAD, BLOCK_KEYS, DOT_DTYPE, PRECISION, None,
        )  # fmt: skip
    else:
        top, total, acc = _attend(
            q_tile, prepared, values, top, total, acc, 0, plain, limits, lengths, False, False,
            WHOLE, HEAD, BLOCK_KEYS, DOT_DTYPE, PRECISION, None,
        )  # fmt: skip
        done = plain
    top, total, acc = _attend(
        q_tile, prepared, values, top, total, acc, done, stop, limits, lengths, True, False,
        WHOLE, HEAD, BLOCK_KEYS, DOT_DTYPE, PRECISION, 1 if WIDE else None,
    )  # fmt: skip
    if KIND != FULL:
        # Behind the loops there are registers for it.
        value = load_tile(head_of(v, b, h, HEAD.ALIGN), rows, in_rows, HEAD).to(tl.float32)
        acc += value * tl.exp2(own - top)[:, None]
    store_tile(head_of(out, b, h, HEAD.ALIGN), acc / total[:, None], rows, in_rows, HEAD)
    tl.store(lse_ptr + head.to(tl.int64) * lengths.N + rows, top + tl.log2(total), mask=in_rows)


@triton.jit
def _attend(
    q_tile,  # [rows, WIDTH]
    prepared,  # one head of shared keys
    values,  # Rows, one head
    top,  # [rows] largest logit so far, in units of log 2
    total,  # [rows] sum of exponentials relative to it
    acc,  # [rows, WIDTH] weighted sum of values
    first,
    stop,
    limits,  # [rows]
    lengths,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Softmax attention continued over keys first..stop; without MASKED every row sees all of them.

    BOUNDED: exponentials are summed up as they are, and `top` stays what it is.
    """
    lane, columns = tl.arange(0, BLOCK_KEYS), tl.arange(0, HEAD.WIDTH)
    k_tile = prepared + columns[:, None] + (first + lane)[None, :] * HEAD.WIDTH
    v_tile = pointers(values, first + lane, columns, HEAD.ALIGN)
    for key in tl.range(first, stop, BLOCK_KEYS, num_stages=STAGES):
        logits = tl.dot(q_tile, tl.load(k_tile), input_precision=PRECISION)
        if BOUNDED:
            weights = tl.exp2(logits)
            if MASKED:
                weights = tl.where(lane[None, :] < (limits - key)[:, None], weights, 0.0)
        elif MASKED:
            logits = tl.where(lane[None, :] < (limits - key)[:, None], logits, float("-inf"))
        if MASKED and not WHOLE:
            value = tl.load(v_tile, mask=(key + lane < lengths.num_shared)[:, None], other=0.0)
        else:
            value = tl.load(v_tile)
        k_tile += BLOCK_KEYS * HEAD.WIDTH
        v_tile += BLOCK_KEYS * values.n
        if not BOUNDED:
            raised = tl.maximum(top, tl.max(logits, axis=1))
            weights = tl.exp2(logits - raised[:, None])
            fade = tl.exp2(top - raised)
            total, acc = total * fade, acc * fade[:, None]
            top = raised
        total += tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(DOT_DTYPE), value.to(DOT_DTYPE), acc, input_precision=PRECISION)
    return top, total, acc
