"""What `make gpu` checks and times for cosine attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kinema.kernels.cosine_attention import as_pattern, cosine_attention
from kinema.kernels.cosine_attention.patterns import AttentionPattern
from kinema.kernels.cosine_attention.reference import EPS, cosine_attention_reference, rotate, unit
from kinema.kernels.gpu.candidates import Candidates
from kinema.kernels.gpu.cases import GpuCase, relative_error
from kinema.kernels.tuning import Config, Key

DEVICE = "cuda"
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
    directions: tuple[bool, ...] = (False, True)
    """Whether backward, of each case."""
    compared: bool = True
    """With baselines, which take their time to compile."""


_POKES = as_pattern(("query-causal", 128))
SIZES = {
    "FPT training": (Size("FPT training", _POKES, 32, 12, 2048, 2048, 64, 32),),
    "FPT training, other types": (
        Size("FPT training", _POKES, 32, 12, 2048, 2048, 64, 32, torch.float16, compared=False),
        Size("FPT training", _POKES, 8, 12, 2048, 2048, 64, 32, torch.float32),
    ),
    "FPT inference": (
        Size("FPT inference", as_pattern(("query-inference", 100)), 8, 12, 4196, 4196, 64, 32, directions=(False,)),
        Size("FPT image", as_pattern("full"), 32, 12, 2048, 1024, 64, 32),
    ),
    "DisMo motion": (Size("DisMo motion", as_pattern("full"), 4, 16, 2052, 2052, 64, 24),),
    "DisMo generator": (Size("DisMo generator", as_pattern("full"), 16, 16, 256, 256, 72, 18),),
    "causal": (Size("causal", as_pattern("causal"), 8, 16, 2048, 2048, 128, 64),),
}
TOYS = (
    Size("toy", as_pattern(("query-causal", 40)), 1, 3, 160, 160, 64, 32),
    Size("toy", as_pattern(("query-causal", 40)), 1, 3, 160, 160, 64, 32, torch.float32),
    Size("toy", as_pattern(("query-inference", 33)), 2, 2, 70, 70, 64, 32, torch.float16),
    Size("toy", as_pattern("full"), 2, 2, 70, 133, 72, 18),
    Size("toy", as_pattern("full"), 1, 2, 63, 200, 72, 18, torch.float32),
    Size("toy", as_pattern("causal"), 1, 2, 130, 130, 128, 64, torch.float16),
)


def cases(what: str) -> Iterator[GpuCase]:
    """Forward, and forward with backward, at the sizes of one name."""
    for size in SIZES[what]:
        yield from _both_directions(size)


def toys(argument: None) -> Iterator[GpuCase]:
    """Small shapes of every pattern and dtype: checked, not timed."""
    for size in TOYS:
        for case in _both_directions(dataclasses.replace(size, compared=False)):
            yield dataclasses.replace(case, timed=False)


def candidates() -> Iterator[Candidates]:
    """Tiles worth trying for the sizes that train most."""
    from kinema.kernels.cosine_attention.tuning import bucket_of, choose_config

    tiles = ((128, 64), (64, 64), (128, 32), (64, 32), (128, 128))
    for what, kind in (("FPT training", "query_causal"), ("DisMo motion", "full")):
        size = SIZES[what][0]
        for kernel, function in (
            ("forward", "forward_kernel"),
            ("rows", "backward_rows_kernel"),
            ("keys", "backward_keys_kernel"),
        ):
            key = Key("cosine_attention", kernel, "bfloat16", bucket_of(size.head_size), kind)
            default = choose_config(kernel, size.dtype, kind, size.head_size, torch.device("cpu"))
            # A warp group multiplies with 64 rows of what stays: rows, or keys.
            stays = 1 if kernel == "keys" else 0
            options = (Config(t, 4 * max(1, t[stays] // 64), n) for t in tiles for n in (2, 3))
            configs = dict.fromkeys((default, *options))
            yield Candidates(key, tuple(configs), function, functools.partial(_tuned_call, size, kernel))


def _tuned_call(size: Size, kernel: str, device: str) -> Callable[[], Any]:
    """The operation below autograd: a forward, or a backward, whose other kernel stays what it is."""
    from kinema.kernels.cosine_attention.op import run_backward, run_forward

    q, k, v, dout = _tensors(size, device)
    scale, theta = _scale(size, device), _angles(size, device)
    known = (size.pattern.kind, size.pattern.num_pokes)
    if kernel == "forward":
        return lambda: run_forward(q, k, v, *theta, scale, *known)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], device=device)
    return lambda: run_backward(dout, q, k, v, *theta, scale, out, lse, *known)


def _tensors(size: Size, device: str) -> list[Tensor]:
    """q, k, v, dout with heads behind positions, as linear layers leave them."""
    lengths = (size.num_rows, size.num_keys, size.num_keys, size.num_rows)
    shape = (size.heads, size.head_size)
    return [
        _draw(n, device, size.batch, length, *shape).to(size.dtype).transpose(1, 2) for n, length in enumerate(lengths)
    ]


def _angles(size: Size, device: str) -> tuple[Tensor, Tensor]:
    theta_q = 9 * _draw(4, device, size.batch, size.heads, size.num_rows, size.num_angles)
    if size.num_rows == size.num_keys:
        return theta_q, theta_q
    return theta_q, 9 * _draw(5, device, size.batch, size.heads, size.num_keys, size.num_angles)


def _scale(size: Size, device: str) -> Tensor:
    return torch.full((size.heads,), 10.0, device=device)


def _draw(seed: int, device: str, *shape: int) -> Tensor:
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, device=device, generator=generator)


def _both_directions(size: Size) -> Iterator[GpuCase]:
    """Two cases on the same tensors and compiled baselines."""
    B, H, N, M, D = size.batch, size.heads, size.num_rows, size.num_keys, size.head_size
    q, k, v, dout = _tensors(size, DEVICE)
    theta_q, theta_k = _angles(size, DEVICE)
    sides = _Sides(size.pattern, theta_q, theta_k)
    functions = sides.baselines(N, M) if size.compared else {}
    row_bytes, key_bytes = q.nbytes, k.nbytes
    moved = 2 * row_bytes + 2 * key_bytes + theta_q.nbytes + (0 if theta_k is theta_q else theta_k.nbytes)
    kind = str(size.dtype).removeprefix("torch.")
    for backward in size.directions:
        leaves = [x.detach().requires_grad_(backward) for x in (q, k, v, _scale(size, DEVICE))]
        yield GpuCase(
            name=f"{size.what} {size.pattern.kind} B{B} H{H} {N}x{M} D{D} {kind} "
            + ("forward + backward" if backward else "forward"),
            ours=_call(sides.ours, leaves, dout, backward),
            baselines={name: _call(function, leaves, dout, backward) for name, function in functions.items()},
            check=functools.partial(_errors, sides, leaves, dout, backward),
            tolerance=TOLERANCES[size.dtype],
            # Backward reads inputs, output and its gradient, and writes three gradients.
            bytes_moved=moved + (moved + 2 * row_bytes + 2 * key_bytes if backward else 0),
            # Two products of D per visible pair; backward recomputes one and has four more.
            flops=4.0 * B * H * D * num_seen(size.pattern, N, M) * (3.5 if backward else 1.0),
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

    def baselines(self, N: int, M: int) -> dict[str, Function]:
        """Each compiled once, for both directions."""
        found = {"FlexAttention, compiled": self.flex(N, M)}
        if self.pattern.kind in ("full", "causal"):
            found["SDPA, cuDNN"] = self.sdpa(SDPBackend.CUDNN_ATTENTION)
            found["SDPA, flash"] = self.sdpa(SDPBackend.FLASH_ATTENTION)
        else:
            found["SDPA, mask"] = self.masked(N, M)
        return found

    def flex(self, N: int, M: int) -> Function:
        """FlexAttention with the same blocks left out; normalisation and rotation compiled in front of it."""
        pattern = self.pattern
        block_mask = None
        if pattern.kind != "full":
            block_mask = create_block_mask(
                lambda b, h, row, key: visible(pattern, N, row, key), None, None, N, M, DEVICE
            )

        def attend(leaves: list[Tensor]) -> Tensor:
            q, k = self._turned(leaves)
            return flex_attention(q, k, leaves[2], block_mask=block_mask, scale=1.0)

        return torch.compile(attend, dynamic=False)

    def masked(self, N: int, M: int) -> Function:
        """SDPA with a boolean mask, in front of it what `flex` has there, compiled."""
        rows, keys = torch.arange(N, device=DEVICE)[:, None], torch.arange(M, device=DEVICE)[None]
        mask = visible(self.pattern, N, rows, keys)

        def attend(leaves: list[Tensor]) -> Tensor:
            q, k = self._turned(leaves)
            return F.scaled_dot_product_attention(q, k, leaves[2], attn_mask=mask, scale=1.0)

        return torch.compile(attend, dynamic=False)

    def sdpa(self, backend: SDPBackend) -> Function:
        """SDPA through one library, which says so where it cannot; normalisation and rotation compiled in front."""
        turned, causal = torch.compile(self._turned, dynamic=False), self.pattern.kind == "causal"

        def attend(leaves: list[Tensor]) -> Tensor:
            q, k = turned(leaves)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, leaves[2], is_causal=causal, scale=1.0)

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


def scale_terms(
    leaves: list[Tensor], theta_q: Tensor, theta_k: Tensor, pattern: AttentionPattern, dout: Tensor
) -> Tensor:
    """Sum of the absolute terms of each head's gradient of the scale, dense in float64.

    The gradient itself is a sum over all pairs of a row and a key that cancels, so that its own size says nothing about
    how exactly it can be summed.
    """
    q, k, v, scale = (x.detach().double() for x in leaves)
    N, M = q.shape[2], k.shape[2]
    sums = torch.zeros_like(scale)
    for head in range(q.shape[1]):
        own = slice(head, head + 1)
        turned = [rotate(unit(x[:, own]), _of_head(theta, head)) for x, theta in ((q, theta_q), (k, theta_k))]
        cosines = turned[0] @ turned[1].transpose(2, 3)
        logits = cosines * (scale[head].abs() + EPS)
        if pattern.kind != "full":
            rows, keys = torch.arange(N, device=q.device)[:, None], torch.arange(M, device=q.device)[None]
            logits = logits.masked_fill(~visible(pattern, N, rows, keys), float("-inf"))
        weights = logits.softmax(dim=-1)
        dweights = dout[:, own].double() @ v[:, own].transpose(2, 3)
        dlogits = weights * (dweights - (weights * dweights).sum(dim=-1, keepdim=True))
        sums[head] = (dlogits * cosines).abs().sum()
    return sums


def _of_head(theta: Tensor, head: int) -> Tensor:
    return theta if theta.shape[1] == 1 else theta[:, head : head + 1]


def _errors(sides: _Sides, leaves: list[Tensor], dout: Tensor, backward: bool) -> dict[str, float]:
    """Of the result and the gradients, against the reference in float64; also: the same bytes twice.

    On the first item of the batch: the reference in float64 needs 16 times the memory of the tensors as they are.
    """
    first = _Sides(sides.pattern, sides.theta_q[:1], sides.theta_k[:1])
    q, k, v, scale = leaves
    own = [x.detach()[:1].requires_grad_(backward) for x in (q, k, v)] + [scale.detach().requires_grad_(backward)]
    exact_leaves = [x.detach().double().requires_grad_(backward) for x in own]
    exact = first.reference(exact_leaves)
    found, again = first.ours(own), first.ours(own)
    errors = {"out": relative_error(found.detach(), exact.detach())}
    if not torch.equal(found, again):
        raise AssertionError("the results differ between two runs")
    if backward:
        grads, grads_again = (torch.autograd.grad(out, own, dout[:1]) for out in (found, again))
        if not all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True)):
            raise AssertionError("the gradients differ between two runs")
        exact_grads = torch.autograd.grad(exact, exact_leaves, dout[:1].double())
        for name, a, b in zip(("dq", "dk", "dv"), grads, exact_grads, strict=False):
            errors[name] = relative_error(a, b)
        terms = scale_terms(own, first.theta_q, first.theta_k, first.pattern, dout[:1])
        errors["dscale"] = ((grads[3].double() - exact_grads[3]).abs() / terms).max().item()
    return errors
