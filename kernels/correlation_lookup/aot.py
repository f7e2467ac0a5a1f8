"""Calls of the correlation lookup that are compiled ahead of time: maps as the models hold them."""

from __future__ import annotations

import functools

import torch

from kinema.kernels.ahead_of_time import Case
from kinema.kernels.correlation_lookup.op import form_gradients, form_windows, prepare_maps, split_rows
from kinema.kernels.correlation_lookup.stored import read_windows, spread_gradient

RADIUS, LEVELS = 4, 4


def cases() -> list[Case]:
    """Every dtype for maps of RAFT; channels that only the smallest block divides; maps that are channels-last."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for channels, layout in ((256, torch.contiguous_format), (256, torch.channels_last), (40, torch.channels_last)):
            name = f"{kind} C{channels} {'channels-last' if layout == torch.channels_last else 'contiguous'}"
            quick = channels == 256 and layout == torch.channels_last and dtype != torch.float16
            found.append(Case(name, functools.partial(_call, dtype, channels, layout), quick))
    tf32 = functools.partial(_call, torch.float32, 256, torch.channels_last, "tf32")
    found.append(Case("tf32 C256 channels-last", tf32))
    found.append(Case("float32 volume", _call_stored))
    return found


def _call(
    dtype: torch.dtype,
    channels: int,
    layout: torch.memory_format,
    precision: str = "float32",
    height: int = 55,
    width: int = 128,
) -> None:
    def fmap(level: int) -> torch.Tensor:
        shape = (2, channels, height >> level, width >> level)
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)

    pyramid = [fmap(level) for level in range(LEVELS)]
    coords = torch.empty(2, 2, height, width, device="meta")
    maps = prepare_maps(fmap(0), pyramid, precision)
    if dtype == torch.float32:
        # The operation gives tensors on "meta" no launch.
        maps = maps._replace(
            parts=[*split_rows(maps.queries.flatten(1, 2), precision), *split_rows(maps.targets, precision)]
        )
    out = form_windows(maps, coords, RADIUS, False)
    form_gradients(torch.empty_like(out), maps, coords, RADIUS, False, True, True)


def _call_stored(height: int = 55, width: int = 128) -> None:
    pyramid = [torch.empty(2, height * width, height >> k, width >> k, device="meta") for k in range(LEVELS)]
    coords = torch.empty(2, 2, height, width, device="meta")
    out = read_windows(pyramid, coords, RADIUS, False)
    spread_gradient(out, coords, [v.shape[2] for v in pyramid], [v.shape[3] for v in pyramid], RADIUS, False)
