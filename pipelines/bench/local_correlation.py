"""Local correlation on the CPU: windows as bands of matrix products, against unfolding them, at RAFT's size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.kernels import local_correlation
from kinema.kernels.local_correlation.reference import local_correlation_plain
from kinema.pipelines.bench.paired import paired

Function = Callable[[Tensor, Tensor, int], Tensor]


def run(
    channels: int = 128, height: int = 55, width: int = 128, radius: int = 4, rounds: int = 5
) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}: milliseconds; ratio = baseline / ours."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, channels, height, width, generator=generator) for _ in range(2)]
    weight = torch.randn(1, (2 * radius + 1) ** 2, height, width, generator=generator)
    sides: dict[str, Function] = {
        "ours": lambda a, b, r: local_correlation(a, b, r, impl="reference"),
        "unfold": local_correlation_unfolded,
        "shifted multiply": local_correlation_plain,
    }
    rows = []
    for what, work in (("forward", _forward), ("forward + backward", _forward_and_backward)):
        times = paired(
            {name: partial(work, function, maps, weight, radius) for name, function in sides.items()}, rounds
        )
        title = f"C{channels} {height}x{width} r{radius} {what}"
        rows += [times.row(f"{title} vs {name}", "ours", name) for name in sides if name != "ours"]
    return rows


def local_correlation_unfolded(fmap1: Tensor, fmap2: Tensor, radius: int) -> Tensor:
    """The plain way: every window of fmap2 copied out, then multiplied and summed."""
    B, C, H, W = fmap1.shape
    window = 2 * radius + 1
    windows = F.unfold(fmap2, window, padding=radius).view(B, C, window**2, H, W)
    return (fmap1.unsqueeze(2) * windows).sum(1) / C**0.5


def _forward(function: Function, maps: list[Tensor], weight: Tensor, radius: int) -> None:
    function(maps[0], maps[1], radius)


def _forward_and_backward(function: Function, maps: list[Tensor], weight: Tensor, radius: int) -> None:
    leaves = [fmap.detach().requires_grad_() for fmap in maps]
    torch.autograd.grad(function(leaves[0], leaves[1], radius), leaves, weight)
