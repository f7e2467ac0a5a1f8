"""CoTracker3 as `kinema track` runs it, against the plain network (`plain_cotracker3`), on the CPU.

Both see the frames of one clip at the model's resolution and a grid of points in its first frame; the tracks must
agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinema.models.tracks.cotracker3.network import cotracker3
from kinema.models.tracks.cotracker3.predictor import grid_points
from kinema.pipelines.bench.against_plain import against_plain
from kinema.pipelines.bench.plain_cotracker3 import plain, plain_tracks
from kinema.pipelines.scenes import Scene


def run(
    height: int = 384, width: int = 512, num_frames: int = 24, grid: int = 16, iters: int = 6
) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}; random weights, grid x grid points."""
    torch.manual_seed(0)
    scene = Scene(seed=1, height=height, width=width, num_frames=num_frames)
    video = torch.stack([torch.from_numpy(frame) for frame in scene.frames()]).permute(0, 3, 1, 2)[None].float()
    queries = torch.nn.functional.pad(grid_points(grid, height, width), (1, 0))[None]
    network = cotracker3()
    published = plain(network)

    def ours() -> list[Tensor]:
        return [network(video, queries, iters).tracks]

    def theirs() -> list[Tensor]:
        return [plain_tracks(published, video, queries, iters).tracks]

    name = f"CoTracker3 {height}x{width}, {num_frames} frames, {grid * grid} points, {iters} iterations"
    return against_plain(name, ours, theirs, num_frames, "frames/s, against our plain network")
