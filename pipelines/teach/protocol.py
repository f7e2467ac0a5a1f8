"""What the stage needs of a flow network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor


class FlowEstimate(NamedTuple):
    """What a teacher says about some pairs, on its device."""

    flow_px: Float[Tensor, "B 2 h w"]
    """Flow in pixels of the image the network saw, float32."""
    uncertainty_px: Float[Tensor, "B h w"] | None = None
    """The error the network itself expects at each pixel; None for networks that do not say, or were not asked."""


class Teacher(Protocol):
    """A flow network behind two calls."""

    def features(self, frame: UInt8[np.ndarray, "H W 3"]) -> Any:
        """Everything later pairs need of one frame."""

    def flow(self, pairs: Sequence[tuple[Any, Any]]) -> FlowEstimate:
        """Flow of each (from, to)."""
