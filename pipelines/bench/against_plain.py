"""A network as a stage runs it, in float32 and with products in bf16, against the same network written plainly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kinema.pipelines.bench.paired import paired
from kinema.pipelines.precision import autocast, cpu_multiplies_bf16

Work = Callable[[], Sequence[Tensor]]
ALLOWED_PX = 0.01
ROUNDS = 3


def against_plain(name: str, ours: Work, plain: Work, items: int, unit: str) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}: medians of `ROUNDS` in which the sides take turns.

    Args:
        ours, plain: flow or positions in pixels, the same in both.
        items: what a round does, in numbers of `unit`.
    """
    found: dict[str, list[Tensor]] = {}

    def keep(side: str, work: Work) -> None:
        found[side] = list(work())

    def in_bf16() -> None:
        with autocast("bf16", "cpu"):
            keep("bf16", ours)

    sides: dict[str, Callable[[], None]] = {"ours": partial(keep, "ours", ours), "plain": partial(keep, "plain", plain)}
    if cpu_multiplies_bf16():
        sides["bf16"] = in_bf16
    with torch.inference_mode():
        times = paired(sides, ROUNDS, warm_up=0)
    rows = [times.rate_row(name, "ours", "plain", unit, items)]
    if "bf16" in sides:
        rows.append(times.rate_row(f"{name}, products in bf16", "bf16", "plain", f"{unit}, in fp32", items))
        moved = _mean_difference(found["bf16"], found["ours"])
        rows.append(_row(f"{name}, mean difference", moved, ALLOWED_PX, "px, between bf16 and fp32, these weights"))
    largest = max((a - b).abs().max().item() for a, b in zip(found["ours"], found["plain"], strict=True))
    return [*rows, _row(f"{name}, largest difference", largest, ALLOWED_PX, "px, to the plain network; allowed: 0.01")]


def _mean_difference(these: list[Tensor], those: list[Tensor]) -> float:
    return sum((a - b).abs().mean().item() for a, b in zip(these, those, strict=True)) / len(those)


def _row(name: str, value: float, baseline: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "baseline": baseline, "ratio": value / baseline, "unit": unit}
