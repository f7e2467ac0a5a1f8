"""Orientation of a video: the display matrix as quarter turns and a mirror, and turning pictures by it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import av
import numpy as np
from av.sidedata.sidedata import Type

from kinema.pipelines.video.side_data import side_data


@dataclass(frozen=True)
class Orientation:
    """What is done to the stored picture to show it upright: mirror left-right first, then turn."""

    quarter_turns: int = 0
    """Counter-clockwise quarter turns (numpy.rot90's sense), 0..3."""
    mirror: bool = False
    """Mirror left-right before turning."""

    @property
    def degrees(self) -> int:
        """Rotation applied, counter-clockwise, in degrees: 0, 90, 180 or 270."""
        return 90 * self.quarter_turns

    @property
    def swaps_sides(self) -> bool:
        """Whether width and height change places."""
        return self.quarter_turns % 2 == 1

    @property
    def is_identity(self) -> bool:
        return self.quarter_turns == 0 and not self.mirror

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Turn a picture or plane [H, W, ...] upright (a view)."""
        if self.mirror:
            picture = picture[:, ::-1]
        return np.rot90(picture, self.quarter_turns)


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """Orientation from a frame's display matrix; the identity when it has none.

    Angles between quarter turns are rounded to the nearest one.
    """
    for data in side_data(frame):
        if data.type == Type.DISPLAYMATRIX:
            return orientation_of_matrix(np.frombuffer(bytes(data), np.int32)[:9])
    return Orientation()


def orientation_of_matrix(matrix: np.ndarray) -> Orientation:
    """Orientation from a 3x3 display matrix (row-major, 16.16 fixed point; maps row vectors (x, y), y down)."""
    a, b, c, d = (float(matrix[i]) for i in (0, 1, 3, 4))
    mirror = a * d - b * c < 0
    if mirror:  # (x, y) -> (-x, y) first: the first row changes sign and a pure rotation is left
        a, b = -a, -b
    clockwise = math.degrees(math.atan2(b, a))
    return Orientation(round(-clockwise / 90) % 4, mirror)
