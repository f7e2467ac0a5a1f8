"""Frames in order of time, and where the clock starts anew."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import av

HELD = 4
"""Frames held back to put unordered timestamps in order."""


class Timed(Protocol):
    """Something with a decoded frame, whose `pts` is known."""

    @property
    def frame(self) -> av.VideoFrame:
        """The frame."""

    @property
    def restarted(self) -> bool:
        """Whether it is known that the clock starts anew here."""


T = TypeVar("T", bound=Timed)


def in_order(items: Iterable[T], usual_step: int) -> Iterator[tuple[T, bool]]:
    """(item, whether the clock starts anew at it) by timestamp, which never goes back between two such starts.

    A frame that comes a little late is put in its place. A clock that goes back further (recordings that were joined,
    or that a recorder began again) starts anew.

    Args: usual_step: ticks between frames.
    """
    held: list[tuple[int, int, T]] = []
    last: int | None = None
    restarted = False
    for count, item in enumerate(items):
        pts = _pts(item)
        if held and (item.restarted or _restarts(item.frame, held, last, usual_step)):
            while held:
                yield heapq.heappop(held)[2], restarted
                restarted = False
            last, restarted = None, True
        heapq.heappush(held, (pts, count, item))
        if len(held) > HELD:
            last, _, ready = heapq.heappop(held)
            yield ready, restarted
            restarted = False
    while held:
        yield heapq.heappop(held)[2], restarted
        restarted = False


def _restarts(frame: av.VideoFrame, held: list, last: int | None, usual_step: int) -> bool:
    pts, newest = frame.pts, max(entry[0] for entry in held)
    assert pts is not None
    if pts > newest:
        return False
    if last is not None and pts < last:
        return True
    is_shown_already = any(entry[0] == pts for entry in held)
    return newest - pts > 2 * HELD * usual_step or (bool(frame.key_frame) and is_shown_already and pts < newest)


def _pts(item: Timed) -> int:
    pts = item.frame.pts
    assert pts is not None  # the decoder's frames were given one
    return pts
