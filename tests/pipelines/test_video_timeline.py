"""Time: rates measured from timestamps, resampling, and how shots become clips."""

from fractions import Fraction

import numpy as np
import pytest

from kinema.pipelines.video.timeline import Rate, divide_shots, gaps, measure_rate, output_rate, resample

TICK = Fraction(1, 30000)
MS = Fraction(1, 1000)


def constant(num_frames: int, step: int = 1001, start: int = 0) -> np.ndarray:
    return start + step * np.arange(num_frames)


def shown_at(pts: np.ndarray, tick: Fraction) -> int:
    """The frame displayed at a time, by definition."""
    return max(i for i in range(len(pts)) if pts[i] <= tick)


def test_constant_rate_takes_the_containers_exact_value():
    rate = measure_rate(constant(100), TICK, 1001, (Fraction(30000, 1001),))
    assert rate == Rate(Fraction(30000, 1001), False, 0)


def test_a_wrong_rate_in_the_container_is_not_believed():
    rate = measure_rate(constant(100), TICK, 1001, (Fraction(90000),))
    assert rate.fps == Fraction(30000, 1001) and not rate.variable


@pytest.mark.parametrize("fps", [24, 25, 30, 50, 60])
def test_millisecond_rounding_is_not_a_variable_rate(fps):
    pts = np.round(np.arange(200) * 1000 / fps).astype(np.int64)
    rate = measure_rate(pts, MS, 0, (Fraction(fps),))
    assert rate.fps == fps and not rate.variable


def test_variable_rate_is_frames_over_time():
    pts = np.cumsum([0, *[1001, 2002, 1501] * 20])
    rate = measure_rate(pts, TICK, 1501, ())
    total_s = (pts[-1] + 1501) / 30000
    assert rate.variable
    assert float(rate.fps) == pytest.approx(len(pts) / total_s, rel=1e-6)


def test_same_rate_maps_frames_one_to_one_despite_rounding():
    pts = np.round(3 + np.arange(150) * 1001 / 30).astype(np.int64)
    rate = measure_rate(pts, MS, 33, (Fraction(30000, 1001),))
    shown = resample(pts, (20, 150), int(pts[-1]) + 33, rate.fps, rate, MS)
    assert shown.tolist() == list(range(20, 150))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fps", [Fraction(7), Fraction(24), Fraction(30000, 1001), Fraction(60)])
def test_every_output_frame_shows_what_is_displayed_then(seed, fps):
    pts = 500 + np.cumsum(np.random.default_rng(seed).integers(300, 3500, 80))
    rate = measure_rate(pts, TICK, 1001, ())
    first, last = 10, 70
    shown = resample(pts, (first, last), int(pts[last]), fps, rate, TICK)
    ticks = [int(pts[first]) + Fraction(i) / (fps * TICK) for i in range(len(shown))]
    assert shown.tolist() == [min(shown_at(pts, tick), last - 1) for tick in ticks]
    assert len(shown) == pytest.approx((pts[last] - pts[first]) * TICK * fps, abs=1)


def test_half_the_rate_takes_every_second_frame_of_a_millisecond_container():
    pts = np.round(np.arange(60) * 1000 / 30).astype(np.int64)
    rate = measure_rate(pts, MS, 33, (Fraction(30),))
    assert resample(pts, (0, 60), 2000, Fraction(15), rate, MS).tolist() == list(range(0, 60, 2))


def test_clips_of_a_shot_have_equal_length_and_cover_it():
    rate = Rate(Fraction(24), False, 0)
    pts = constant(250, 1)
    spans, dropped = divide_shots(pts, [100], 1, rate, Fraction(1, 24), fps=Fraction(24), seconds=4.0, min_frames=2)
    assert dropped == 0
    assert [len(span.frames) for span in spans] == [50, 50, 75, 75]
    assert [span.shot for span in spans] == [0, 0, 1, 1]
    assert np.concatenate([span.frames for span in spans]).tolist() == list(range(250))
    assert [span.start for span in spans] == [0, 50, 100, 175]


def test_clips_never_show_frames_of_two_shots_when_resampled():
    rng = np.random.default_rng(5)
    pts = np.cumsum(rng.integers(500, 2500, 200))
    rate = measure_rate(pts, TICK, 1001, ())
    cuts = [37, 38, 90, 155]
    spans, _ = divide_shots(pts, cuts, 1001, rate, TICK, fps=Fraction(25), seconds=1.0, min_frames=1)
    bounds = [0, *cuts, 200]
    for span in spans:
        assert bounds[span.shot] <= span.frames.min() and span.frames.max() < bounds[span.shot + 1]
        assert len(span.frames) <= 25


def test_short_pieces_are_dropped_and_counted():
    rate = Rate(Fraction(24), False, 0)
    spans, dropped = divide_shots(
        constant(20, 1), [9, 10], 1, rate, Fraction(1, 24), fps=Fraction(24), seconds=4.0, min_frames=5
    )
    assert [len(span.frames) for span in spans] == [9, 10] and dropped == 1


def test_a_hole_in_the_timestamps_starts_a_new_shot():
    pts = constant(40, 1001)
    pts[25:] += 60000
    assert gaps(pts, TICK) == [25]
    rate = measure_rate(pts, TICK, 1001, ())
    spans, _ = divide_shots(pts, [], 1001, rate, TICK, fps=Fraction(30), seconds=9.0, min_frames=2)
    assert [span.shot for span in spans] == [0, 1]
    assert len(spans[0].frames) == pytest.approx(25, abs=1), "the hole is not filled with a still picture"


def test_output_rate_zero_keeps_the_sources():
    rate = Rate(Fraction(30000, 1001), False, 0)
    assert output_rate(rate, 0) == Fraction(30000, 1001)
    assert output_rate(rate, 29.97) == Fraction(2997, 100)


def test_one_frame_has_the_stated_rate():
    assert measure_rate(np.array([7]), TICK, 0, (Fraction(50),)).fps == 50
