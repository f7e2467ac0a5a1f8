"""Motion of clips that are not decoded when they are cut: measured while their source is scanned, on few frames."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64

from kinema.pipelines.video.motion import MOTION, WINDOW

_EVERY = 60  # frames from one sample to the next within a long group of pictures


class MotionSamples:
    """Feed every frame in order. A sample begins with every group of pictures and about every other second within.

    Args: motion, value of `shard.motion`; starts, timestamps of the groups, since clips begin there.
    """

    def __init__(self, motion: str, starts: Int64[np.ndarray, "G"]):
        self._motion, self._starts = motion, frozenset(starts.tolist())
        self._window: list[np.ndarray] = []
        self._begun = -_EVERY
        self._found: dict[int, float] = {}

    def add(self, index: int, pts: int, small: np.ndarray) -> None:
        """The next frame, small."""
        if self._motion == "none":
            return
        if not self._window and (pts in self._starts or index - self._begun >= _EVERY):
            self._begun = index
        elif not self._window or small.shape != self._window[0].shape:
            self._window = []
            return
        self._window.append(small)
        if len(self._window) == WINDOW:
            self._measure(index)

    def _measure(self, last: int) -> None:
        measure = MOTION[self._motion]()
        for small in self._window:
            measure.add(small)
        score = measure.score()
        assert score is not None  # only "none" measures nothing
        self._found.update(dict.fromkeys(range(last - WINDOW + 2, last + 1), score))
        self._window = []

    def shares(self, num_frames: int) -> Float32[np.ndarray, "N"]:
        """The score at the frames of samples but their first, nan at all others."""
        found = np.full(num_frames, np.nan, np.float32)
        found[list(self._found)] = list(self._found.values())
        return found
