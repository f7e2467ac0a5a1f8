"""Stretches of a source: runs of frames with one kind of picture and one clock."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from kinema.pipelines.video.clock import Rate
from kinema.pipelines.video.look import Look
from kinema.pipelines.video.orient import Orientation
from kinema.pipelines.video.picture import PictureSpec, matrix_fallback
from kinema.pipelines.video.timeline import Stretch


@dataclass(frozen=True, kw_only=True)
class SourceStretch(Stretch):
    """A stretch with what its pictures are and become."""

    clock_offset: int
    """Ticks added to the file's timestamps, so that time goes on where its clock starts anew."""
    spec: PictureSpec
    """Of its clips."""
    look: Look
    """Of its frames as they are stored."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        plain = asdict(self)
        plain["groups"] = list(self.groups)
        plain["rate"]["fps"] = _pair(self.rate.fps)
        plain["look"]["pixel_aspect"] = _pair(self.look.pixel_aspect)
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> SourceStretch:
        """The inverse of `to_json`."""
        rate = {**plain["rate"], "fps": Fraction(*plain["rate"]["fps"])}
        look = {
            **plain["look"],
            "pixel_aspect": Fraction(*plain["look"]["pixel_aspect"]),
            "orientation": Orientation(**plain["look"]["orientation"]),
        }
        spec = {
            **plain["spec"],
            "orientation": Orientation(**plain["spec"]["orientation"]),
            "pixel_aspect": tuple(plain["spec"]["pixel_aspect"]),
        }
        return cls(
            first=plain["first"],
            last=plain["last"],
            rate=Rate(**rate),
            groups=tuple(plain["groups"]),
            clock_offset=plain["clock_offset"],
            spec=PictureSpec(**spec),
            look=Look(**look),
        )


def _pair(value: Fraction) -> list[int]:
    return [value.numerator, value.denominator]


def keeps_pictures(spec: PictureSpec, look: Look) -> bool:
    """Whether the clips' pictures are the source's own, pixel by pixel, in a form that every reader takes."""
    return (
        (spec.width, spec.height) == (look.width, look.height)
        and not (spec.pad_right or spec.pad_bottom)
        and spec.orientation.is_identity
        and spec.pixel_aspect == (1, 1)
        and look.pix_fmt in ("yuv420p", "yuvj420p")
        and matrix_fallback(look.pix_fmt, look.matrix, look.primaries) is None
    )


def can_be_copied(stretch: SourceStretch, interlaced: bool) -> bool:
    """Whether packets can be taken over: nothing is to be done to the pictures, and the rate is constant."""
    steady = not stretch.rate.variable and not stretch.rate.sparse
    return keeps_pictures(stretch.spec, stretch.look) and steady and not interlaced


def with_groups(
    stretches: list[SourceStretch], pts: np.ndarray, interlaced: np.ndarray, starts: np.ndarray | None
) -> list[SourceStretch]:
    """Stretches that know where closed groups begin, if their packets can be taken over.

    Args: pts, interlaced, of every frame; starts, timestamps of the groups' keyframes, None where nothing is copied.
    """
    if starts is None or not bool((np.diff(pts) > 0).all()):
        return stretches
    frames = np.flatnonzero(np.isin(pts, starts))
    found = []
    for stretch in stretches:
        inside = frames[(frames >= stretch.first) & (frames < stretch.last)]
        usable = can_be_copied(stretch, bool(interlaced[stretch.first : stretch.last].any()))
        found.append(replace(stretch, groups=tuple(int(i) for i in inside)) if usable else stretch)
    return found
