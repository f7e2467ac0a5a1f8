"""Time: which source frame is shown when, at what rate, and how shots are divided into clips.

A frame is displayed from its timestamp until the next one's. Output frame i of a shot shows the frame displayed at
`start + i / fps`. Timestamps are integers in units of the stream's time base.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

_JITTER = 0.25  # of a frame's duration; timestamps within it count as a constant rate
_MAX_DENOMINATOR = 100_000


@dataclass(frozen=True)
class Rate:
    """Frame rate of a source, measured from its timestamps."""

    fps: Fraction
    """Average rate; the container's exact value where the timestamps agree with it."""
    variable: bool
    """Whether timestamps leave a constant grid by more than a quarter of a frame."""
    rounding: int
    """Ticks by which timestamps may have been rounded (1 for coarse time bases such as Matroska's ms)."""


@dataclass(frozen=True)
class ClipSpan:
    """One clip: the source frames it shows and where it starts."""

    shot: int
    """0-based number of the shot in its source."""
    frames: Int64[np.ndarray, "T"]
    """Index of the source frame (sorted by timestamp) that each output frame shows."""
    start: Fraction
    """Time of the first output frame, in ticks."""


def measure_rate(
    pts: Int64[np.ndarray, "N"], time_base: Fraction, last_duration: int, container_rates: tuple[Fraction, ...]
) -> Rate:
    """Rate of sorted timestamps.

    Args:
        pts: sorted, at least one.
        last_duration: ticks the last frame is shown; 0 where the file does not say.
        container_rates: rates the container states, best first; used where the timestamps agree.
    """
    span = int(pts[-1] - pts[0])
    if len(pts) < 2 or span <= 0:
        return Rate(container_rates[0] if container_rates else Fraction(25), False, 0)
    interval = span / (len(pts) - 1)
    steps = np.diff(pts)
    coarse = 0.01 <= 1 / interval <= _JITTER and bool((steps != steps[0]).any())
    deviation = np.abs(pts - pts[0] - interval * np.arange(len(pts))).max()
    if deviation > max(1, _JITTER * interval) or steps.min() <= 0:
        total = span + (last_duration or round(interval))
        measured = (Fraction(len(pts)) / (total * time_base)).limit_denominator(_MAX_DENOMINATOR)
        # containers differ in whether they count the last frame's duration
        return Rate(_agreeing(container_rates, measured, 1.5 / (len(pts) - 1)), True, int(coarse))
    measured = (Fraction(len(pts) - 1) / (span * time_base)).limit_denominator(1001)
    return Rate(_agreeing(container_rates, measured, max(1e-3, 2 / span)), False, int(coarse))


def _agreeing(rates: tuple[Fraction, ...], measured: Fraction, tolerance: float) -> Fraction:
    """The first stated rate that agrees with the measured one, else the measured one."""
    return next((rate for rate in rates if abs(rate / measured - 1) <= tolerance), measured)


def gaps(pts: Int64[np.ndarray, "N"], time_base: Fraction) -> list[int]:
    """Frames that follow a hole in the timestamps (lost or cut-out footage): new shots start there.

    A hole is longer than a quarter of a second and than 4.5 usual frames.
    """
    if len(pts) < 3:
        return []
    steps = np.diff(pts)
    hole = max(0.25 / float(time_base), 4.5 * float(np.median(steps)))
    return [int(index) + 1 for index in np.flatnonzero(steps > hole)]


def output_rate(rate: Rate, fps: float) -> Fraction:
    """Rate of the clips: `clip.fps`, or the source's average rate where that is 0."""
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
        shot: frames [first, last) of the shot.
        end: timestamp at which the shot's last frame stops being shown.
        fps: output rate.
        rate: the source's rate; at the same constant rate frames map one to one.
    """
    first, last = shot
    if fps == rate.fps and not rate.variable:
        return np.arange(first, last)
    ticks = 1 / (fps * time_base)  # per output frame
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
    rate: Rate,
    time_base: Fraction,
    *,
    fps: Fraction,
    seconds: float,
    min_frames: int,
) -> tuple[list[ClipSpan], int]:
    """Clips of equal length (to one frame) no longer than `seconds`, none across a cut.

    Args: cuts: index of the first frame of every shot but the first, ascending.
    Returns: the clips in order, and the number of pieces dropped for having fewer than `min_frames` frames.
    """
    longest = max(1, int(seconds * fps + Fraction(1, 1000)))
    holes = set(gaps(pts, time_base))
    bounds = [0, *sorted(holes | set(cuts)), len(pts)]
    ticks = 1 / (fps * time_base)
    spans: list[ClipSpan] = []
    dropped = 0
    for shot, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        end = int(pts[last - 1]) + max(1, last_duration)
        if last < len(pts):
            end = min(end, int(pts[last])) if last in holes else int(pts[last])
        shown = resample(pts, (first, last), end, fps, rate, time_base)
        pieces = -(-len(shown) // longest)
        edges = [len(shown) * i // pieces for i in range(pieces + 1)]
        for a, b in zip(edges, edges[1:], strict=False):
            if b - a < min_frames:
                dropped += 1
            else:
                spans.append(ClipSpan(shot, shown[a:b], int(pts[first]) + a * ticks))
    return spans, dropped
