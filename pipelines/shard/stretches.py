"""Stretches of a source: runs of frames with one kind of picture and one clock."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from kinema.pipelines.video.clock import Rate
from kinema.pipelines.video.look import Look
from kinema.pipelines.video.orient import Orientation
from kinema.pipelines.video.picture import PictureSpec
from kinema.pipelines.video.timeline import Stretch


@dataclass(frozen=True)
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
            plain["first"], plain["last"], Rate(**rate), plain["clock_offset"], PictureSpec(**spec), Look(**look)
        )


def _pair(value: Fraction) -> list[int]:
    return [value.numerator, value.denominator]
