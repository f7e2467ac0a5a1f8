"""RAFT and RAFT-small as `kinema teach` runs them, against the plain pairwise network, on the CPU in fp32.

The plain network (`plain_raft`) has the same parameters and sees each pair on its own; the flows must agree.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kinema.kernels.correlation_lookup import volume_bytes
from kinema.models.flow.raft.network import RAFT, FrameFeatures, raft, raft_small
from kinema.pipelines.bench.paired import paired
from kinema.pipelines.bench.plain_raft import plain_predictions
from kinema.pipelines.precision import autocast, cpu_multiplies_bf16
from kinema.pipelines.scenes import Scene

ALLOWED_PX = 0.01
BATCH_PAIRS = 4
ROUNDS = 3
FULL_HD = 1080, 1920

_PEAK_OF_ONE_PAIR = """
import sys, torch
from pathlib import Path
from kinema.models.flow.raft.network import raft
height, width = map(int, sys.argv[1:])
with torch.inference_mode():
    raft()(*torch.rand(2, 1, 3, height, width), iters=2)
status = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


def run(
    side: int = 448, num_frames: int = 12, iters: int = 12, full_hd: tuple[int, int] = FULL_HD
) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}; gaps 1 and 2, both directions."""
    torch.manual_seed(0)
    scene = Scene(seed=1, height=side, width=side, num_frames=num_frames)
    frames = torch.stack([torch.from_numpy(frame) for frame in scene.frames()]).permute(0, 3, 1, 2) / 255
    networks = {"RAFT": raft(), "RAFT-small": raft_small()}
    rows = [row for name, network in networks.items() for row in _compare(name, network, frames, iters)]
    return [*rows, _memory(*full_hd)]


def _compare(name: str, network: RAFT, frames: Tensor, iters: int) -> list[dict[str, Any]]:
    pairs = [(t, t + gap) for gap in (1, 2) for t in range(len(frames) - gap)]
    pairs += [(second, first) for first, second in pairs]
    name = f"{name} {frames.shape[-2]}x{frames.shape[-1]}, {iters} iterations"
    with torch.inference_mode():
        for run_once in (as_teacher, pairwise):
            list(run_once(network, frames[:2], [(0, 1)], iters=1))
        flows: dict[str, list[Tensor]] = {}

        def keep(side: str, run_once: Callable[..., Iterator[Tensor]]) -> None:
            flows[side] = list(run_once(network, frames, pairs, iters))

        def in_bf16() -> None:
            with autocast("bf16", "cpu"):
                keep("bf16", as_teacher)

        sides: dict[str, Callable[[], None]] = {
            "ours": partial(keep, "ours", as_teacher),
            "plain": partial(keep, "plain", pairwise),
        }
        if cpu_multiplies_bf16():
            sides["bf16"] = in_bf16
        times = paired(sides, ROUNDS, warm_up=0)
    difference = max((a - b).abs().max().item() for a, b in zip(flows["ours"], flows["plain"], strict=True))
    unit = "pairs/s, against our plain network, pair by pair"
    rows = [times.rate_row(name, "ours", "plain", unit, len(pairs))]
    if "bf16" in sides:  # its error, with published weights on known flow: tests/pipelines/test_teach_precision.py
        rows.append(times.rate_row(f"{name}, products in bf16", "bf16", "plain", f"{unit}, in fp32", len(pairs)))
    return [
        *rows,
        {
            "name": f"{name}, largest difference",
            "value": difference,
            "baseline": ALLOWED_PX,
            "ratio": difference / ALLOWED_PX,
            "unit": "px, between ours and our plain network; allowed: 0.01",
        },
    ]


def as_teacher(network: RAFT, frames: Tensor, pairs: list[tuple[int, int]], iters: int) -> Iterator[Tensor]:
    """Flow [2, H, W] of each pair: frames encoded once, pairs in batches."""
    features = [network.encode(frame[None]) for frame in frames]
    for start in range(0, len(pairs), BATCH_PAIRS):
        batch = pairs[start : start + BATCH_PAIRS]
        first, second = (FrameFeatures.stack([features[i] for i in of_pair]) for of_pair in zip(*batch, strict=True))
        yield from network.flow_from_features(first, second, iters)


def pairwise(network: RAFT, frames: Tensor, pairs: list[tuple[int, int]], iters: int) -> Iterator[Tensor]:
    """Flow [2, H, W] of each pair, by the plain network."""
    for first, second in pairs:
        yield plain_predictions(network, frames[first, None], frames[second, None], iters)[-1][0]


def _memory(height: int, width: int) -> dict[str, Any]:
    """Peak resident memory of a fresh process, against the volume of all products alone."""
    command = [sys.executable, "-c", _PEAK_OF_ONE_PAIR, str(height), str(width)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    ours, volume = int(found.stdout) / 2**30, volume_bytes(1, -(-height // 8), -(-width // 8)) / 2**30
    return {
        "name": f"RAFT {height}x{width}, one pair, peak memory of the process",
        "value": ours,
        "baseline": volume,
        "ratio": volume / ours,
        "unit": "GiB, against the all-pairs volume alone",
    }
