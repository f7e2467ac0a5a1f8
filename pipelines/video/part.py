"""A part of a video, from one time to another, with the interface of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import av

from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.decoded import Decoded


class VideoPart:
    """The frames shown first at or after `start_s` and before `end_s`, counted from the video's beginning.

    What lies outside is not decoded where the container seeks exactly; damage there does not matter.
    """

    def __init__(self, video: VideoFile, start_s: float, end_s: float | None):
        self._video = video
        self.format_name, self.codec_name, self.stream_index = video.format_name, video.codec_name, video.stream_index
        self.time_base, self.start, self.rates, self.seeks = video.time_base, video.start, video.rates, video.seeks
        self._first = self._tick(start_s)
        self._end = None if end_s is None else self._tick(end_s)

    def _tick(self, seconds: float) -> int:
        """The first tick at or after a time; times with few digits do not lose a frame by their rounding."""
        exact = Fraction(seconds).limit_denominator(1_000_000) / self.time_base - Fraction(1, 100)
        return self.start + -(-exact.numerator // exact.denominator)

    @property
    def invented_pts(self) -> bool:
        """As of the whole video."""
        return self._video.invented_pts

    @property
    def num_dropped(self) -> int:
        """As of the whole video."""
        return self._video.num_dropped

    def frames(self, from_pts: int | None = None) -> Iterator[av.VideoFrame]:
        """The frames of `pictures`."""
        return (picture.frame for picture in self.pictures(from_pts))

    def pictures(self, from_pts: int | None = None) -> Iterator[Decoded]:
        """Like those of the whole video. Raises: Corrupt, Truncated, Undecodable."""
        if from_pts is None and self.seeks and self._first > self.start:
            from_pts = max(self.start, self._first)
        for picture in self._video.pictures(from_pts):
            assert picture.frame.pts is not None  # the decoder sees to that
            if self._end is not None and picture.frame.pts >= self._end:
                return
            if picture.frame.pts >= self._first:
                yield picture
