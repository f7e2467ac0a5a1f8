"""Settings of `kinema shard` for data sets with known flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kinema.configs.checks import require


@dataclass(frozen=True)
class FlowDatasetConfig:
    """Which part of a data set with known flow is packed (layouts sintel, kitti2015, flyingchairs, ...)."""

    split: Literal["training", "validation"] = "training"
    """Part of the data set; FlyingChairs and VIPER have a validation split. Test splits have no flow to pack."""
    passes: tuple[Literal["clean", "final"], ...] = ("clean", "final")
    """Renderings of Sintel and FlyingThings3D."""
    cameras: tuple[Literal["left", "right"], ...] = ("left",)
    """Cameras of FlyingThings3D and Spring."""
    directions: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    """Flow to the next frame and to the one before, of FlyingThings3D and Spring."""
    trusted_only: bool = False
    """Let the pixels that Sintel's `invalid` masks mark count as unknown; published training and figures use them."""
    partial: bool = False
    """Pack the pairs that are whole when files of others are missing; otherwise that is refused."""
    clip_frames: int = 12
    """Longest clip, in frames; neighbouring clips of a sequence share a frame, so that no pair is lost."""

    def __post_init__(self) -> None:
        for name in ("passes", "cameras", "directions"):
            chosen = getattr(self, name)
            require(bool(chosen) and len(set(chosen)) == len(chosen), f"dataset.{name}", list(chosen), "name each once")
        require(self.clip_frames >= 2, "dataset.clip_frames", self.clip_frames, "use 2 or more frames")
