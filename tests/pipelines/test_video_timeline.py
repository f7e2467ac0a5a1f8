"""Time: rates measured from timestamps, resampling, and how shots become clips."""

from fractions import Fraction

import numpy as np
import pytest

from kinema.pipelines.video.clock import Rate, measure_clocks, measure_rate, slots_of
from kinema.pipelines.video.timeline import Division, Stretch, divide_shots, gaps, output_rate, resample

TICK = Fraction(1, 30000)
MS = Fraction(1, 1000)


def constant(num_frames: int, step: int = 1001, start: int = 0) -> np.ndarray:
    return start + step * np.arange(num_frames)


def divided(pts, cuts, last_duration, rate, time_base, **division):
    """Clips of a source with one clock."""
    stretches = [Stretch(0, len(pts), rate)]
    return divide_shots(pts, cuts, last_duration, stretches, time_base, Division(**division))


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
    spans, dropped = divided(pts, [100], 1, rate, Fraction(1, 24), fps=24, seconds=4.0, min_frames=2)
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
    spans, _ = divided(pts, cuts, 1001, rate, TICK, fps=25, seconds=1.0, min_frames=1)
    bounds = [0, *cuts, 200]
    for span in spans:
        assert bounds[span.shot] <= span.frames.min() and span.frames.max() < bounds[span.shot + 1]
        assert len(span.frames) <= 25


def test_short_pieces_are_dropped_and_counted():
    rate = Rate(Fraction(24), False, 0)
    spans, dropped = divided(constant(20, 1), [9, 10], 1, rate, Fraction(1, 24), fps=24, seconds=4.0, min_frames=5)
    assert [len(span.frames) for span in spans] == [9, 10] and dropped == 1


def test_a_hole_in_the_timestamps_starts_a_new_shot():
    pts = constant(40, 1001)
    pts[25:] += 60000
    assert gaps(pts, TICK) == [25]
    rate = measure_rate(pts, TICK, 1001, ())
    spans, _ = divided(pts, [], 1001, rate, TICK, fps=30, seconds=9.0, min_frames=2)
    assert [span.shot for span in spans] == [0, 1]
    assert len(spans[0].frames) == pytest.approx(25, abs=1), "the hole is not filled with a still picture"


def test_output_rate_zero_keeps_the_sources():
    rate = Rate(Fraction(30000, 1001), False, 0)
    assert output_rate(rate, 0) == Fraction(30000, 1001)
    assert output_rate(rate, 29.97) == Fraction(2997, 100)


def test_one_frame_has_the_stated_rate():
    assert measure_rate(np.array([7]), TICK, 0, (Fraction(50),)).fps == 50


def grid(present: np.ndarray, fps: Fraction, time_base: Fraction) -> np.ndarray:
    """Timestamps of the slots that hold a frame, rounded to the time base."""
    slots = np.flatnonzero(present)
    return np.array([round(int(slot) / (fps * time_base)) for slot in slots], np.int64)


RATES = [Fraction(n) for n in (10, 12, 25, 30, 50, 60, 120)] + [Fraction(24000, 1001), Fraction(30000, 1001)]


@pytest.mark.parametrize("time_base", [MS, Fraction(1, 90000), Fraction(1, 15360)])
@pytest.mark.parametrize("fps", RATES)
def test_lost_frames_leave_the_rate_of_the_grid(fps, time_base):
    """Whatever the container says: here the count over the duration, as FFmpeg reports it."""
    rng = np.random.default_rng(int(fps * 1000))
    for share in (0.01, 0.1, 0.3):
        present = rng.random(300) >= share
        present[[0, -1]] = True
        pts = grid(present, fps, time_base)
        average = Fraction(len(pts), 300) * fps
        (only,) = measure_clocks(pts, time_base, 0, (average,))
        rate = only[1]
        assert not rate.variable
        assert float(rate.fps) == pytest.approx(float(fps), rel=1e-4)
        holes = [0, *gaps(pts, time_base, rate), len(pts)]
        for first, last in zip(holes, holes[1:], strict=False):
            shown = resample(pts, (first, last), int(pts[last - 1]) + 1, rate.fps, rate, time_base)
            slots = np.flatnonzero(present)[first:last]
            assert len(shown) == slots[-1] - slots[0] + 1
            assert np.unique(shown).tolist() == list(range(first, last))


def test_a_long_hole_does_not_lower_the_rate():
    for fps, hole in ((30, 3000), (25, 40), (1, 50)):
        present = np.ones(120 + hole, bool)
        present[60 : 60 + hole] = False
        pts = grid(present, Fraction(fps), Fraction(1, 12800))
        ((_, rate),) = measure_clocks(pts, Fraction(1, 12800), 0, ())
        assert (rate.fps, rate.variable) == (fps, False)
        assert gaps(pts, Fraction(1, 12800), rate) == [60]


@pytest.mark.parametrize("first, second", [(25, 30), (30, 15), (60, 24), (10, 50)])
def test_a_rate_that_changes_at_a_keyframe_is_another_clock(first, second):
    base = Fraction(1, 90000)
    pts = np.cumsum([0, *[90000 // first] * 80, *[90000 // second] * 79])
    stated = (Fraction(first + second, 2),)
    (start, one), (middle, two) = measure_clocks(pts, base, 0, stated, {0, 40, 80, 120})
    assert (start, middle, one.fps, two.fps) == (0, 80, first, second)
    ((_, rate),) = measure_clocks(pts, base, 0, stated, {0, 40, 120})
    assert rate.variable, "a camera that changes its rate as it films"


def test_another_clock_may_begin_behind_a_hole():
    base = Fraction(1, 90000)
    pts = np.cumsum([0, *[3000] * 60, 90000, *[6000] * 60])
    (_, one), (middle, two) = measure_clocks(pts, base, 0, ())
    assert (middle, one.fps, two.fps) == (61, 30, 15)


def test_no_grid_no_slots():
    rng = np.random.default_rng(3)
    for steps in (rng.integers(500, 4000, 200), np.tile([1001, 2002, 1501], 50), np.tile([1000, 1700], 80)):
        ((_, rate),) = measure_clocks(np.cumsum(steps), TICK, 0, ())
        assert rate.variable


def test_slots_follow_a_rate_that_is_not_quite_exact():
    pts = np.round(np.arange(20_000) * 100.01).astype(np.int64)
    assert slots_of(pts, 100.0).tolist() == list(range(20_000))


@pytest.mark.parametrize("num_frames", [2, 3, 20, 21, 101])
def test_no_frame_is_left_alone_where_a_clip_holds_two(num_frames):
    rate = Rate(Fraction(1, 2), False, 0)
    spans, dropped = divided(constant(num_frames, 2), [], 2, rate, Fraction(1), fps=0, seconds=4.0, min_frames=2)
    assert dropped == 0 and {len(span.frames) for span in spans} <= {2, 3}
    assert np.concatenate([span.frames for span in spans]).tolist() == list(range(num_frames))


def test_filling_is_a_choice():
    present = np.ones(60, bool)
    present[[20, 40, 41, 42]] = False
    pts = grid(present, Fraction(25), Fraction(1, 25))
    ((_, rate),) = measure_clocks(pts, Fraction(1, 25), 0, ())
    for fill, lengths in ((0, [20, 19, 17]), (1, [40, 17]), (3, [60])):
        spans, _ = divided(pts, [], 1, rate, Fraction(1, 25), fps=0, seconds=60.0, min_frames=2, fill_slots=fill)
        assert [len(span.frames) for span in spans] == lengths
        assert [span.repeats for span in spans if span.repeats] == {1: [(20,)], 3: [(20, 40, 41, 42)]}.get(fill, [])


@pytest.mark.parametrize("spread", [0.2, 0.4])
def test_a_clock_that_jitters_is_constant_if_every_frame_has_a_slot_of_its_own(spread):
    """Webcams: 30 frames per second, each stamped when it arrived."""
    rng = np.random.default_rng(4)
    pts = np.rint((np.arange(90) + 1 + rng.uniform(-spread, spread, 90)) * 1000 / 30).astype(np.int64)
    rate = measure_rate(pts, MS, 0, ())
    assert (rate.fps, rate.variable, rate.sparse) == (30, False, False)
    spans, dropped = divided(pts, [], 33, rate, MS, fps=0, seconds=10, min_frames=2)
    assert dropped == 0 and spans[0].frames.tolist() == list(range(90))


def test_steps_at_random_leave_every_grid():
    for seed in range(20):
        steps = np.random.default_rng(seed).integers(15, 55, 90)
        assert measure_rate(np.cumsum(steps), MS, 0, (Fraction(30),)).variable


@pytest.mark.parametrize("fps, time_base", [("24000/1001", "1/24000"), ("30", "1/1000"), ("25", "1/90000")])
def test_one_lost_frame_is_no_jitter_wherever_it_is(fps, time_base):
    fps, time_base = Fraction(fps), Fraction(time_base)
    for num_frames in (24, 27, 40, 200):
        for lost in range(1, num_frames - 1, 1 + num_frames // 40):
            slots = np.delete(np.arange(num_frames), lost)
            pts = np.array([round(int(slot) / fps / time_base) for slot in slots])
            rate = measure_rate(pts, time_base, 0, (Fraction(len(pts)) / num_frames * fps,))
            assert (rate.fps, rate.sparse, rate.variable) == (fps, True, False), (num_frames, lost)
