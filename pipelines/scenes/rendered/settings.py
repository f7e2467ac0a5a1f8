"""What rendered shots look like and how they move."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from kinema.configs.rendered import EffectsConfig

SPEED_EDGES_PX = (0.0, *(2.0 ** (k / 2) for k in range(-6, 18)))
"""Bins of speed, px a frame at 512 px of width: 0, then half octaves from 1/8 px to 362 px."""
REFERENCE_WIDTH = 512


@dataclass(frozen=True)
class RenderSettings:
    """Decides every pixel together with seed and index. Travels to workers and into manifests."""

    height: int = 384
    width: int = 512
    num_frames: int = 2
    objects: tuple[int, int] = (2, 6)
    """Fewest and most objects."""
    object_size: tuple[float, float] = (0.08, 0.35)
    """Radius of objects as a share of the shorter side."""
    speed_shares: tuple[float, ...] = field(default_factory=lambda: log_normal_shares(4.0, 1.1, 100.0))
    """Share of layers whose own speed lies in each bin of SPEED_EDGES_PX."""
    background_speed: float = 0.6
    """Speed of the background relative to that of objects."""
    homography: float = 0.3
    """Share of layers that tilt in depth."""
    thin_plate: float = 0.15
    """Share of layers that bend (thin-plate splines)."""
    textures: str = ""
    """Folder of images; empty: procedural textures."""
    detail: float = 1.0
    """How many times finer than usual textures are, 1 or more."""
    num_textures: int = 48
    """Different textures of a seed."""
    effects: EffectsConfig = field(default_factory=EffectsConfig)
    """How probable each photometric effect is in a shot."""

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 32 or self.num_frames < 2:
            found = f"{self.num_frames} frames of {self.height}x{self.width}"
            raise ValueError(f"rendered shots of {found}: use 2 frames of 32x32 or more")
        if len(self.speed_shares) != len(SPEED_EDGES_PX) - 1 or min(self.speed_shares) < 0:
            raise ValueError(f"speed_shares has {len(self.speed_shares)} entries; it needs {len(SPEED_EDGES_PX) - 1}")

    def speed(self, rng: np.random.Generator) -> float:
        """Speed of a layer in px a frame at this width; uniform inside its bin."""
        shares = np.cumsum(self.speed_shares)
        place = rng.uniform(0, shares[-1])
        number = min(int(np.searchsorted(shares, place, side="right")), len(shares) - 1)
        low, high = SPEED_EDGES_PX[number], SPEED_EDGES_PX[number + 1]
        return float(rng.uniform(low, high)) * self.width / REFERENCE_WIDTH


def log_normal_shares(median_px: float, spread: float, longest_px: float) -> tuple[float, ...]:
    """Shares of a log-normal distribution of speed, cut at its longest.

    Args: spread, standard deviation of the natural logarithm.
    """

    def below(px: float) -> float:
        if px <= 0:
            return 0.0
        return 0.5 * (1 + math.erf(math.log(min(px, longest_px) / median_px) / (spread * math.sqrt(2))))

    shares = [below(high) - below(low) for low, high in zip(SPEED_EDGES_PX, SPEED_EDGES_PX[1:], strict=False)]
    total = sum(shares)
    return tuple(round(share / total, 6) for share in shares)
