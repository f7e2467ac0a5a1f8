"""Settings of `kinema evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinema.configs.checks import require, require_choice
from kinema.configs.models.benchmarks import BENCHMARKS
from kinema.configs.models.table import MODELS


@dataclass(frozen=True)
class PokesConfig:
    """Benchmarks `pokes` and `moving_part` of a Flow Poke Transformer."""

    gap_s: float = 0.0
    """Time from the shown frame to the end of the motion, in seconds; 0: the trained run's own (1 s for names)."""
    counts: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100)
    """Numbers of pokes; those that under half of the clips have tracks for are left out."""
    num_queries: int = 64
    """Points of a clip whose motion is asked for; the same for every number of pokes, and never pokes."""
    draws_per_clip: int = 1
    """Samples (start frame, pokes, queries) of each clip."""
    max_clips: int = 0
    """Clips to evaluate, spread over all; 0 means every clip."""
    pck_thresholds: tuple[float, float, float] = (0.01, 0.05, 0.1)
    """Errors up to which a predicted motion counts as right, in units of the square's side."""
    side_px: int = 512
    """End-point errors are in pixels of the square at this side."""
    grid: int = 48
    """Moving part: the effect of a poke is asked for at grid x grid points of the square."""
    threshold_nats: float = 0.0
    """Moving part: divergence from which a point moves along; 0: chosen on the tuning half of the images."""
    num_scenes: int = 16
    """Moving part, data=scenes: scenes to render."""
    batch_size: int = 8
    """Clips, or pokes of an image, per network call."""
    num_examples: int = 4
    """Pictures of examples."""
    seed: int = 0
    """Seed of every draw."""

    def __post_init__(self) -> None:
        require(self.gap_s >= 0, "pokes.gap_s", self.gap_s, "use a positive number of seconds, or 0")
        rule = "use increasing numbers, at least one above 0"
        increasing = list(self.counts) == sorted(set(self.counts)) and bool(self.counts)
        require(increasing and self.counts[0] >= 0 < self.counts[-1], "pokes.counts", list(self.counts), rule)
        require(min(self.pck_thresholds) > 0, "pokes.pck_thresholds", list(self.pck_thresholds), "use positive errors")
        require(self.threshold_nats >= 0, "pokes.threshold_nats", self.threshold_nats, "use 0 or more nats")
        for name in ("num_queries", "draws_per_clip", "side_px", "batch_size"):
            require(getattr(self, name) >= 1, f"pokes.{name}", getattr(self, name), "use 1 or more")
        for name in ("grid", "num_scenes"):
            require(getattr(self, name) >= 2, f"pokes.{name}", getattr(self, name), "use 2 or more")
        for name in ("max_clips", "num_examples", "seed"):
            require(getattr(self, name) >= 0, f"pokes.{name}", getattr(self, name), "use 0 or more")


@dataclass(frozen=True)
class KNNConfig:
    """Benchmark `knn` of motion embeddings."""

    k: int = 10
    """Neighbours that vote."""
    baselines: bool = True
    """Whether a histogram of flow magnitudes and the features of an untrained image encoder are measured too."""
    num_videos: int = 480
    """data=scenes: clips to render."""
    num_frames: int = 12
    """data=scenes: frames of a clip."""
    close_up: bool = False
    """data=scenes: whether objects fill most of the frame."""
    side_px: int = 64
    """data=scenes: side of a clip; otherwise the shorter side that videos are shrunk to."""
    fps: float = 6.0
    """Folders: frames a second that are looked at, best as many as in the model's training."""
    max_seconds: float = 10.0
    """Folders: of a longer video, its beginning."""
    max_videos: int = 0
    """Folders: videos to look at, spread over all; 0 means every one."""
    seed: int = 1
    """Seed of the rendered clips."""

    def __post_init__(self) -> None:
        for name in ("k", "num_frames", "side_px"):
            require(getattr(self, name) >= 1, f"knn.{name}", getattr(self, name), "use 1 or more")
        require(self.num_videos >= 2, "knn.num_videos", self.num_videos, "use 2 or more")
        for name in ("fps", "max_seconds"):
            require(getattr(self, name) > 0, f"knn.{name}", getattr(self, name), "use a positive number")
        for name in ("max_videos", "seed"):
            require(getattr(self, name) >= 0, f"knn.{name}", getattr(self, name), "use 0 or more")


@dataclass(frozen=True)
class FlowSuiteConfig:
    """Benchmark `flow`: the optical flow benchmarks that a folder holds."""

    datasets: tuple[Literal["sintel", "kitti2012", "kitti2015", "spring", "middlebury"], ...] = ()
    """Which of them; empty: all that are found in `data` or one folder below."""
    models: tuple[str, ...] = ()
    """Further models beside `model`, each as there, or NAME:WEIGHTS (`raft_small:raft-small.pth`)."""
    split: Literal["training", "test"] = "training"
    """test: no measures, but submissions of `model` in `out` for Sintel, KITTI and Spring."""
    worst: int = 3
    """Pairs with the largest error of each model and data set that the page shows."""

    def __post_init__(self) -> None:
        require(self.worst >= 0, "flow.worst", self.worst, "use 0 or more")


@dataclass(frozen=True)
class EvaluateConfig:
    """`kinema evaluate`: a model and a benchmark folder in, one table out."""

    model: str = ""
    """Run folder, checkpoint, registry URI (models:/...) or a flow network's name (dis, raft, sea_raft_m, ...)
    or a tracker's (chain, cotracker3) or a Flow Poke Transformer's (fpt_base)."""
    weights: str = ""
    """Weights for a flow network, tracker or FlowFeat variant given by name; for chain, those of its teacher."""
    benchmark: str = field(default="davis", metadata={"choices": lambda: tuple(BENCHMARKS)})
    """Which measures."""
    data: str = ""
    """The benchmark's folder; TAP-Vid: also a file; TAP-Vid and moving_part: also `scenes`, rendered with known motion.
    knn: `scenes`, or a folder with a sub-folder of videos for each class, or with a labels.csv (file, label, ...)."""
    clips: str = ""
    """Benchmark pokes: a clips artifact that the model was not trained on."""
    tracks: str = ""
    """Benchmark pokes: the tracks artifact of these clips."""
    out: str = ""
    """Folder for the table (JSON, CSV) and pictures; empty: nothing is written."""
    protocols: tuple[Literal["mlp", "propagation", "attention"], ...] = ("mlp",)
    """DAVIS: FlowFeat's MLP, DINO's label propagation, attention probe."""
    sequences: tuple[str, ...] = ()
    """DAVIS sequences; empty means all found."""
    features: Literal["y_dec", "y_enc"] = "y_dec"
    """Which features are evaluated."""
    short_side: int = 480
    """Shorter side of the frames that label propagation compares."""
    iters: int = 0
    """Refinement iterations; 0 means the benchmark's usual number (Sintel 32, KITTI 24, CoTracker3 6)."""
    scale: int = 0
    """SEA-RAFT sees the images at 2^scale times their size."""
    queries: Literal["first", "strided"] = "first"
    """TAP-Vid: points are given where they are first seen, or in every 5th frame in which they are seen."""
    teacher: str = field(default="dis", metadata={"choices": MODELS.teachers})
    """TAP-Vid: the flow network that chain follows."""
    single_queries: bool = False
    """TAP-Vid, cotracker3: each query in a run of its own with a local grid, as in the paper's tables, which takes
    as many times longer as there are queries; otherwise all queries of a video in one run."""
    pokes: PokesConfig = field(default_factory=PokesConfig)
    """Benchmarks pokes and moving_part: how they ask."""
    knn: KNNConfig = field(default_factory=KNNConfig)
    """Benchmark knn: on what, and how."""
    flow: FlowSuiteConfig = field(default_factory=FlowSuiteConfig)
    """Benchmark flow: data sets, models and pages."""
    run_id: str = ""
    """MLflow run that gets the table; empty: the model's own run if it has one."""
    experiment: str = ""
    """MLflow experiment, for a model without a run of its own; empty: the workflow's, else kinema."""

    def __post_init__(self) -> None:
        require_choice("benchmark", self.benchmark, tuple(BENCHMARKS))
        require_choice("teacher", self.teacher, MODELS.teachers())
