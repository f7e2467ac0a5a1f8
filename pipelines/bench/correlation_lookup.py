"""Correlation lookups formed on demand against the all-pairs volume, on the CPU: time and memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.kernels.correlation_lookup import (
    correlation_lookup,
    correlation_pyramid,
    feature_pyramid,
    plan_lookup,
    volume_bytes,
    volume_lookup,
)
from kinema.kernels.correlation_lookup.gpu_cases import grid_sampled
from kinema.pipelines.bench.paired import paired

ROUNDS = 3
RADIUS, CHANNELS = 4, 256
MEMORY_SIZES = ((28, 48), (56, 96), (112, 192))
"""Each has four times the pixels of the one before."""
ITERS = 12


def run() -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}; smooth motion with noise, fp32, one thread."""
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = _time_rows(55, 128) + _time_rows(90, 160)
        rows += [_memory_row(*size) for size in MEMORY_SIZES]
    peaks = [row["value"] for row in rows[-len(MEMORY_SIZES) :]]
    growth = peaks[-1] / peaks[-2]
    return [
        *rows,
        {
            "name": "memory of a lookup at 4 times the pixels",
            "value": growth,
            "baseline": 4.0,
            "ratio": growth / 4.0,
            "unit": "times, against linear growth (the volume's is 16)",
        },
    ]


def lookup_inputs(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Channels-last maps [1, C, H, W], and coords of smooth motion (6 px) with noise of a third of a pixel."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, CHANNELS, height, width)
    maps = [torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    low = 6 * torch.randn(1, 2, height // 12, width // 12, generator=generator)
    smooth = F.interpolate(low, size=(height, width), mode="bicubic", align_corners=True)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    noise = 0.3 * torch.randn(1, 2, height, width, generator=generator)
    return maps[0], maps[1], torch.stack([x, y]) + smooth + noise


def _time_rows(height: int, width: int) -> list[dict[str, Any]]:
    fmap1, fmap2, coords = lookup_inputs(height, width)
    pooled, volume = feature_pyramid(fmap2), correlation_pyramid(fmap1, fmap2)
    times = paired(
        {
            "on demand": lambda: correlation_lookup(fmap1, pooled, coords, RADIUS, impl="reference"),
            "grid_sample": lambda: grid_sampled(volume, coords),
            "gather": lambda: volume_lookup(volume, coords, RADIUS),
            "build": lambda: correlation_pyramid(fmap1, fmap2),
        },
        ROUNDS,
    )
    demanded = times.sum("of a network, on demand", {"on demand": ITERS})
    sampled = times.sum("of a network, grid_sample", {"build": 1, "grid_sample": ITERS})
    gathered = times.sum("of a network, gather", {"build": 1, "gather": ITERS})
    name = f"lookup C{CHANNELS} {height}x{width} r{RADIUS}"
    plan = plan_lookup(1, height, width, CHANNELS, ITERS, 16 * 2**30, radius=RADIUS)
    return [
        times.row(f"{name}, {ITERS} on demand, against volume + grid_sample", demanded, sampled, "s", 1),
        times.row(
            f"{name}, {ITERS} on demand, against volume + gather", demanded, gathered, f"s; planned: {plan.kind}", 1
        ),
        times.row(f"{name}, volume read by gather, against grid_sample", "gather", "grid_sample", "s", 1),
    ]


def _row(name: str, value: float, baseline: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "baseline": baseline, "ratio": baseline / value, "unit": unit}


def _memory_row(height: int, width: int) -> dict[str, Any]:
    fmap1, fmap2, coords = lookup_inputs(height, width)
    pooled = feature_pyramid(fmap2)
    with _Tracked() as tracked:
        correlation_lookup(fmap1, pooled, coords, RADIUS, impl="reference")
    volume = volume_bytes(1, height, width)
    name = f"lookup C{CHANNELS} {height}x{width} r{RADIUS}, peak memory, against the volume"
    return _row(name, tracked.peak_bytes / 2**20, volume / 2**20, "MiB")


class _Tracked(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.alive.values()))
        return out
