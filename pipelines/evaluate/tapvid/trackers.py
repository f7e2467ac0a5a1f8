"""Trackers as TAP-Vid asks for them: a video's frames and queries in, positions and visible flags out."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8

from kinema.configs.models.row import resolve
from kinema.configs.models.table import MODELS
from kinema.models.tracks.alltracker.predictor import BenchmarkAllTracker
from kinema.models.tracks.chaining import chain_tracks
from kinema.models.tracks.cotracker3.network import cotracker3
from kinema.models.tracks.cotracker3.predictor import BenchmarkTracker
from kinema.pipelines.evaluate.tapvid.metrics import QueryMode
from kinema.pipelines.evaluate.tapvid.scores import Tracker
from kinema.pipelines.teach import facts_of
from kinema.pipelines.teach.protocol import Teacher
from kinema.pipelines.teach.teachers import TeacherSpec, locate_weights

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


@dataclass(frozen=True)
class TrackerSettings:
    """How a benchmark asks for its tracker."""

    name: str
    """A tracker of the table of models."""
    weights: str = ""
    """Its own, or those of the flow network that it follows; empty: the published ones."""
    teacher: str = "dis"
    """The flow network that a chain follows."""
    mode: QueryMode = "first"
    """When points are given."""
    single_queries: bool = False
    """Each query in a run of its own."""
    iters: int = 0
    """Refinements; 0: the usual number."""

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cuda" if torch.cuda.is_available() else "cpu"


def load_tracker(settings: TrackerSettings) -> Tracker:
    """A tracker of whole videos. Raises: ValueError for another name, or weights that do not fit or cannot be had."""
    facts = MODELS[settings.name].tracker if settings.name in MODELS else None
    if facts is None:
        raise ValueError(f"model={settings.name} is no tracker; tapvid takes {', '.join(MODELS.trackers())}")
    return resolve(facts.benchmark)(settings)


def chain_benchmark(settings: TrackerSettings) -> Tracker:
    """Flow of a teacher, chained."""
    teacher = settings.teacher
    path, weights_hash = locate_weights(teacher, settings.weights)
    iters = settings.iters or facts_of(teacher).iters
    threads = torch.get_num_threads()
    spec = TeacherSpec(teacher, path, weights_hash, iters, device=settings.device, threads=threads)
    return FlowChain(spec.load())


def cotracker3_benchmark(settings: TrackerSettings) -> Tracker:
    """CoTracker3 as in its paper's tables."""
    weights = settings.weights
    model = cotracker3(pretrained=not weights, weights=weights or None).to(settings.device)
    iters = settings.iters or BENCHMARK_ITERS
    return BenchmarkTracker(model, settings.single_queries, settings.mode == "strided", iters=iters)


def alltracker_benchmark(settings: TrackerSettings) -> Tracker:
    """AllTracker as in its paper's tables, at 384 x 512."""
    row = MODELS[settings.name]
    model = row.make(pretrained=not settings.weights, weights=settings.weights).to(settings.device)
    assert row.tracker is not None
    return BenchmarkAllTracker(model, settings.iters or row.tracker.iters)
