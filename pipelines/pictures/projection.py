"""Features as colours on one basis, so that the same colour means the same in every picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

OUTLIER_SHARE = 0.01


@dataclass(frozen=True)
class Projection:
    """The three main components of several feature maps together."""

    mean: Tensor
    """[C]."""
    directions: Tensor
    """[C, 3], orthonormal; fewer columns where there are fewer channels."""
    low: Tensor
    """[3], components that are shown as 0."""
    high: Tensor
    """[3], components that are shown as 255."""

    @classmethod
    def of(cls, maps: Sequence[Tensor]) -> Projection:
        """From maps [C, h, w] of any sizes; signs are such that the largest deviation is positive."""
        pixels = torch.cat([rearrange(m.detach().double().cpu(), "c h w -> (h w) c") for m in maps])
        mean = pixels.mean(dim=0)
        centred = pixels - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        directions = vectors.flip(1)[:, : min(3, vectors.shape[1])]
        parts = centred @ directions
        largest = parts.gather(0, parts.abs().argmax(dim=0, keepdim=True))
        directions = directions * torch.where(largest < 0, -1.0, 1.0)
        ordered = (centred @ directions).sort(dim=0).values
        margin = min(int(OUTLIER_SHARE * len(ordered)), (len(ordered) - 1) // 2)
        return cls(mean, directions, ordered[margin], ordered[-1 - margin])

    def picture(self, features: Tensor) -> np.ndarray:
        """A map [C, h, w] as uint8 [h, w, 3]."""
        _, height, width = features.shape
        parts = (rearrange(features.detach().double().cpu(), "c h w -> (h w) c") - self.mean) @ self.directions
        shown = ((parts - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1) * 255
        picture = torch.zeros(height * width, 3, dtype=torch.uint8)
        picture[:, : shown.shape[1]] = shown.round().byte()
        return rearrange(picture, "(h w) c -> h w c", h=height).numpy()
