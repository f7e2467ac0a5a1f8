"""What is gathered while a source is decoded: a little of every frame, and where runs of like frames begin."""

from __future__ import annotations

import zlib
from array import array

import av
import numpy as np

from kinema.configs import ClipConfig
from kinema.pipelines.shard.media import AnyVideo
from kinema.pipelines.shard.stretches import SourceStretch
from kinema.pipelines.video.clock import measure_clocks
from kinema.pipelines.video.cuts import CutDetector
from kinema.pipelines.video.decoded import Decoded
from kinema.pipelines.video.look import Look
from kinema.pipelines.video.picture import PictureSpec, Thumbnails, picture_spec
from kinema.pipelines.video.signature import frame_signature

THUMBNAIL_SIDE = 144
"""Shorter side in pixels of the small frames that cuts, signatures and motion are computed on."""


class PerFrame:
    """What is kept of every frame: about 90 bytes.

    Args: every, frames from one that is looked at for signatures to the next; those between share one.
    """

    def __init__(self, every: int = 1) -> None:
        self._every, self._signature = every, b""
        self.pts, self.checks, self.keyframes = array("q"), array("I"), array("q")
        self.interlaced, self.signatures = bytearray(), bytearray()

    def add(self, index: int, picture: Decoded, small: np.ndarray, *, is_start: bool) -> None:
        """Args: is_start, whether decoding can start at every frame."""
        assert picture.frame.pts is not None  # the decoder sees to that
        self.pts.append(picture.frame.pts)
        self.checks.append(zlib.crc32(small.data))
        self.interlaced.append(picture.interlaced)
        if picture.frame.key_frame or is_start:
            self.keyframes.append(index)
        if index % self._every == 0:
            self._signature = frame_signature(small).tobytes()
        self.signatures += self._signature

    def arrays(self) -> dict[str, np.ndarray]:
        """By their names in FrameScan."""
        return {
            "pts": np.array(self.pts, np.int64),
            "checks": np.array(self.checks, np.uint32),
            "keyframes": np.array(self.keyframes, np.int64),
            "interlaced": np.frombuffer(bytes(self.interlaced), np.bool_),
            "signatures": np.frombuffer(bytes(self.signatures), np.int8).reshape(-1, 64),
        }


class Runs:
    """Runs of frames that look alike, between starts of the clock; cuts are looked for inside of each."""

    def __init__(self, clip: ClipConfig):
        self._clip = clip
        self._look: Look | None = None
        self._cuts: list[int] = []
        self._detector: CutDetector | None = None
        self._starts: list[tuple[int, int, Look, PictureSpec]] = []  # first frame, ticks added, look, spec
        self._clock_end = 0
        self.last_duration = 0

    def begins_at(self, picture: Decoded) -> bool:
        """Whether a new run begins at this frame."""
        return picture.look != self._look or picture.restarted

    def begin(self, index: int, picture: Decoded) -> PictureSpec:
        """Returns: the pictures of the new run."""
        look, clip = picture.look, self._clip
        spec = picture_spec(
            picture.frame,
            look.orientation,
            clip.codec,
            clip.short_side,
            pixel_aspect=look.pixel_aspect,
            square_pixels=clip.square_pixels,
        )
        added = self._starts[-1][1] if self._starts else 0
        if picture.restarted:
            added = self._clock_end - _pts(picture.frame)
        self._end_cuts()
        self._starts.append((index, added, look, spec))
        self._look, self._detector = look, CutDetector(clip)
        self.thumbnails = Thumbnails(look.orientation, THUMBNAIL_SIDE, spec)
        return spec

    def add(self, frame: av.VideoFrame, small: np.ndarray) -> None:
        """The next frame of the run."""
        assert self._detector is not None  # begin was called
        self._detector.add(small)
        self.last_duration = frame.duration or 0
        self._clock_end = _pts(frame) + self._starts[-1][1] + max(1, self.last_duration)

    def _end_cuts(self) -> None:
        if self._detector is not None:
            first = self._starts[-1][0]
            self._cuts.extend(first + cut for cut in self._detector.finish())

    def finish_cuts(self) -> list[int]:
        """First frame of every shot that begins inside of a run, ascending."""
        self._end_cuts()
        self._detector = None
        return self._cuts

    def stretches(self, pts: np.ndarray, keyframes: np.ndarray, video: AnyVideo) -> list[SourceStretch]:
        """The runs, divided where the rate changes."""
        found = []
        ends = [start[0] for start in self._starts[1:]] + [len(pts)]
        for (first, added, look, spec), end in zip(self._starts, ends, strict=True):
            last_duration = self.last_duration if end == len(pts) else 0
            own_keys = {int(i) - first for i in keyframes if first <= i < end}
            clocks = measure_clocks(pts[first:end], video.time_base, last_duration, video.rates, own_keys)
            inner_ends = [first + start for start, _ in clocks[1:]] + [end]
            for (start, rate), inner_end in zip(clocks, inner_ends, strict=True):
                found.append(
                    SourceStretch(
                        first=first + start, last=inner_end, rate=rate, clock_offset=added, spec=spec, look=look
                    )
                )
        return found


def _pts(frame: av.VideoFrame) -> int:
    assert frame.pts is not None  # the decoder sees to that
    return frame.pts
