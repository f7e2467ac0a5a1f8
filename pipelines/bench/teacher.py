"""Flow networks as `kinema teach` runs them, against the plain pairwise networks, on the CPU.

The plain networks (`plain_raft`, `plain_sea_raft`) have the same parameters and see each pair on its own; the flows
must agree. SEA-RAFT stands here twice: over a clip, and for one pair alone, where nothing is shared.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kinema.kernels.correlation_lookup import volume_bytes
from kinema.models.flow.padding import padding_for
from kinema.models.flow.raft.network import RAFT, raft, raft_small
from kinema.models.flow.sea_raft.network import SEARAFT, sea_raft_m
from kinema.pipelines.bench import plain_raft, plain_sea_raft
from kinema.pipelines.bench.against_plain import against_plain
from kinema.pipelines.scenes import Scene

BATCH_PAIRS = 4
FULL_HD = 1080, 1920
HALF_HD = 540, 960
"""What SEA-RAFT's published Spring weights see of full HD."""
Pairs = list[tuple[int, int]]
Plain = Callable[[Any, Tensor, Tensor, int], Tensor]
"""Flow [1, 2, H, W] of one pair of images by a plain network, after so many refinements."""

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
    side: int = 448,
    num_frames: int = 4,
    iters: int = 12,
    half_hd: tuple[int, int] = HALF_HD,
    full_hd: tuple[int, int] = FULL_HD,
) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}; gaps 1 and 2, both directions.

    Args: num_frames, of the clips; the more, the more of the encoders is shared.
    """
    torch.manual_seed(0)
    frames = _frames(side, side, num_frames)
    rows = _compare("RAFT", raft(), _raft, frames, _pairs(num_frames), iters)
    rows += _compare("RAFT-small", raft_small(), _raft, frames, _pairs(num_frames), iters)
    network, frames = sea_raft_m(), _frames(*half_hd, num_frames)
    rows += _compare("SEA-RAFT M", network, _sea_raft, frames, _pairs(num_frames), network.iters)
    rows += _compare("SEA-RAFT M, one pair alone", network, _sea_raft, frames, [(0, 1)], network.iters)
    return [*rows, _memory(*full_hd)]


def _frames(height: int, width: int, num_frames: int) -> Tensor:
    scene = Scene(seed=1, height=height, width=width, num_frames=num_frames)
    return torch.stack([torch.from_numpy(frame) for frame in scene.frames()]).permute(0, 3, 1, 2) / 255


def _pairs(num_frames: int) -> Pairs:
    forward = [(t, t + gap) for gap in (1, 2) for t in range(num_frames - gap)]
    return forward + [(second, first) for first, second in forward]


def _compare(
    name: str, network: RAFT | SEARAFT, plain: Plain, frames: Tensor, pairs: Pairs, iters: int
) -> list[dict[str, Any]]:
    name = f"{name} {frames.shape[-2]}x{frames.shape[-1]}, {iters} iterations"

    def ours() -> list[Tensor]:
        return list(as_teacher(network, frames, pairs, iters))

    def theirs() -> list[Tensor]:
        return [plain(network, frames[first, None], frames[second, None], iters)[0] for first, second in pairs]

    with torch.inference_mode():
        list(as_teacher(network, frames[..., :128, :128], [(0, 1)], iters=1))
        plain(network, frames[:1, :, :128, :128], frames[1:2, :, :128, :128], 1)
    return against_plain(name, ours, theirs, len(pairs), "pairs/s, against our plain network, pair by pair")


def as_teacher(network: RAFT | SEARAFT, frames: Tensor, pairs: Pairs, iters: int) -> Iterator[Tensor]:
    """Flow [2, H, W] of each pair: the frames that are needed encoded once, pairs in batches."""
    features = {i: network.encode(frames[i, None]) for i in sorted({i for pair in pairs for i in pair})}
    stack: Callable[[list[Any]], Any] = type(features[pairs[0][0]]).stack
    for start in range(0, len(pairs), BATCH_PAIRS):
        batch = pairs[start : start + BATCH_PAIRS]
        first, second = (stack([features[i] for i in of_pair]) for of_pair in zip(*batch, strict=True))
        yield from network.flow_from_features(first, second, iters)


def _raft(network: RAFT, first: Tensor, second: Tensor, iters: int) -> Tensor:
    return plain_raft.plain_predictions(network, first, second, iters)[-1]


def _sea_raft(network: SEARAFT, first: Tensor, second: Tensor, iters: int) -> Tensor:
    padding = padding_for(*first.shape[-2:])
    predictions = plain_sea_raft.plain_predictions(network, padding.pad(first), padding.pad(second), iters)
    return padding.unpad(predictions[-1][0])


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
