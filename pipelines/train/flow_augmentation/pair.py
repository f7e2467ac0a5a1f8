"""What is augmented: two frames of one size and the flow between them, as far as it is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, UInt8


@dataclass(frozen=True)
class KnownPair:
    """Frames, flow from the first to the second in pixels, (x, y), and where it is known."""

    image1: UInt8[np.ndarray, "H W 3"]
    image2: UInt8[np.ndarray, "H W 3"]
    flow_px: Float32[np.ndarray, "2 H W"]
    """0 where unknown."""
    valid: Bool[np.ndarray, "H W"]

    @classmethod
    def of(cls, image1: np.ndarray, image2: np.ndarray, flow_px: np.ndarray, valid: np.ndarray | None = None):
        """From flow that may be nan where it is unknown."""
        known = np.isfinite(flow_px).all(axis=0)
        known = known if valid is None else known & valid
        return cls(image1, image2, np.where(known, flow_px, np.float32(0)), known)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.valid.shape
