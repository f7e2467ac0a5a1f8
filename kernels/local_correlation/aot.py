"""Calls of local correlation that are compiled ahead of time: maps as the models hold them, and large windows."""

from __future__ import annotations

import functools

import torch

from kinema.kernels.ahead_of_time import Case
from kinema.kernels.local_correlation.triton_impl import correlate, window_sum

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
# Channels, radius and layout; the first is quick to compile.
SIZES = (
    (128, 4, "channels-last"),
    (128, 4, "contiguous"),
    (256, 12, "contiguous"),
    (64, 12, "channels-last"),
    (19, 28, "channels-last"),
)


def cases() -> list[Case]:
    """Every dtype in both layouts, and the strips of other radii."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for size in SIZES:
            channels, radius, layout = size
            name = f"{kind} C{channels} r{radius} {layout}"
            quick = size == SIZES[0] and dtype != torch.bfloat16
            found.append(Case(name, functools.partial(_call, dtype, *size), quick))
    return found


def _call(dtype: torch.dtype, channels: int, radius: int, layout: str) -> None:
    maps = [
        torch.empty(2, channels, 64, 96, dtype=dtype, device="meta").contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    ]
    weight = correlate(maps[0], maps[1], radius)
    for mirrored in (False, True):
        window_sum(weight, maps[0], radius, mirrored)
