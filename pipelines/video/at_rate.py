"""A video file as frames of one rate, chosen by their timestamps."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from kinema.models.dismo.target_offset import frames_at_rate
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.errors import SourceError
from kinema.pipelines.video.orient import orientation_of

_SAME_S = 1e-6


def read_video(path: Path, fps: float, short_side: int, max_seconds: float) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames of a video file at this rate, nearest in time, upright, its shorter side at most `short_side` pixels.

    A frame that would be nearest twice comes once.
    Raises: SourceError (pipelines/video/errors.py) for a file that cannot be read.
    """
    frames, times_s = read_stretch(path, short_side, max_seconds)
    return frames[frames_at_rate(times_s, fps)]


def read_stretch(
    path: Path, short_side: int, max_seconds: float, start_s: float = 0.0
) -> tuple[UInt8[np.ndarray, "T H W 3"], Float[np.ndarray, "T"]]:
    """Every frame from `start_s` on for `max_seconds`, upright and no larger than asked for, and when it is shown.

    Times are in seconds from the file's first frame.
    Raises: SourceError for a file that cannot be read, or that ends before.
    """
    times: list[float] = []
    frames: list[np.ndarray] = []
    first_s: float | None = None
    with VideoFile(str(path)) as video:
        for frame in video.frames():
            assert frame.pts is not None  # as `frames` promises; the frames' own time base is missing from the last
            time_s = float(frame.pts * video.time_base)
            first_s = time_s if first_s is None else first_s
            if time_s - first_s < start_s - _SAME_S:
                continue
            if times and time_s - first_s - times[0] > max_seconds:
                break
            times.append(time_s - first_s)
            frames.append(_shrunk(orientation_of(frame).apply(frame.to_ndarray(format="rgb24")), short_side))
    if not frames:
        raise SourceError("no frame comes out of it" if first_s is None else f"it ends before {start_s:g} s")
    return np.stack(frames), np.asarray(times)


def _shrunk(frame: np.ndarray, short_side: int) -> np.ndarray:
    scale = short_side / min(frame.shape[:2])
    if scale >= 1:
        return np.ascontiguousarray(frame)
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return cv2.resize(np.ascontiguousarray(frame), size, interpolation=cv2.INTER_AREA)
