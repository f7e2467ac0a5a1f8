"""Trackers as TAP-Vid asks for them: a video's frames and queries in, positions and visible flags out."""

from __future__ import annotations

import functools

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8

from kinema.models.flow.networks import FLOW_NETWORKS
from kinema.models.tracks.chaining import chain_tracks
from kinema.models.tracks.cotracker3.network import cotracker3
from kinema.models.tracks.cotracker3.predictor import BenchmarkTracker
from kinema.pipelines.evaluate.tapvid.metrics import QueryMode
from kinema.pipelines.evaluate.tapvid.scores import Tracker
from kinema.pipelines.teach.protocol import Teacher
from kinema.pipelines.teach.teachers import TeacherSpec, locate_weights
from kinema.pipelines.track.trackers import TRACKERS

CHAIN_GAPS = (1, 2, 4, 8)
CACHED_FLOWS = 512
"""Flows of 256 x 256 kept at a time, half a MB each: the walks forwards and backwards in time read the same."""
BENCHMARK_ITERS = 6


class FlowChain:
    """`chain` on a video without stored flow: a teacher computes what the walks ask for."""

    def __init__(self, teacher: Teacher, gaps: tuple[int, ...] = ()) -> None:
        self.teacher, self.gaps = teacher, gaps or CHAIN_GAPS

    def __call__(
        self, frames: UInt8[np.ndarray, "T H W 3"], queries: Float32[np.ndarray, "N 3"]
    ) -> tuple[Float32[np.ndarray, "T N 2"], Bool[np.ndarray, "T N"]]:
        """Positions in pixels of the frames, also before the query, and whether the points are seen."""
        features = [self.teacher.features(frame) for frame in frames]

        @functools.lru_cache(maxsize=CACHED_FLOWS)
        def flow(t: int, gap: int) -> Float32[np.ndarray, "2 H W"]:
            return self.teacher.flow([(features[t], features[t + gap])]).flow_px[0].cpu().numpy()

        T, height, width = frames.shape[:3]
        pairs = [(t, gap) for g in self.gaps for gap in (g, -g) for t in range(T) if 0 <= t + gap < T]
        # A point that is stored as 0..1 may lie on the picture's very edge, or by rounding just behind it.
        edge = np.array([T - 1, width - 1, height - 1], np.float32)
        found = chain_tracks(flow, pairs, T, queries.clip(0, edge), height, width)
        return found.points_px, found.visible


def load_tracker(
    name: str,
    weights: str = "",
    teacher: str = "dis",
    mode: QueryMode = "first",
    single_queries: bool = False,
    iters: int = 0,
) -> Tracker:
    """A tracker by name; without `weights` the published ones of the ledger.

    Args: weights, of cotracker3 or of the flow network that chain follows; teacher, that network; single_queries, each
        query of cotracker3 in a run of its own; iters, refinements (0: the usual number).
    Raises: ValueError for another name, or weights that do not fit or cannot be had.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "chain":
        path, weights_hash = locate_weights(teacher, weights)
        iters = iters or FLOW_NETWORKS[teacher].teacher_iters
        spec = TeacherSpec(teacher, path, weights_hash, iters, device=device, threads=torch.get_num_threads())
        return FlowChain(spec.load())
    if name != "cotracker3":
        raise ValueError(f"model={name} is no tracker; tapvid takes {', '.join(TRACKERS)}")
    model = cotracker3(pretrained=not weights, weights=weights or None).to(device)
    return BenchmarkTracker(model, single_queries, mode == "strided", iters=iters or BENCHMARK_ITERS)
