"""What the frames of a stretch have in common before they are converted: size, format, colours, shape, orientation."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av

from kinema.pipelines.video.orient import Orientation, orientation_of


@dataclass(frozen=True)
class Look:
    """Of one decoded frame, as it is stored."""

    width: int
    """Stored width in pixels."""
    height: int
    """Stored height."""
    pix_fmt: str
    """FFmpeg's name of the pixel format."""
    matrix: int
    """Matrix coefficients (ITU-T H.273), as tagged."""
    color_range: int
    """FFmpeg's number: 0 unspecified, 1 limited, 2 full."""
    primaries: int
    """Colour primaries (H.273), as tagged."""
    transfer: int
    """Transfer characteristics (H.273), as tagged."""
    pixel_aspect: Fraction
    """Width of a pixel over its height; 1 where the file says nothing."""
    orientation: Orientation
    """What turns the stored picture upright."""


def look_of(frame: av.VideoFrame, pixel_aspect: Fraction = Fraction(1)) -> Look:
    """Of a frame; the pixels' aspect ratio is known to the stream only."""
    return Look(
        frame.width,
        frame.height,
        frame.format.name,
        int(frame.colorspace),
        int(frame.color_range),
        int(frame.color_primaries),
        int(frame.color_trc),
        pixel_aspect,
        orientation_of(frame),
    )
