"""How large clips become: short stretches of a source encoded nearly as its clips will be."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import av

from kinema.configs import ClipConfig
from kinema.pipelines.video.encode import ClipEncoder
from kinema.pipelines.video.picture import PictureMaker, PictureSpec

_TRIAL_EVERY, _TRIAL_FRAMES = 480, 12  # frames: part of the video that is encoded to estimate sizes
_SLOWER = ("veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")
_QUICK = "superfast"  # 0.97 to 1.36 times medium's bytes in a fourth of the time (docs/PRESETS.md)


class SizeTrial:
    """Encodes one short stretch in every twenty seconds or so, to know how large clips get.

    The settings are the clips' but for the preset, where that is a slow one: shards have to be alike, not exact.
    """

    def __init__(self, clip: ClipConfig):
        self._clip = replace(clip, preset=_QUICK) if clip.preset in _SLOWER else clip
        self._spec: PictureSpec | None = None
        self._encoder: ClipEncoder | None = None
        self._num_bytes = self._num_frames = 0

    def look_like(self, spec: PictureSpec) -> None:
        """The frames from now on are made into such pictures."""
        self._finish()
        self._spec, self._maker = spec, PictureMaker(spec)

    def add(self, index: int, frame: av.VideoFrame) -> None:
        """The next frame of the source."""
        assert self._spec is not None  # look_like was called
        if index % _TRIAL_EVERY == 0:
            self._encoder = ClipEncoder(self._clip, self._spec, Fraction(25))
        if self._encoder is not None:
            self._encoder.add(self._maker.make(frame))
            if self._encoder.num_frames == _TRIAL_FRAMES:
                self._finish()

    def _finish(self) -> None:
        if self._encoder is not None:
            with self._encoder as encoder:
                self._num_bytes += len(encoder.finish())
                self._num_frames += encoder.num_frames
            self._encoder = None

    def bytes_per_frame(self) -> int:
        """Mean over the stretches."""
        self._finish()
        return max(1, self._num_bytes // max(1, self._num_frames))
