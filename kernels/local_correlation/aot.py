"""Calls of local correlation that are compiled ahead of time: maps as the models hold them, and large windows."""

from __future__ import annotations

import functools

import torch

from kinema.kernels.ahead_of_time import Case
from kinema.kernels.local_correlation.triton_impl import correlate, window_sum

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
HEIGHT, WIDTH = 64, 96
ODD_WIDTH = 90
"""Rows of it begin at no multiple of 16 bytes in 16-bit maps that are contiguous."""
# Channels, radius, layout and width; the first is quick to compile.
SIZES = (
    (128, 4, "channels-last", WIDTH),
    (256, 4, "channels-last", WIDTH),
    (128, 4, "contiguous", WIDTH),
    (128, 3, "contiguous", ODD_WIDTH),
    (256, 12, "contiguous", WIDTH),
    (64, 12, "channels-last", WIDTH),
    (19, 28, "channels-last", WIDTH),
    (600, 2, "channels-last", WIDTH),
)


def cases() -> list[Case]:
    """Every dtype in both layouts, and the strips of other radii."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for size in SIZES:
            channels, radius, layout, width = size
            name = f"{kind} C{channels} r{radius} {layout}{'' if width == WIDTH else f' W{width}'}"
            quick = size in SIZES[:2] and dtype != torch.bfloat16
            found.append(Case(name, functools.partial(_call, dtype, *size), quick))
    return found


def _call(dtype: torch.dtype, channels: int, radius: int, layout: str, width: int) -> None:
    maps = [
        torch.empty(2, channels, HEIGHT, width, dtype=dtype, device="meta").contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    ]
    weight = correlate(maps[0], maps[1], radius)
    for mirrored in (False, True):
        window_sum(weight, maps[0], radius, mirrored)
