"""Dissolves and fades: scenes that turn into one another over many frames, which no frame-to-frame detector sees."""

from __future__ import annotations

from collections import deque

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

SPAN = 24
"""Frames from before a transition to after it; of longer ones a place near the middle is found."""
_SIZE = (32, 18)  # width and height of the pictures compared
_CHANGE = 12.0  # mean difference in grey levels of the two scenes
_RESIDUE = 0.25  # of that difference: what a mixture of the two scenes may leave unexplained


class DissolveDetector:
    """Feed every frame in order; `finish` returns the middle of every transition.

    In a transition the frames between are mixtures of the first and the last, with a growing share of the last. Where
    things or the camera move they are not.
    """

    def __init__(self) -> None:
        self._window: deque[np.ndarray] = deque(maxlen=SPAN + 1)
        self._num_frames = 0
        self._found: list[tuple[int, float]] = []

    def add(self, grey: UInt8[np.ndarray, "h w"]) -> bool:
        """The next frame, grey. Returns: whether it ends a window that looks like a transition."""
        self._window.append(cv2.resize(grey, _SIZE, interpolation=cv2.INTER_AREA).astype(np.float32))
        self._num_frames += 1
        if len(self._window) <= SPAN:
            return False
        shares = _shares_of_last(self._window)
        if shares is None:
            return False
        # the window in which the middle frame is the most even mixture is the one that is centred
        self._found.append((self._num_frames - 1 - SPAN // 2, abs(shares[1] - 0.5)))
        return True

    def drop_last(self) -> None:
        """Forget the window that `add` has just found."""
        self._found.pop()

    def finish(self) -> list[int]:
        """Frames in the middle of transitions, ascending."""
        middles: list[int] = []
        run: list[tuple[int, float]] = []
        for entry in [*self._found, (1 << 60, 0.0)]:
            if run and entry[0] - run[-1][0] > SPAN // 2:
                middles.append(min(run, key=lambda pair: pair[1])[0])
                run = []
            run.append(entry)
        return middles


def _shares_of_last(window: deque[Float32[np.ndarray, "h w"]]) -> list[float] | None:
    """Share of the last picture in those at a quarter, half and three quarters; None if they are no mixtures."""
    first, last = window[0], window[-1]
    change = last - first
    if np.abs(change).mean() < _CHANGE:
        return None
    power = float((change * change).sum())
    shares = []
    for index in (SPAN // 4, SPAN // 2, 3 * SPAN // 4):
        between = window[index] - first
        share = float((between * change).sum()) / power
        if float(((between - share * change) ** 2).sum()) > _RESIDUE**2 * power:
            return None
        shares.append(share)
    growing = -0.1 < shares[0] <= shares[1] <= shares[2] < 1.1
    return shares if growing and shares[0] < 0.45 and 0.25 < shares[1] < 0.75 and shares[2] > 0.55 else None
