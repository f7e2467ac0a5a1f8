"""Attention with the Flow Poke Transformer's training pattern on the CPU, against a dense boolean mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.kernels import cosine_attention
from kinema.kernels.cosine_attention.reference import rotate, unit
from kinema.pipelines.bench.paired import paired

Function = Callable[..., Tensor]


def run(
    heads: int = 8, head_size: int = 64, num_pokes: int = 128, queries_per_poke: int = 15, rounds: int = 7
) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}: milliseconds; ratio = baseline / ours.

    Normalisation, rotation and scale are part of both sides.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = {
        "query-causal": num_pokes * (1 + queries_per_poke),
        "query-inference": num_pokes * (1 + queries_per_poke),
    }
    rows = []
    for kind, length in patterns.items():
        q, k, v, dout = (torch.randn(1, heads, length, head_size, generator=generator) for _ in range(4))
        theta = torch.randn(1, heads, length, head_size // 2, generator=generator)
        mask = dense_mask(kind, num_pokes, length)
        scale = torch.full((heads,), 10.0)
        sides: dict[str, Function] = {
            "ours": _ours(theta, (kind, num_pokes)),
            "dense mask": _masked(theta, mask),
        }
        leaves = [x.requires_grad_() for x in (q, k, v, scale)]
        for what, work in (("forward", _forward), ("forward + backward", _forward_and_backward)):
            times = paired({name: partial(work, function, leaves, dout) for name, function in sides.items()}, rounds)
            title = f"{kind} H{heads} D{head_size} P{num_pokes} x {queries_per_poke} {what} vs dense mask"
            rows.append(times.row(title, "ours", "dense mask"))
        with torch.no_grad():
            difference = (sides["ours"](*leaves) - sides["dense mask"](*leaves)).abs().max().item()
        rows.append(
            {
                "name": f"{kind}: largest difference",
                "value": difference,
                "baseline": 1e-5,
                "ratio": 1e-5 / difference,
                "unit": "absolute, and what is allowed",
            }
        )
    return rows


def dense_mask(kind: str, num_pokes: int, length: int) -> Tensor:
    """[length, length], True where a row sees a key."""
    row, key = torch.arange(length)[:, None], torch.arange(length)[None]
    group = (row - num_pokes) // ((length - num_pokes) // num_pokes)
    seen_by_queries = key < (group if kind == "query-causal" else torch.full_like(group, num_pokes))
    return (key == row) | torch.where(row < num_pokes, key < row, seen_by_queries)


def _ours(theta: Tensor, pattern: tuple[str, int]) -> Function:
    return lambda q, k, v, scale: cosine_attention(q, k, v, theta, theta, scale, pattern, impl="reference")


def _masked(theta: Tensor, mask: Tensor) -> Function:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        strength = (scale.abs() + 1e-6).sqrt()[:, None, None]
        turned = (rotate(unit(x) * strength, theta) for x in (q, k))
        return F.scaled_dot_product_attention(next(turned), next(turned), v, attn_mask=mask, scale=1.0)

    return attend


def _forward(function: Function, leaves: list[Tensor], dout: Tensor) -> None:
    with torch.no_grad():
        function(*leaves)


def _forward_and_backward(function: Function, leaves: list[Tensor], dout: Tensor) -> None:
    torch.autograd.grad(function(*leaves), leaves, dout)
