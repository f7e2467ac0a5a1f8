"""Calls of convex upsampling that are compiled ahead of time: masks as the models hold them."""

from __future__ import annotations

import functools

import torch

from kinema.kernels.ahead_of_time import Case
from kinema.kernels.convex_upsampling.triton_impl import gradients, upsample

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
# Channels, factor, layout of the logits: RAFT's flow; WAFT's flow and information; SEA-RAFT's flow and information.
SIZES = ((2, 8, "channels-last"), (2, 8, "contiguous"), (6, 2, "contiguous"), (6, 8, "channels-last"))


def cases() -> list[Case]:
    """float32 maps with logits of every type."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for size in SIZES:
            channels, factor, layout = size
            call = functools.partial(_call, dtype, *size)
            found.append(Case(f"{kind} C{channels} f{factor} {layout}", call, dtype == torch.float32))
    return found


def _call(dtype: torch.dtype, channels: int, factor: int, layout: str, height: int = 55, width: int = 128) -> None:
    maps = torch.empty(2, channels, height, width, device="meta")
    logits = torch.empty(2, 9 * factor**2, height, width, dtype=dtype, device="meta")
    logits = logits.contiguous(memory_format=LAYOUTS[layout])
    out = upsample(maps, logits, 0.25)
    gradients(torch.empty_like(out), maps, logits, 0.25)
