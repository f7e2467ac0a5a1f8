"""Settings of FlowFeat's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinema.configs.checks import require


@dataclass(frozen=True)
class FlowFeatConfig:
    """The FlowFeat model and its loss (recipes: NeurIPS 2025, section 3 and supplement)."""

    variant: str = "dinov2_vits14_yt"
    """Hub name, such as dino_vits16_yt, mae_vitb16_kt or dinov2_vitb14_kt; or conv_small, which learns from scratch."""
    backbone_weights: str = field(default="", metadata={"file": True})
    """Checkpoint of the frozen encoder: file, URL, `published` (ledger) or empty (untrained, said aloud; conv_small
    learns its own)."""
    resize: int = 448
    """Short side of the frame before the centre square crop."""
    crop: int = 224
    """Side of both training crops and of the teacher flow, in pixels."""
    crop_scale: tuple[float, float] = (0.5, 0.75)
    """Range of the crops' side relative to the square frame."""
    gap: int = 2
    """Largest distance between the frames of a pair; 1..gap and both signs are drawn when available."""
    time_flip: bool = True
    """Also learn from backward pairs (YouTube-VOS: on, Kinetics: off)."""
    confidence_px: float = 0.0
    """A pixel whose stored expected error is e counts 1 / (1 + (e / confidence_px)^2) in the losses; 0: all alike.
    Flow of the consensus, and of networks taught with uncertainty=true, has expected errors."""
    ridge_alpha: float = 0.1
    """Regulariser of the linear map (YouTube-VOS 0.1, Kinetics 1.0)."""
    flow_weight: float = 0.1
    """Weight of the L1 flow loss."""
    edge_weight: float = 1.0
    """Weight of the edge loss."""
    edge_sigma: float = 0.1
    """Scale of the teacher gradient in the edge weights."""
    fit_with: Literal["averaged", "trained"] = "averaged"
    """Whose features the map is fitted on: the averaged decoder's (published), or the trained one's, with the gradient
    through the fit, from which conv_small learns."""
    ema_decay: float = 0.999
    """Largest decay of the decoder's moving average; it warms up to it."""
    ema_every: int = 5
    """Optimizer steps between updates of the moving average."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "flowfeat.crop_scale", [low, high], "use 0 < low <= high <= 1")
        require(
            self.resize >= self.crop >= 16,
            "flowfeat.resize",
            self.resize,
            f"use at least crop={self.crop} (>= 16)",
        )
        require(self.gap >= 1, "flowfeat.gap", self.gap, "use 1 or more")
        require(self.confidence_px >= 0, "flowfeat.confidence_px", self.confidence_px, "use 0 or more pixels")
        require(self.ridge_alpha > 0, "flowfeat.ridge_alpha", self.ridge_alpha, "use a positive number")
        require(0 <= self.ema_decay < 1, "flowfeat.ema_decay", self.ema_decay, "use 0 <= decay < 1")
        require(self.ema_every >= 1, "flowfeat.ema_every", self.ema_every, "use 1 or more steps")
