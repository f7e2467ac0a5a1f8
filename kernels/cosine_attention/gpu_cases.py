"""What `make gpu` checks and times for cosine attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kinema.kernels.cosine_attention import as_pattern, cosine_attention
from kinema.kernels.cosine_attention.patterns import AttentionPattern
from kinema.kernels.cosine_attention.reference import EPS, cosine_attention_reference, rotate, unit
from kinema.kernels.gpu import GpuCase

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
Function = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Size:
    """One call of a model's attention."""

    what: str
    pattern: AttentionPattern
    batch: int
    heads: int
    num_rows: int
    num_keys: int
    head_size: int
    num_angles: int
    dtype: torch.dtype = torch.bfloat16


SIZES = (
    Size("FPT training", as_pattern(("query-causal", 128)), 32, 12, 2048, 2048, 64, 32),
    Size("FPT training", as_pattern(("query-causal", 128)), 32, 12, 2048, 2048, 64, 32, torch.float16),
    Size("FPT training", as_pattern(("query-causal", 128)), 8, 12, 2048, 2048, 64, 32, torch.float32),
    Size("FPT image", as_pattern("full"), 32, 12, 2048, 1024, 64, 32),
    Size("FPT inference", as_pattern(("query-inference", 100)), 8, 12, 4196, 4196, 64, 32),
    Size("DisMo motion", as_pattern("full"), 4, 16, 2052, 2052, 64, 24),
    Size("DisMo generator", as_pattern("full"), 16, 16, 256, 256, 72, 18),
    Size("causal", as_pattern("causal"), 8, 16, 2048, 2048, 128, 64),
)


def cases() -> Iterator[GpuCase]:
    """Forward, and forward with backward, at each size."""
    for size in SIZES:
        yield _case(size, backward=False)
        yield _case(size, backward=True)


def _case(size: Size, backward: bool) -> GpuCase:
    B, H, N, M, D, R = (
        *(size.batch, size.heads, size.num_rows, size.num_keys),
        *(size.head_size, size.num_angles),
    )
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    # Heads behind positions, as linear layers leave them.
    q, k, v, dout = (draw(B, length, H, D).to(size.dtype).transpose(1, 2) for length in (N, M, M, N))
    leaves = [q, k, v, torch.full((H,), 10.0, device="cuda")]
    leaves = [leaf.requires_grad_(backward) for leaf in leaves]
    theta_q = 9 * draw(B, H, N, R)
    theta_k = theta_q if N == M else 9 * draw(B, H, M, R)
    seen = num_seen(size.pattern, N, M)
    # Otherwise shapes of earlier cases count as recompilations, of which torch.compile allows few.
    torch._dynamo.reset()
    sides = _Sides(size.pattern, theta_q, theta_k)
    baselines: dict[str, Function] = {
        "FlexAttention, compiled": sides.flex(N, M),
        "SDPA, compiled": torch.compile(sides.dense(N, M), dynamic=False),
        "reference": sides.reference,
    }
    element = q.element_size()
    row_bytes, key_bytes = B * H * N * D * element, B * H * M * D * element
    angle_bytes = theta_q.nbytes + (0 if theta_k is theta_q else theta_k.nbytes)
    moved = 2 * row_bytes + 2 * key_bytes + angle_bytes
    direction = "forward + backward" if backward else "forward"
    kind = str(size.dtype).removeprefix("torch.")
    return GpuCase(
        name=f"cosine_attention {size.what} {size.pattern.kind} B{B} H{H} {N}x{M} D{D} {kind} {direction}",
        ours=_call(sides.ours, leaves, dout, backward),
        baselines={name: _call(function, leaves, dout, backward) for name, function in baselines.items()},
        check=lambda: _relative_error(sides, leaves, dout, backward),
        tolerance=TOLERANCES[size.dtype],
        # Backward reads inputs, output and its gradient, and writes three gradients.
        bytes_moved=moved + (moved + 2 * row_bytes + 2 * key_bytes if backward else 0),
        # Two products of D per visible pair; backward recomputes one and has four more.
        flops=4.0 * B * H * D * seen * (3.5 if backward else 1.0),
        matrix_dtype=size.dtype,
    )


def num_seen(pattern: AttentionPattern, N: int, M: int) -> int:
    """Pairs of a row and a key that it sees."""
    P = pattern.num_pokes
    if pattern.kind == "full":
        return N * M
    if pattern.kind == "causal":
        return N * (N + 1) // 2
    pokes = P * (P + 1) // 2
    if pattern.kind == "query_inference":
        return pokes + (N - P) * (P + 1)
    return pokes + pattern.queries_per_poke(N) * P * (P + 1) // 2


class _Sides:
    """Ours and other ways to the same numbers; each takes [q, k, v, scale]."""

    def __init__(self, pattern: AttentionPattern, theta_q: Tensor, theta_k: Tensor):
        self.pattern, self.theta_q, self.theta_k = pattern, theta_q, theta_k

    def ours(self, leaves: list[Tensor]) -> Tensor:
        q, k, v, scale = leaves
        return cosine_attention(q, k, v, self.theta_q, self.theta_k, scale, self.pattern, impl="triton")

    def reference(self, leaves: list[Tensor]) -> Tensor:
        q, k, v, scale = leaves
        return cosine_attention_reference(q, k, v, self.theta_q, self.theta_k, scale, self.pattern)

    def flex(self, N: int, M: int) -> Function:
        """FlexAttention with the same blocks left out; normalisation and rotation compiled in front of it."""
        pattern = self.pattern
        block_mask = None
        if pattern.kind != "full":
            block_mask = create_block_mask(
                lambda b, h, row, key: visible(pattern, N, row, key), None, None, N, M, "cuda"
            )

        def attend(leaves: list[Tensor]) -> Tensor:
            q, k = self._turned(leaves)
            return flex_attention(q, k, leaves[2], block_mask=block_mask, scale=1.0)

        return torch.compile(attend, dynamic=False)

    def dense(self, N: int, M: int) -> Function:
        """SDPA with a boolean mask, where one is needed."""
        pattern, mask = self.pattern, None
        if pattern.kind in ("query_causal", "query_inference"):
            rows, keys = torch.arange(N, device="cuda")[:, None], torch.arange(M, device="cuda")[None]
            mask = visible(pattern, N, rows, keys)

        def attend(leaves: list[Tensor]) -> Tensor:
            q, k = self._turned(leaves)
            causal = pattern.kind == "causal"
            return F.scaled_dot_product_attention(q, k, leaves[2], attn_mask=mask, is_causal=causal, scale=1.0)

        return attend

    def _turned(self, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised in float32, rotated, and back in the dtype that came, as the published code does."""
        q, k, _, scale = leaves
        strength = (scale.abs() + EPS).sqrt()[:, None, None]
        turned_q = rotate(unit(q.float()) * strength, self.theta_q)
        turned_k = rotate(unit(k.float()) * strength, self.theta_k)
        return turned_q.to(q.dtype), turned_k.to(k.dtype)


def visible(pattern: AttentionPattern, N: int, row: Tensor, key: Tensor) -> Tensor:
    """Whether rows see keys, from their indices; for every pattern but "full"."""
    if pattern.kind == "causal":
        return key <= row
    P = pattern.num_pokes
    limit = P if pattern.kind == "query_inference" else (row - P) // pattern.queries_per_poke(N)
    return (key == row) | ((row < P) & (key < row)) | ((row >= P) & (key < limit))


def _call(function: Function, leaves: list[Tensor], dout: Tensor, backward: bool) -> Callable[[], Any]:
    if not backward:
        return lambda: function(leaves)
    return lambda: torch.autograd.grad(function(leaves), leaves, dout)


def _relative_error(sides: _Sides, leaves: list[Tensor], dout: Tensor, backward: bool) -> float:
    """Of the result, or of the worst gradient, against the reference in float64; also: the same bytes twice.

    On the first item of the batch: the reference in float64 needs 16 times the memory of the tensors as they are.
    """
    first = _Sides(sides.pattern, sides.theta_q[:1], sides.theta_k[:1])
    q, k, v, scale = leaves
    own = [x.detach()[:1].requires_grad_(backward) for x in (q, k, v)] + [scale.detach().requires_grad_(backward)]
    exact_leaves = [x.detach().double().requires_grad_(backward) for x in own]
    exact = first.reference(exact_leaves)
    found, again = first.ours(own), first.ours(own)
    pairs = [(found, exact)]
    if backward:
        grads, grads_again = (torch.autograd.grad(out, own, dout[:1]) for out in (found, again))
        if not all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True)):
            raise AssertionError("the gradients differ between two runs")
        pairs += zip(grads, torch.autograd.grad(exact, exact_leaves, dout[:1].double()), strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
