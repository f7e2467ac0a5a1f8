"""Interlaced frames become progressive ones, one for each, through FFmpeg's bwdif.

Only frames whose flags say that they are interlaced are changed. What becomes of a frame depends on it and its two
neighbours alone, so that decoding from a keyframe gives the same pictures from the second frame on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction

import av

from kinema.pipelines.video.decoded import Decoded

_FILTER = "mode=send_frame:parity=auto:deint=interlaced"


def deinterlaced(pictures: Iterable[Decoded]) -> Iterator[Decoded]:
    """The same pictures with the same timestamps, progressive. Nothing is done before the first interlaced frame."""
    before: Decoded | None = None
    weaver: _Weaver | None = None
    for picture in pictures:
        if weaver is not None and (picture.look != weaver.look or picture.restarted):
            yield from weaver.finish()
            weaver, before = None, None
        if weaver is None and picture.interlaced:
            weaver = _Weaver(picture)
            if before is not None and before.look == picture.look and not picture.restarted:
                weaver.give_context(before)
        before = picture
        if weaver is None:
            yield picture
        else:
            yield from weaver.add(picture)
    if weaver is not None:
        yield from weaver.finish()


class _Weaver:
    """A bwdif graph for frames of one look."""

    def __init__(self, first: Decoded):
        self.look = first.look
        frame = first.frame
        self._waiting: deque[Decoded | None] = deque()
        self._graph = av.filter.Graph()
        self._graph.threads = 1
        source = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1_000_000)
        )
        weave = self._graph.add("bwdif", _FILTER)
        sink = self._graph.add("buffersink")
        source.link_to(weave)
        weave.link_to(sink)
        self._graph.configure()
        self._count = 0

    def give_context(self, picture: Decoded) -> None:
        """A frame that was passed on already, which the next one needs beside it."""
        self._push(picture.frame)
        self._waiting.append(None)

    def add(self, picture: Decoded) -> Iterator[Decoded]:
        """Feed one picture; yields those that are done."""
        self._push(picture.frame)
        self._waiting.append(picture)
        yield from self._ready()

    def finish(self) -> Iterator[Decoded]:
        """What is left."""
        self._graph.push(None)
        yield from self._ready()

    def _push(self, frame: av.VideoFrame) -> None:
        pts, time_base = frame.pts, frame.time_base
        frame.pts, frame.time_base = self._count, Fraction(1, 1_000_000)
        self._count += 1
        self._graph.push(frame)
        _set_time(frame, pts, time_base)

    def _ready(self) -> Iterator[Decoded]:
        while True:
            try:
                frame = self._graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                return
            picture = self._waiting.popleft()
            if picture is None:
                continue
            frame.pts, frame.time_base, frame.duration = (
                picture.frame.pts,
                picture.frame.time_base,
                picture.frame.duration,
            )
            yield replace(picture, frame=frame)


def _set_time(frame: av.VideoFrame, pts: int | None, time_base: Fraction | None) -> None:
    frame.pts = pts
    if time_base is not None:  # frames that a decoder gives up at the end have none
        frame.time_base = time_base
