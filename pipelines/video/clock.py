"""The clock of a recording: constant, a grid with empty slots, several of these in turn, or truly variable.

Rates come from the steps between frames, never from duration / count, which holes falsify. Timestamps are integers in
units of the stream's time base.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float64, Int64

_JITTER = 0.25  # of a slot; timestamps within it count as on the grid
_NEAREST = 0.45  # of a slot; frames within it lie in their own slot and in no other
_EVEN = 0.15  # of a slot: how far nine of ten steps are off whole slots where nothing jitters
_MAX_DENOMINATOR = 100_000
FILLED_SLOTS = 4
"""Longest run of empty slots that is seen as lost frames rather than as a hole in the recording."""
_WINDOW = 24  # steps looked at to guess a slot
_CHANGED = 8  # steps that have to disagree before another clock is assumed
_SHORTEST_RUN = 6  # frames that make a clock of their own
_ON_GRID = 0.95  # share of steps
_USUAL_RATES = tuple(
    [Fraction(n * 1000, 1001) for n in (24, 30, 48, 60, 120, 240)]
    + [Fraction(n) for n in (5, 6, 8, 10, 12, 15, 20, 24, 25, 30, 48, 50, 60, 90, 100, 120, 144, 240, 480, 960, 1000)]
)


@dataclass(frozen=True)
class Rate:
    """Frame rate of a run of frames, measured from its timestamps."""

    fps: Fraction
    """Of the grid, the container's exact value where the timestamps agree with it; the average of a variable run."""
    variable: bool
    """Whether there is no grid that the timestamps lie on."""
    rounding: int
    """Ticks by which timestamps may have been rounded (1 for coarse time bases such as Matroska's ms)."""
    sparse: bool = False
    """Whether slots of the grid are empty."""


def measure_rate(
    pts: Int64[np.ndarray, "N"], time_base: Fraction, last_duration: int, container_rates: tuple[Fraction, ...]
) -> Rate:
    """Rate of a run with one clock: the first of `measure_clocks`."""
    return measure_clocks(pts, time_base, last_duration, container_rates)[0][1]


def measure_clocks(
    pts: Int64[np.ndarray, "N"],
    time_base: Fraction,
    last_duration: int,
    container_rates: tuple[Fraction, ...],
    keyframes: Collection[int] = (),
) -> list[tuple[int, Rate]]:
    """First frame and rate of every stretch with a clock of its own.

    Recordings are joined at keyframes or behind holes, so only there another clock begins. A rate that changes
    elsewhere (cameras do that in the dark) is one variable clock.

    Args:
        pts: sorted, at least one.
        last_duration: ticks the last frame is shown; 0 where the file does not say.
        container_rates: rates the container states, best first; used where the timestamps agree.
        keyframes: frames at which decoding can start.
    """
    if len(pts) < 2 or pts[-1] <= pts[0]:
        return [(0, Rate(container_rates[0] if container_rates else Fraction(25), False, 0))]
    constant = _constant(pts, time_base, container_rates)
    if constant is not None:
        return [(0, constant)]
    steps = np.diff(pts)
    runs = _grid_runs(steps.astype(np.float64))
    runs = _at_joins(runs, steps, keyframes) if runs else None
    may_jitter = runs is None or (len(runs) == 1 and not _keeps_to_grid(steps, runs[0][2]))
    steady = _jittered(pts, time_base, container_rates) if may_jitter else None
    if steady is not None:
        return [(0, steady)]
    if runs is None:
        return [(0, _variable(pts, time_base, last_duration, container_rates))]
    clocks = []
    for first, last, slot in runs:
        own = pts[first : last + (last == len(steps))]
        rate = _constant(own, time_base, container_rates) if len(own) > 2 else None
        clocks.append((first, rate or _grid_rate(steps[first:last], slot, time_base, container_rates)))
    return clocks


def _constant(pts: Int64[np.ndarray, "N"], time_base: Fraction, rates: tuple[Fraction, ...]) -> Rate | None:
    """The rate if every frame lies in the next slot of one grid."""
    span = int(pts[-1] - pts[0])
    if span <= 0:
        return None
    interval = span / (len(pts) - 1)
    steps = np.diff(pts)
    deviation = np.abs(pts - pts[0] - interval * np.arange(len(pts))).max()
    uneven = np.abs(steps - interval).max()
    if deviation > max(1, _JITTER * interval) or uneven > max(1, 2 * _JITTER * interval) or steps.min() <= 0:
        return None
    if deviation > max(1, 0.02 * interval) and len(pts) >= _WINDOW:  # the ends are as uneven as the rest
        fps = _fitted_rate(*_fit(pts), len(pts), time_base, rates)
        return Rate(fps, False, _rounding(steps, interval))
    measured = (Fraction(len(pts) - 1) / (span * time_base)).limit_denominator(1001)
    return Rate(_agreeing(rates, measured, max(1e-3, 2 / span)), False, _rounding(steps, interval))


def _keeps_to_grid(steps: Int64[np.ndarray, "M"], slot: float) -> bool:
    """Whether steps are so even that one of two slots is a lost frame and not a late one."""
    off = np.abs(steps - np.maximum(1, np.rint(steps / slot)) * slot)
    return float(np.quantile(off, 0.9)) <= max(1.01, _EVEN * slot)


def _jittered(pts: Int64[np.ndarray, "N"], time_base: Fraction, rates: tuple[Fraction, ...]) -> Rate | None:
    """The rate if every frame is nearer to its slot of one grid than to the next, however late or early it is.

    Webcams and screen recorders stamp frames when they get them. Rates that really vary leave any grid soon, and
    cadences have few steps that are nearly a slot long.
    """
    steps = np.diff(pts)
    if len(pts) < _WINDOW or steps.min() <= 0:
        return None
    interval, deviation = _fit(pts)
    if deviation > _NEAREST * interval or (np.abs(steps - interval) <= 0.2 * interval).mean() < 0.35:
        return None
    return Rate(_fitted_rate(interval, deviation, len(pts), time_base, rates), False, 0)


def _fit(pts: Int64[np.ndarray, "N"]) -> tuple[float, float]:
    """Ticks of a slot by least squares, and how far frames are off their slots at most."""
    slots, offsets = np.arange(len(pts)), (pts - pts[0]).astype(np.float64)
    interval, start = np.polyfit(slots, offsets, 1)
    return float(interval), float(np.abs(offsets - start - interval * slots).max())


def _fitted_rate(
    interval: float, deviation: float, num_frames: int, time_base: Fraction, rates: tuple[Fraction, ...]
) -> Fraction:
    """The nearest of the stated and usual rates that agrees with a fit, else the fitted one."""
    measured = (1 / (Fraction(interval).limit_denominator(10_000) * time_base)).limit_denominator(1001)
    near = sorted((*rates, *_USUAL_RATES), key=lambda rate: abs(rate / measured - 1))[:1]
    return _agreeing(tuple(near), measured, max(1e-3, 4 * deviation / interval / num_frames**1.5))


def _rounding(steps: Int64[np.ndarray, "M"], interval: float) -> int:
    return int(0.01 <= 1 / interval <= _JITTER and bool((steps != steps[0]).any()))


def _variable(
    pts: Int64[np.ndarray, "N"], time_base: Fraction, last_duration: int, rates: tuple[Fraction, ...]
) -> Rate:
    """Frames over the time in which they are shown; each hole counts as one usual frame."""
    steps = np.diff(pts)
    holes = steps > hole_ticks(steps, None, time_base, FILLED_SLOTS)
    shown = steps[~holes] if (~holes).any() else steps
    usual = round(float(shown.mean()))
    total = int(shown.sum()) + int(holes.sum()) * usual + (last_duration or usual)
    measured = (Fraction(len(pts)) / (max(1, total) * time_base)).limit_denominator(_MAX_DENOMINATOR)
    # containers differ in whether they count the last frame's duration
    return Rate(_agreeing(rates, measured, 1.5 / (len(pts) - 1)), True, _rounding(steps, max(1.0, float(shown.mean()))))


def _agreeing(rates: tuple[Fraction, ...], measured: Fraction, tolerance: float) -> Fraction:
    """The first stated rate that agrees with the measured one, else the measured one."""
    return next((rate for rate in rates if abs(rate / measured - 1) <= tolerance), measured)


def _grid_rate(
    steps: Int64[np.ndarray, "M"], slot: float, time_base: Fraction, container_rates: tuple[Fraction, ...]
) -> Rate:
    """Exact rate of a grid with slots of about `slot` ticks.

    A stated or usual rate is taken if it drifts by less than half a slot from the timestamps over the whole run.
    """
    counts = np.maximum(1, np.rint(steps / slot))
    inside = counts <= FILLED_SLOTS + 1
    num_slots = int(counts[inside].sum())
    tolerance = max(min(1e-3, 0.5 / max(1, num_slots)), 1 / max(1.0, num_slots * slot))
    measured = 1 / (Fraction(slot).limit_denominator(10_000) * time_base)
    usual = sorted(_USUAL_RATES, key=lambda rate: abs(rate / measured - 1))[:1]
    fps = _agreeing((*container_rates, *usual), measured.limit_denominator(1001), tolerance)
    return Rate(fps, False, _rounding(steps[inside], slot), sparse=bool((counts > 1).any()))


def _grid_runs(steps: Float64[np.ndarray, "M"]) -> list[tuple[int, int, float]] | None:
    """(first step, end, slot in ticks) of runs that lie on a grid each; None if most of the steps lie on none."""
    runs: list[tuple[int, int, float]] = []
    lost, first = 0, 0
    while first < len(steps):
        end, slot, good = _follow_grid(steps, first)
        if good and (end - first >= _SHORTEST_RUN or end - first == len(steps)):
            runs.append((first, end, slot))
        else:
            lost += end - first
        first = end
    if not runs or lost > (1 - _ON_GRID) * len(steps) or len(runs) > 1 + len(steps) // _WINDOW:
        return None
    # what lies between two runs belongs to the one before it, at the beginning to the first
    starts = [0, *[first for first, _, _ in runs[1:]], len(steps)]
    merged = [(starts[i], starts[i + 1], slot) for i, (_, _, slot) in enumerate(runs)]
    return _join_equal(merged)


def _at_joins(
    runs: list[tuple[int, int, float]], steps: Int64[np.ndarray, "M"], keyframes: Collection[int]
) -> list[tuple[int, int, float]] | None:
    """The runs with their bounds at the keyframes or holes they begin at; None if one begins at neither."""
    starts = [runs[0][0]]
    for (_, _, before), (first, _, slot) in zip(runs, runs[1:], strict=False):
        hole = (FILLED_SLOTS + 1.5) * max(before, slot)
        near = [first, first + 1, first - 1]
        joins = [frame for frame in near if frame in keyframes or steps[frame - 1] > hole]
        if not joins:
            return None
        starts.append(joins[0])
    ends = [*starts[1:], runs[-1][1]]
    return [(first, end, slot) for first, end, (_, _, slot) in zip(starts, ends, runs, strict=True)]


def _join_equal(runs: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    joined = [runs[0]]
    for first, end, slot in runs[1:]:
        before = joined[-1]
        if abs(slot - before[2]) <= max(0.02 * slot, min(1.0, 0.2 * slot) / _SHORTEST_RUN):
            total = end - before[0]
            mean = ((before[1] - before[0]) * before[2] + (end - first) * slot) / total
            joined[-1] = (before[0], end, mean)
        else:
            joined.append((first, end, slot))
    return joined


def _follow_grid(steps: Float64[np.ndarray, "M"], first: int) -> tuple[int, float, bool]:
    """How far the grid that begins at a step goes on.

    Returns: end, ticks of a slot, and whether nearly all steps lie on it and half of them are one slot long.
    """
    slot = _commonest(steps[first : first + _WINDOW])
    counts: list[int] = []  # slots of each step; 0 off the grid, -1 for a hole
    total, slots = 0.0, 0
    for end in range(first, len(steps)):
        count, fits = max(1, round(steps[end] / slot)), steps[end] > 0
        is_hole = count > FILLED_SLOTS + 1
        fits = fits and abs(steps[end] - count * slot) <= max(1.01, 0.3 * slot)
        counts.append(-1 if is_hole else count if fits else 0)
        if counts[-1] > 0:
            total, slots = total + steps[end], slots + count
            slot = total / slots if slots >= _CHANGED else slot
        if len(counts) > _CHANGED and _other_clock(steps[end - _CHANGED + 1 : end + 1], counts[-_CHANGED:], slot):
            del counts[-_CHANGED:]
            slot = _mean_slot(steps[first:], counts, slot)
            while abs(steps[first + len(counts)] - slot) <= max(1.0, 0.05 * slot) and len(counts) <= end - first:
                counts.append(1)
            break
    end = first + len(counts)
    own = np.array(counts)
    slot = _mean_slot(steps[first:], counts, slot)
    inside = max(1, int((own >= 0).sum()))
    good = int((own == 0).sum()) <= (1 - _ON_GRID) * inside and 2 * int((own == 1).sum()) >= inside
    return end, slot, good


def _mean_slot(steps: Float64[np.ndarray, "M"], counts: list[int], otherwise: float) -> float:
    own = np.array(counts)
    on_grid = own > 0
    return float(steps[: len(own)][on_grid].sum() / own[on_grid].sum()) if on_grid.any() else otherwise


def _other_clock(steps: Float64[np.ndarray, "W"], counts: list[int], slot: float) -> bool:
    """Whether the last steps have left the grid.

    Half of them lie off it, or all take the same several slots, or all are longer or all shorter by a twentieth.
    """
    if -1 in counts:
        return False
    if counts.count(0) >= _CHANGED // 2 or (min(counts) == max(counts) and counts[0] > 1):
        return True
    excess = steps - np.maximum(counts, 1) * slot
    return abs(float(excess.mean())) > max(1.0, 0.05 * slot) and bool((excess > 0).all() or (excess < 0).all())


def _commonest(steps: Float64[np.ndarray, "W"]) -> float:
    """Mean of the largest group of like steps; of several the smallest."""
    positive = np.sort(steps[steps > 0])
    if len(positive) == 0:
        return 1.0
    near = np.abs(positive[:, None] - positive[None]) <= np.maximum(1.0, 0.15 * positive[:, None])
    best = int(near.sum(1).argmax())
    return float(positive[near[best]].mean())


def hole_ticks(steps: Int64[np.ndarray, "M"], slot: float | None, time_base: Fraction, fill_slots: int) -> float:
    """Longest step in ticks that is no hole: lost or cut-out footage, still parts that were left out.

    Args: slot, ticks of a slot of the grid; None for a variable clock, where a hole is longer than a quarter of a
        second and than 4.5 usual frames.
    """
    if slot is not None:
        return (fill_slots + 1.5) * slot
    return max(0.25 / float(time_base), 4.5 * float(np.median(steps)))


def slots_of(pts: Int64[np.ndarray, "N"], slot: float) -> Int64[np.ndarray, "N"]:
    """Slot of every frame of a stretch without holes; the first has 0, each lies behind the one before.

    The grid's phase follows the timestamps slowly, so that a rate that is not quite exact loses no frame.
    """
    numbers = np.zeros(len(pts), np.int64)
    phase, last = float(pts[0]), 0
    for index in range(1, len(pts)):
        offset = float(pts[index]) - phase
        count = max(1, round(offset / slot))
        last += count
        phase += count * slot
        phase += 0.125 * (float(pts[index]) - phase)
        numbers[index] = last
    return numbers
