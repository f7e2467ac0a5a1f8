"""Local correlation on the CPU: windows as bands of matrix products, against unfolding them, at RAFT's size."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.kernels import local_correlation
from kinema.kernels.local_correlation.reference import local_correlation_plain

Function = Callable[[Tensor, Tensor, int], Tensor]


def run(
    channels: int = 128, height: int = 55, width: int = 128, radius: int = 4, rounds: int = 5
) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}: milliseconds; ratio = baseline / ours, the best of each.

    The sides take turns, so that other load falls on all of them.
    """
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, channels, height, width, generator=generator) for _ in range(2)]
    weight = torch.randn(1, (2 * radius + 1) ** 2, height, width, generator=generator)
    sides: dict[str, Function] = {
        "ours": lambda a, b, r: local_correlation(a, b, r, impl="reference"),
        "unfold": local_correlation_unfolded,
        "shifted multiply": local_correlation_plain,
    }
    rows = []
    for what, measure in (("forward", _forward), ("forward + backward", _forward_and_backward)):
        best = dict.fromkeys(sides, float("inf"))
        for _ in range(rounds):
            for name, function in sides.items():
                best[name] = min(best[name], measure(function, maps, weight, radius))
        rows += [
            {
                "name": f"C{channels} {height}x{width} r{radius} {what} vs {name}",
                "value": 1e3 * best["ours"],
                "baseline": 1e3 * best[name],
                "ratio": best[name] / best["ours"],
                "unit": "ms",
            }
            for name in sides
            if name != "ours"
        ]
    return rows


def local_correlation_unfolded(fmap1: Tensor, fmap2: Tensor, radius: int) -> Tensor:
    """The plain way: every window of fmap2 copied out, then multiplied and summed."""
    B, C, H, W = fmap1.shape
    window = 2 * radius + 1
    windows = F.unfold(fmap2, window, padding=radius).view(B, C, window**2, H, W)
    return (fmap1.unsqueeze(2) * windows).sum(1) / C**0.5


def _forward(function: Function, maps: list[Tensor], weight: Tensor, radius: int) -> float:
    started = time.perf_counter()
    function(maps[0], maps[1], radius)
    return time.perf_counter() - started


def _forward_and_backward(function: Function, maps: list[Tensor], weight: Tensor, radius: int) -> float:
    leaves = [fmap.clone().requires_grad_() for fmap in maps]
    started = time.perf_counter()
    torch.autograd.grad(function(leaves[0], leaves[1], radius), leaves, weight)
    return time.perf_counter() - started
