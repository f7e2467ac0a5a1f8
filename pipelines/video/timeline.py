"""Time: which source frame is shown when, and how shots are divided into clips.

A frame is displayed from its timestamp until the next one's. Output frame i of a shot shows the frame displayed at
`start + i / fps`; at the source's own rate, where there is a grid, it shows the frame of slot i, so that every frame
appears once and only empty slots repeat one. Timestamps are integers in units of the stream's time base.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from kinema.pipelines.video.clock import FILLED_SLOTS, Rate, hole_ticks, slots_of

_MAX_DENOMINATOR = 100_000


@dataclass(frozen=True)
class Stretch:
    """A run of frames with one clock and one kind of picture."""

    first: int
    """Index of its first frame."""
    last: int
    """Index behind its last frame."""
    rate: Rate
    """Of its frames."""
    groups: tuple[int, ...] = ()
    """Frames at which a closed group of pictures begins, where the source's packets can be taken over."""


@dataclass(frozen=True)
class Division:
    """How shots become clips."""

    fps: float
    """Rate of the clips; 0 keeps the source's."""
    seconds: float
    """Longest clip."""
    min_frames: int
    """Pieces with fewer frames are dropped and counted."""
    fill_slots: int = FILLED_SLOTS
    """Longest run of empty slots that is filled by repeating a frame; the clip is cut at longer ones."""


@dataclass(frozen=True)
class ClipSpan:
    """One clip: the source frames it shows and where it starts."""

    shot: int
    """0-based number of the shot in its source."""
    frames: Int64[np.ndarray, "T"]
    """Index of the source frame (sorted by timestamp) that each output frame shows."""
    start: Fraction
    """Time of the first output frame, in ticks."""
    fps: Fraction = Fraction(25)
    """Output rate."""
    stretch: int = 0
    """Which stretch of the source its frames belong to."""
    repeats: tuple[int, ...] = field(default=())
    """Output frames that repeat the one before, because their slot of the grid is empty in the source."""
    copied: bool = False
    """Whether the source's own packets are taken over."""


def gaps(
    pts: Int64[np.ndarray, "N"], time_base: Fraction, rate: Rate | None = None, fill_slots: int = FILLED_SLOTS
) -> list[int]:
    """Frames that follow a hole in the timestamps: new shots start there."""
    steps = np.diff(pts)
    if rate is None or rate.variable:
        if len(pts) < 3:
            return []
        longest = hole_ticks(steps, None, time_base, fill_slots)
    else:
        longest = hole_ticks(steps, float(1 / (rate.fps * time_base)), time_base, fill_slots)
    return [int(index) + 1 for index in np.flatnonzero(steps > longest)] if len(steps) else []


def output_rate(rate: Rate, fps: float) -> Fraction:
    """Rate of the clips: `clip.fps`, or the source's rate where that is 0."""
    return Fraction(fps).limit_denominator(_MAX_DENOMINATOR) if fps else rate.fps


def resample(
    pts: Int64[np.ndarray, "N"],
    shot: tuple[int, int],
    end: int,
    fps: Fraction,
    rate: Rate,
    time_base: Fraction,
) -> Int64[np.ndarray, "T"]:
    """Source frame shown by each output frame of a shot.

    Args:
        pts: sorted timestamps of the whole source.
        shot: frames [first, last) of the shot; no hole in it.
        end: timestamp at which the shot's last frame stops being shown.
        fps: output rate.
        rate: the source's rate; at the same constant rate every frame appears once, and again in empty slots only.
    """
    first, last = shot
    ticks = 1 / (fps * time_base)  # per output frame
    if fps == rate.fps and not rate.variable:
        if not rate.sparse:
            return np.arange(first, last)
        slots = slots_of(pts[first:last], float(ticks))
        return first + np.searchsorted(slots, np.arange(int(slots[-1]) + 1), side="right") - 1
    num_frames = max(1, _ceil((end - int(pts[first])) / ticks - Fraction(1, 1000)))
    elapsed = np.array([i * ticks.numerator // ticks.denominator for i in range(num_frames)], np.int64)
    shown = np.searchsorted(pts, pts[first] + elapsed + rate.rounding, side="right") - 1
    return np.clip(shown, first, last - 1)


def _ceil(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)


def divide_shots(
    pts: Int64[np.ndarray, "N"],
    cuts: list[int],
    last_duration: int,
    stretches: list[Stretch],
    time_base: Fraction,
    division: Division,
) -> tuple[list[ClipSpan], int]:
    """Clips of equal length (to one frame) no longer than `division.seconds`, none across a cut, a hole or a stretch's
    end. Where that is two frames at the source's rate, a frame that would be left alone joins the clip before it.

    Args: cuts: index of the first frame of every shot but the first, ascending.
    Returns: the clips in order, and the number of pieces dropped for having fewer than `min_frames` frames.
    """
    spans: list[ClipSpan] = []
    dropped = shot = 0
    for number, stretch in enumerate(stretches):
        fps = output_rate(stretch.rate, division.fps)
        ticks = 1 / (fps * time_base)
        duration = last_duration if stretch.last == len(pts) else round(1 / (stretch.rate.fps * time_base))
        own = pts[stretch.first : stretch.last]
        holes = {stretch.first + i for i in gaps(own, time_base, stretch.rate, division.fill_slots)}
        inner = {cut for cut in cuts if stretch.first < cut < stretch.last}
        bounds = [stretch.first, *sorted(holes | inner), stretch.last]
        for first, last in zip(bounds, bounds[1:], strict=False):
            end = int(pts[last - 1]) + max(1, duration)
            if last < stretch.last:
                end = min(end, int(pts[last])) if last in holes else int(pts[last])
            shown = resample(pts, (first, last), end, fps, stretch.rate, time_base)
            filled = stretch.rate.sparse and fps == stretch.rate.fps
            repeated = np.flatnonzero(np.diff(shown) == 0) + 1 if filled else np.empty(0, np.int64)
            longest = longest_clip(division.seconds, fps)
            own_edges = _edges_of_groups(stretch, first, last, longest) if fps == stretch.rate.fps else None
            edges = own_edges or _edges(len(shown), longest)
            for a, b in zip(edges, edges[1:], strict=False):
                if b - a < division.min_frames:
                    dropped += 1
                    continue
                repeats = tuple(int(i) - a for i in repeated if a <= i < b)
                start = int(pts[first]) + a * ticks
                spans.append(ClipSpan(shot, shown[a:b], start, fps, number, repeats, own_edges is not None))
            shot += 1
    return spans, dropped


def longest_clip(seconds: float, fps: Fraction) -> int:
    """Frames of the longest clip; 0 or 1 where `seconds` holds fewer than two."""
    return int(seconds * fps + Fraction(1, 1000))


def _edges(num_frames: int, longest: int) -> list[int]:
    """Bounds of pieces of equal length; with at least two frames each where there are two."""
    pieces = -(-num_frames // max(1, longest))
    if longest >= 2:
        pieces = max(1, min(pieces, num_frames // 2))
    return [num_frames * i // pieces for i in range(pieces + 1)]


def _edges_of_groups(stretch: Stretch, first: int, last: int, longest: int) -> list[int] | None:
    """Bounds of clips of whole groups, as many in each as fit; None where the shot is not made of such groups.

    A last group of a single frame joins the clip before it.
    """
    starts = [start for start in stretch.groups if first <= start < last]
    ends_closed = last == stretch.last or last in stretch.groups
    if not starts or starts[0] != first or not ends_closed or stretch.rate.variable or stretch.rate.sparse:
        return None
    bounds = [*starts, last]
    if max(b - a for a, b in zip(bounds, bounds[1:], strict=False)) > longest:
        return None
    edges = [first]
    for start, end in zip(bounds, bounds[1:], strict=False):
        if end - edges[-1] > longest and end - start >= 2:
            edges.append(start)
    edges.append(last)
    return [edge - first for edge in edges]
