"""How training samples are drawn from clips and sidecars."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinema.configs.checks import require


@dataclass(frozen=True)
class PairFilterConfig:
    """Which flow pairs are learned from, by the quality signals of `kinema teach`; -1 sets no limit."""

    min_motion_px: float = -1.0
    """Smallest mean motion of a pair, in pixels of the stored flow."""
    max_motion_px: float = -1.0
    """Largest mean motion."""
    max_consistency_px: float = -1.0
    """Largest median distance between a pixel and where it comes back to, forward and backward."""
    max_occluded_share: float = -1.0
    """Largest share of pixels that fail the forward-backward check."""
    max_photometric: float = -1.0
    """Largest mean difference of grey values (0..1) after warping."""
    max_uncertainty_px: float = -1.0
    """Largest mean error that the teacher itself expects."""
    max_disagreement_px: float = -1.0
    """Largest mean distance to the other teacher (`teach compare=`)."""
    skip_static: bool = False
    """Leave out pairs of equal pictures."""
    skip_cuts: bool = False
    """Leave out pairs whose flow explains nothing: cuts that were not found, or failures of the teacher."""

    def __post_init__(self) -> None:
        for name in ("max_occluded_share", "max_photometric"):
            require(getattr(self, name) <= 1, f"loader.pairs.{name}", getattr(self, name), "use 0 to 1, or -1 for any")
        if self.max_motion_px >= 0:
            rule = f"use at most max_motion_px={self.max_motion_px}"
            fits = self.min_motion_px <= self.max_motion_px
            require(fits, "loader.pairs.min_motion_px", self.min_motion_px, rule)


@dataclass(frozen=True)
class LoaderConfig:
    """How training samples are drawn. Order and content follow from the seed alone, not from the workers."""

    mode: Literal["random", "stream"] = "random"
    """`random` reads of every clip only the bytes it needs: best on disks. `stream` fetches whole shards, in an order
    drawn by seed and epoch: best on object stores, where every request waits."""
    num_workers: int = 2
    """Loader processes per rank; 0 reads in the training process."""
    prefetch: int = 2
    """Batches each worker keeps ready."""
    samples_per_clip: int = 1
    """Samples taken from a clip each epoch while it is open, spread by the shuffle window."""
    shuffle_window: int = 256
    """Clips among which samples of the same clip are spread (only when samples_per_clip > 1). `fpt` reads and holds a
    whole window at a time: best the (global) batch size, or a small multiple of it. In stream mode, also the clips
    among which the order is mixed: their shards are kept at the same time."""
    lanes: int = 1
    """Stream mode: parts of the data that fill equal shares of every batch. With as many as nodes, each node fetches
    its own shards only. Part of the order: keep it when the number of ranks changes."""
    lookahead: int = 2
    """Stream mode: shards of each lane that are fetched before their turn."""
    cache_dir: str = ""
    """Stream mode: local folder that keeps shards from epoch to epoch, shared by the ranks of a node; empty: a
    temporary folder of each rank."""
    cache_gb: float = 20.0
    """Stream mode: most that folder may hold; the shards used longest ago go."""
    min_motion: float = 0.0
    """Clips with a lower motion score are left out and counted."""
    skip_duplicates: bool = True
    """Clips marked as exact duplicates are left out and counted."""
    hold_out: int = 0
    """Every how many clips one is kept out of training, to be judged on; 0: none."""
    pairs: PairFilterConfig = field(default_factory=PairFilterConfig)
    """Which flow pairs are learned from."""

    def __post_init__(self) -> None:
        require(self.hold_out == 0 or self.hold_out >= 2, "loader.hold_out", self.hold_out, "use 2 or more, or 0")
        require(self.num_workers >= 0, "loader.num_workers", self.num_workers, "use 0 or more")
        require(self.prefetch >= 1, "loader.prefetch", self.prefetch, "use 1 or more")
        require(self.samples_per_clip >= 1, "loader.samples_per_clip", self.samples_per_clip, "use 1 or more")
        require(self.lanes >= 1, "loader.lanes", self.lanes, "use 1 or more")
        require(self.lookahead >= 0, "loader.lookahead", self.lookahead, "use 0 or more shards")
        require(self.cache_gb > 0, "loader.cache_gb", self.cache_gb, "use a positive size")
        require(self.shuffle_window >= 1, "loader.shuffle_window", self.shuffle_window, "use 1 or more clips")
