"""Settings of `kinema teach`: optical flow over clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinema.configs.checks import require, require_choice
from kinema.configs.models.table import MODELS


@dataclass(frozen=True)
class TeachConfig:
    """`kinema teach`: clips/ in, flow/TEACHER/ out."""

    clips: str = ""
    """The clips artifact."""
    out: str = ""
    """Folder or URL of the flow artifact; empty: flow/TEACHER beside clips."""
    teacher: str = field(default="dis", metadata={"choices": MODELS.teachers})
    """Flow network; `dis` needs no weights."""
    weights: str = ""
    """Checkpoint file or URL of the teacher; empty: the published weights of the ledger."""
    gaps: tuple[int, ...] = (1, 2)
    """Distances between the frames of a pair."""
    directions: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    """forward: t -> t + gap; backward: t + gap -> t."""
    stride: int = 1
    """Pairs start at every `stride`-th frame."""
    iters: int = 0
    """Refinements; 0 means the network's usual number (RAFT and RAFT-small 20, SEA-RAFT 4, L 12, SMURF 12,
    WAFT 5, AllTracker 4)."""
    scale: int = 0
    """SEA-RAFT and WAFT see the frames at 2^scale times their size; its Spring weights are meant for -1 on 1080p."""
    padding: Literal["sintel", "kitti"] = "sintel"
    """RAFT pads frames to multiples of 8: evenly on all sides, or (kitti) all rows below, as for its benchmark."""
    short_side: int = 0
    """Shorter side of the frames the teacher sees (never enlarged); flow is stored at that size; 0: original size."""
    max_megapixels: float = 0.0
    """Frames with more than this many million pixels (after short_side) are too large for memory; 0: no limit."""
    too_large: Literal["downscale", "tile"] = "downscale"
    """Such frames are reduced (flow is stored at that size), or cut into overlapping tiles whose flow is blended."""
    uncertainty: bool = False
    """Store the error the teacher itself expects beside the flow (SEA-RAFT and WAFT; consensus always does)."""
    from_: tuple[str, ...] = ()
    """teacher=consensus: the flow artifacts of the same clips that it judges; the first one's size is stored."""
    compare: str = ""
    """Another teacher's flow of the same clips; the mean distance to it becomes the column pair_disagreement_px."""
    occlusion: bool = True
    """Store forward-backward occlusion (needs both directions)."""
    batch_pairs: int = 4
    """Pairs per network call."""
    num_actors: int = 0
    """Teacher actors; 0 means one per GPU or, without a GPU, as many as CPUs and memory allow."""
    threads_per_actor: int = 1
    """CPU threads each actor uses."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the teacher runs."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the teacher's convolutions and matrix products; positions and flow stay float32. bf16 on a GPU, or on a CPU
    that has instructions for it (AVX512-BF16, AMX); the artifact's config names it."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Repeat a network's work as CUDA graphs, one per size of frames, which spares queueing kernels one by one; auto:
    on a GPU, for networks over pairs (not AllTracker). A graph that repeats wrongly is noticed, said and not used."""
    allowed_quarantine: float = 0.05
    """Exit status 3 when more than this share of the clips was quarantined."""

    def __post_init__(self) -> None:
        require_choice("teacher", self.teacher, MODELS.teachers())
        require(
            bool(self.gaps) and min(self.gaps) >= 1,
            "gaps",
            list(self.gaps),
            "use frame distances of 1 or more",
        )
        require(bool(self.directions), "directions", list(self.directions), "name forward, backward or both")
        require(self.stride >= 1, "stride", self.stride, "use 1 or more")
        require(self.iters >= 0, "iters", self.iters, "use 1 or more, or 0 for the network's default")
        require(self.batch_pairs >= 1, "batch_pairs", self.batch_pairs, "use 1 or more")
        require(-4 <= self.scale <= 2, "scale", self.scale, "use -4 to 2; frames are resized by 2^scale")
        rule = "use 16 pixels or more, or 0 for the original size"
        require(self.short_side == 0 or self.short_side >= 16, "short_side", self.short_side, rule)
        require(
            self.max_megapixels == 0 or self.max_megapixels >= 0.02,
            "max_megapixels",
            self.max_megapixels,
            "use 0.02 or more (2.1 is full HD), or 0 for no limit",
        )
        require(self.num_actors >= 0, "num_actors", self.num_actors, "use 1 or more, or 0 for what fits")
        require(self.threads_per_actor >= 1, "threads_per_actor", self.threads_per_actor, "use 1 or more")
        require(
            0 <= self.allowed_quarantine <= 1,
            "allowed_quarantine",
            self.allowed_quarantine,
            "use a share, 0 to 1",
        )
