"""Settings of `kinema track`: point tracks over clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinema.configs.checks import require, require_choice
from kinema.configs.models.table import MODELS


@dataclass(frozen=True)
class TrackConfig:
    """`kinema track`: clips/ (and flow/) in, tracks/TRACKER out."""

    clips: str = ""
    """The clips artifact."""
    flow: str = ""
    """The flow artifact that `chain` follows (gap 1 in both directions; longer gaps bridge occlusions)."""
    out: str = ""
    """Folder or URL of the tracks artifact; empty: tracks/TRACKER beside clips."""
    tracker: str = field(default="chain", metadata={"choices": MODELS.trackers})
    """`chain` follows stored flow and needs no weights; the networks look at the frames."""
    weights: str = ""
    """Checkpoint file or URL of the tracker; empty: the published weights of the ledger."""
    grid: int = 16
    """Tracks are started on grid x grid points of a frame."""
    start_frames: tuple[int, ...] = (0,)
    """Frames in which grids are started, tracked forwards and backwards. Negative ones count from the clip's end; in a
    clip without such a frame the nearest one is meant."""
    spread_starts: int = 0
    """Instead of start_frames: grids in this many frames, spread evenly from the first to the last; 0: off."""
    iters: int = 0
    """Refinements of a network; 0 means its published number (CoTracker3 6, AllTracker 4)."""
    num_actors: int = 0
    """Tracker actors; 0 means one per GPU or, without a GPU, as many as CPUs and memory allow."""
    threads_per_actor: int = 1
    """CPU threads each actor uses."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the tracker runs; `chain` always runs on the CPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of a network's convolutions and matrix products, as in `kinema teach`; positions stay float32. bf16 on a GPU,
    or on a CPU that has instructions for it (AVX512-BF16, AMX); the artifact's config names it."""
    allowed_quarantine: float = 0.05
    """Exit status 3 when more than this share of the clips was quarantined."""

    def __post_init__(self) -> None:
        require_choice("tracker", self.tracker, MODELS.trackers())
        require(1 <= self.grid <= 1024, "grid", self.grid, "use 1 to 1024 points a side")
        require(self.spread_starts >= 0, "spread_starts", self.spread_starts, "use 1 or more frames, or 0 for none")
        listed = bool(self.start_frames) or self.spread_starts > 0
        require(listed, "start_frames", list(self.start_frames), "name at least one frame, or set spread_starts")
        require(self.iters >= 0, "iters", self.iters, "use 1 or more, or 0 for the published number")
        require(self.num_actors >= 0, "num_actors", self.num_actors, "use 1 or more, or 0 for what fits")
        require(self.threads_per_actor >= 1, "threads_per_actor", self.threads_per_actor, "use 1 or more")
        require(
            0 <= self.allowed_quarantine <= 1,
            "allowed_quarantine",
            self.allowed_quarantine,
            "use a share, 0 to 1",
        )
