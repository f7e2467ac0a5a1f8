"""What the stage needs of a flow network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8
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


@dataclass(frozen=True)
class Pairing:
    """Which pairs of frames are computed. `gaps` ascending; `stride` counts the earlier frame of a pair."""

    gaps: tuple[int, ...]
    forward: bool = True
    backward: bool = True
    stride: int = 1
    occlusion: bool = True
    batch_pairs: int = 4
    teacher_sees_occlusion: bool = False
    """Whether the teacher says itself which pixels are hidden."""

    @property
    def stores_occlusion(self) -> bool:
        """Occlusion needs both directions, or a teacher that sees it."""
        return self.occlusion and (self.teacher_sees_occlusion or (self.forward and self.backward))

    def num_pairs(self, num_frames: int) -> int:
        """Directed pairs of a clip with so many frames."""
        starts = sum(len(range(0, num_frames - gap, self.stride)) for gap in self.gaps)
        return starts * (self.forward + self.backward)


class ClipEstimate(NamedTuple):
    """What a `ClipTeacher` says about one directed pair."""

    t: int
    gap: int
    """Signed: from frame t to frame t + gap."""
    flow_px: Float[Tensor, "2 h w"]
    hidden: Bool[Tensor, "h w"]
    """Pixels of frame t that the other frame does not show."""
    pictures: tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W 3"]]
    """Frame t and the other frame."""


@runtime_checkable
class ClipTeacher(Protocol):
    """A teacher that wants to see the frames between those of a pair."""

    def estimates(self, frames: Iterable[UInt8[np.ndarray, "H W 3"]], pairing: Pairing) -> Iterator[ClipEstimate]:
        """Every pair of the clip that the pairing asks for, in an order that depends on it alone."""
