"""How large clips become: short stretches of a source encoded nearly as its clips will be."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import av

from kinema.configs import ClipConfig
from kinema.pipelines.video.encode import ClipEncoder
from kinema.pipelines.video.packets import packet_table
from kinema.pipelines.video.picture import PictureMaker, PictureSpec

_TRIAL_EVERY, _TRIAL_FRAMES = 480, 5  # frames: part of the video that is encoded to estimate sizes
_HEADER_BYTES, _CLIP_BYTES = 16, 1200  # of the container, for a frame and for a clip
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
        self._keyframes: list[int] = []  # their sizes in bytes
        self._others: list[int] = []
        self._num_frames = 0

    def look_like(self, spec: PictureSpec) -> None:
        """The frames from now on are made into such pictures."""
        self._finish()
        self._spec, self._maker = spec, PictureMaker(spec)

    def add(self, index: int, frame: av.VideoFrame) -> None:
        """The next frame of the source."""
        assert self._spec is not None  # look_like was called
        self._num_frames += 1
        if index % _TRIAL_EVERY == 0:
            self._encoder = ClipEncoder(self._clip, self._spec, Fraction(25))
        if self._encoder is not None:
            self._encoder.add(self._maker.make(frame))
            if self._encoder.num_frames == _TRIAL_FRAMES:
                self._finish()

    def _finish(self) -> None:
        if self._encoder is not None:
            with self._encoder as encoder:
                packets = packet_table(encoder.finish())
            for size, is_keyframe in zip(packets.size, packets.keyframe, strict=True):
                (self._keyframes if is_keyframe else self._others).append(size)
            self._encoder = None

    def bytes_per_frame(self) -> int:
        """Mean over the stretches, of groups of pictures as the clips have them."""
        self._finish()
        keyframe = sum(self._keyframes) / max(1, len(self._keyframes))
        other = sum(self._others) / len(self._others) if self._others else keyframe
        group = max(1, min(self._clip.gop, self._num_frames))
        header = _HEADER_BYTES + _CLIP_BYTES / max(1, self._num_frames)
        return max(1, round(header + (keyframe + (group - 1) * other) / group))
