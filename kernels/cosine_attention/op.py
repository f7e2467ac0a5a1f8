"""Cosine attention on a GPU as a torch operation with autograd: sizes, scratch memory, launches.

Shapes: B batch, H heads, N rows, M keys, D head size, R angles, P pokes, n queries per poke.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinema.kernels.cosine_attention.backward import Placed, backward_keys_kernel, backward_rows_kernel
from kinema.kernels.cosine_attention.forward import forward_kernel
from kinema.kernels.cosine_attention.patterns import POKE_KINDS, AttentionPattern
from kinema.kernels.cosine_attention.prepare import Head, Rows, prepare_keys_kernel
from kinema.kernels.cosine_attention.tuning import (
    CHUNK_BYTES,
    LARGEST_BLOCK_KEYS,
    PREPARE_BLOCK,
    choose_config,
    half_width,
)
from kinema.kernels.cosine_attention.visibility import KIND_CODES, Lengths
from kinema.kernels.dispatch import INTERPRETING
from kinema.kernels.launch import launch, on_device

WIDE_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16,)
"""Whose exponentials of bounded logits are summed up as they are: float16 does not hold them, and float32 has no
registers to spare for the loop of the heads that are not bounded."""
_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


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
    with on_device(q):
        return run_forward(q, k, v, theta_q, theta_k, scale, kind, num_pokes)


@attention_forward.register_fake
def _(q, k, v, theta_q, theta_k, scale, kind, num_pokes):
    return _empty_outputs(q)


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
    with on_device(q):
        return run_backward(dout, q, k, v, theta_q, theta_k, scale, out, lse, kind, num_pokes)


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


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta_q: Tensor | None,
    theta_k: Tensor | None,
    scale: Tensor,
    kind: str,
    num_pokes: int,
) -> tuple[Tensor, Tensor]:
    """`attention_forward` on the current device."""
    B, H, N, _ = q.shape
    out, lse = _empty_outputs(q)
    call = _Call(q, k, v, theta_q, theta_k, scale, kind, num_pokes, others=(out,))
    constants = call.constants("forward") | call.facts
    prepared, values = call.prepared_keys()
    launch(
        forward_kernel,
        (triton.cdiv(N, constants["BLOCK_ROWS"]) * B * H,),
        *(call.q, call.k, call.v, call.theta_q, call.theta_k, prepared, values, call.scale),
        *(as_rows(out), lse, call.lengths),
        **constants,
    )
    return out, lse


def run_backward(
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
    """`attention_backward` on the current device."""
    B, H, _, _ = q.shape
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    call = _Call(q, k, v, theta_q, theta_k, scale, kind, num_pokes, others=(out, dout, dq, dk, dv))
    by_rows = call.backward_constants("rows") | call.facts
    by_keys = call.backward_constants("keys")
    prepared, values = call.prepared_keys()
    placed = call.placed(max(by_rows["BLOCK_ROWS"], by_keys["BLOCK_ROWS"]))
    num_blocks = placed.num // by_rows["BLOCK_ROWS"]
    dscale = torch.empty((B, H, num_blocks), dtype=torch.float32, device=q.device)
    launch(
        backward_rows_kernel,
        (num_blocks * B * H,),
        *(call.q, call.k, call.v, call.theta_q, call.theta_k, prepared, values, call.scale),
        *(as_rows(out), as_rows(dout), lse, placed, call.scratch(placed.num, 1, torch.float32)),
        *(as_rows(dq), as_rows(dk), as_rows(dv), dscale, call.lengths),
        **by_rows,
    )
    if call.lengths.num_shared > 0:
        launch(
            backward_keys_kernel,
            (triton.cdiv(call.lengths.num_shared, by_keys["BLOCK_KEYS"]) * B * H,),
            *(call.k, call.theta_k, prepared, values, placed, call.scratch(call.lengths.padded, 2, torch.float32)),
            *(as_rows(dk), as_rows(dv), call.lengths),
            **by_keys,
        )
    return dq, dk, dv, (dscale.sum(dim=(0, 2)) * scale.sign()).to(scale.dtype)


def as_rows(x: Tensor) -> Rows:
    """A tensor [B, H, N, columns] as kernels take it."""
    return Rows(x, *x.stride())


def alignment(*tensors: Tensor) -> int:
    """Elements, up to 16, that rows of all these tensors [B, H, N, D] begin at multiples of; 1 if dims lie apart.

    Triton sees multiples of 16 by itself. The stride of heads of 72 dims is none, but 8 times 2 bytes are one load.
    """
    if any(x.stride(3) != 1 for x in tensors):
        return 1
    return math.gcd(16, *(stride for x in tensors for stride in x.stride()[:3]))


class _Call:
    """What the kernels of one call share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        theta_q: Tensor | None,
        theta_k: Tensor | None,
        scale: Tensor,
        kind: str,
        num_pokes: int,
        others: tuple[Tensor, ...],
    ):
        B, H, N, D = q.shape
        M = k.shape[2]
        self.pattern = pattern = _as_pattern(kind, num_pokes, N)
        self.q, self.k, self.v = as_rows(q), as_rows(k), as_rows(v)
        self.theta_q, self.theta_k, R = _angles_or_none(theta_q, theta_k, q, k)
        self.scale = scale.float().contiguous()
        self.batch, self.device, self.dtype = B, q.device, q.dtype
        # The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
        self.operand = torch.float32 if INTERPRETING and q.dtype == torch.bfloat16 else q.dtype
        half = half_width(D)
        self.head = Head(D, R, half, math.gcd(R, D // 2, 16), 2 * half, alignment(q, k, v, *others))
        n = pattern.queries_per_poke(N) if pattern.kind == "query_causal" else 1
        num_shared = M if pattern.kind in ("full", "causal") else pattern.num_pokes
        padded = triton.cdiv(num_shared, LARGEST_BLOCK_KEYS) * LARGEST_BLOCK_KEYS
        self.lengths = Lengths(H, N, M, pattern.num_pokes, n, num_shared, padded)
        # Pokes are few: their values are copied, with zeros behind them, rather than masked.
        self.copies_values = half * 2 != D or (pattern.kind in POKE_KINDS and padded != num_shared)
        # What a row's own key turns by, which stands where it stands; whether loops may read values up to `padded`;
        # whether exponentials of any bounded logits may be multiplied.
        self.facts = {
            "SAME_ANGLES": _same(theta_q, theta_k),
            "WHOLE": self.copies_values or padded == num_shared,
            "WIDE": q.dtype in WIDE_DTYPES,
        }

    def constants(self, kernel: str) -> dict[str, Any]:
        """Compile-time arguments and launch options."""
        config = choose_config(kernel, self.dtype, self.pattern.kind, self.head.D, self.device)
        return {
            "KIND": KIND_CODES[self.pattern.kind],
            "HEAD": self.head,
            "BLOCK_ROWS": config.blocks[0],
            "BLOCK_KEYS": config.blocks[1],
            "DOT_DTYPE": _TRITON_DTYPES[self.operand],
            "PRECISION": "tf32x3",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def prepared_keys(self) -> tuple[Tensor, Rows]:
        """Shared keys, normalised and rotated: [B, H, padded, WIDTH]; and values of as many columns."""
        prepared = self.scratch(self.lengths.padded)
        copied = self.scratch(self.lengths.padded) if self.copies_values else None
        if self.lengths.padded > 0:
            launch(
                prepare_keys_kernel,
                (self.lengths.padded // PREPARE_BLOCK * self.batch * self.lengths.H,),
                *(self.k, self.v, self.theta_k, prepared, copied, self.lengths),
                HEAD=self.head,
                BLOCK=PREPARE_BLOCK,
                num_warps=4,
            )
        return prepared, self.v if copied is None else as_rows(copied)

    def backward_constants(self, kernel: str) -> dict[str, Any]:
        """`constants`, and how many rows are handled at a time before and after the loop."""
        constants = self.constants(kernel)
        held = constants["BLOCK_ROWS" if kernel == "rows" else "BLOCK_KEYS"]
        chunk = min(held, CHUNK_BYTES // self.operand.itemsize // self.head.WIDTH)
        return {**constants, "CHUNK": held // 2 if INTERPRETING else chunk}

    def placed(self, block: int) -> Placed:
        """Scratch for the rows of the backward pass, in whole blocks."""
        pokes = self.lengths.P if self.pattern.kind in POKE_KINDS else 0
        queries_from = triton.cdiv(pokes, block) * block
        num = queries_from + triton.cdiv(self.lengths.N - pokes, block) * block
        sums = torch.empty((self.batch, self.lengths.H, 2, num), dtype=torch.float32, device=self.device)
        return Placed(self.scratch(num, 2), sums, num, queries_from)

    def scratch(self, num_rows: int, tiles: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for rows of some tiles' width, in the type that products take unless told."""
        shape = (self.batch, self.lengths.H, num_rows, tiles * self.head.WIDTH)
        return torch.empty(shape, dtype=dtype or self.operand, device=self.device)


def _angles_or_none(
    theta_q: Tensor | None, theta_k: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Rows | None, Rows | None, int]:
    """Angles of queries and keys at full size, with stride 0 where they repeat, and their number R.

    None beside angles becomes zeros; two None, or angles of size 0, are R = 0.
    """
    given = theta_q if theta_q is not None else theta_k
    if given is None or given.shape[-1] == 0:
        return None, None, 0
    R = given.shape[-1]
    still = given.new_zeros(())
    rows_q, rows_k = (
        as_rows((still if theta is None else theta).expand(*x.shape[:3], R))
        for theta, x in ((theta_q, q), (theta_k, k))
    )
    return rows_q, rows_k, R


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same memory in the same order."""
    if a is None or b is None or a is b:
        return a is b
    return a.data_ptr() == b.data_ptr() != 0 and a.shape == b.shape and a.stride() == b.stride()


def _as_pattern(kind: str, num_pokes: int, N: int) -> AttentionPattern:
    """Pokes alone are a causal sequence; without this, their groups would have no queries to divide by."""
    if kind in ("query_causal", "query_inference") and N == num_pokes:
        return AttentionPattern("causal")
    return AttentionPattern(kind, num_pokes)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
