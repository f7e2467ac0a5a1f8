"""Settings of the augmentation that flow networks learn under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kinema.configs.checks import require

Variant = Literal["off", "dense", "sparse"]
"""off: random crops alone. dense: everything. sparse: for flow that is known at some pixels only (KITTI, HD1K), one
scale for both axes, both frames recoloured alike, and known vectors that go to the nearest pixel unblended."""


@dataclass(frozen=True)
class FlowAugmentationConfig:
    """RAFT's augmentation (arXiv:2003.12039, appendix B, and its published training code)."""

    scale_log2: tuple[float, float] = (-0.2, 0.5)
    """Range of the scale, as powers of 2 (Chairs -0.1..1.0, Things -0.4..0.8, Sintel -0.2..0.6, KITTI -0.2..0.4)."""
    scale_prob: float = 0.8
    """Probability that a pair is scaled."""
    stretch_log2: float = 0.2
    """Largest further scale of each axis alone, as a power of 2."""
    stretch_prob: float = 0.8
    """Probability of that, where a pair is scaled."""
    flip_horizontal: float = 0.5
    """Probability of a left-right flip."""
    flip_vertical: float = 0.1
    """Probability of a top-bottom flip."""
    brightness: float = 0.4
    """Largest relative change (0.3 in the sparse variant's training)."""
    contrast: float = 0.4
    """Largest relative change."""
    saturation: float = 0.4
    """Largest relative change."""
    hue: float = 0.159
    """Largest turn of the colour circle, in circles."""
    asymmetric_prob: float = 0.2
    """Probability that the frames are recoloured each in its own way."""
    eraser_prob: float = 0.5
    """Probability that one or two rectangles of the second frame become its mean colour, as if occluded."""
    eraser_px: tuple[int, int] = (50, 100)
    """Range of the rectangles' sides, in pixels before scaling."""

    def __post_init__(self) -> None:
        key = "augmentation"
        low, high = self.scale_log2
        require(-4 <= low <= high <= 4, f"{key}.scale_log2", [low, high], "use -4 <= low <= high <= 4")
        require(0 <= self.stretch_log2 <= 2, f"{key}.stretch_log2", self.stretch_log2, "use 0 to 2")
        for name in ("scale", "stretch", "asymmetric", "eraser"):
            value = getattr(self, f"{name}_prob")
            require(0 <= value <= 1, f"{key}.{name}_prob", value, "use a probability, 0 to 1")
        for name in ("flip_horizontal", "flip_vertical"):
            require(0 <= getattr(self, name) <= 1, f"{key}.{name}", getattr(self, name), "use a probability, 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) < 1, f"{key}.{name}", getattr(self, name), "use 0 or more, below 1")
        require(0 <= self.hue <= 0.5, f"{key}.hue", self.hue, "use 0 to 0.5")
        shortest, longest = self.eraser_px
        rule = "use 1 <= shortest <= longest"
        require(1 <= shortest <= longest, f"{key}.eraser_px", [shortest, longest], rule)
