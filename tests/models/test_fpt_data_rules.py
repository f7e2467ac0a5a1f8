"""Which tracks the Flow Poke Transformer is shown: the published draws, unbiased ones, and why a clip gives none."""

import random

import numpy as np
import pytest
import torch

from kinema.models.fpt.data_rules import (
    Motion,
    NoTrainingSample,
    SamplingRule,
    build_targets,
    camera_static,
    central_square,
    extract_motion,
    frame_to_image,
    gap_in_frames,
    points_in_square,
    square_image,
)

SMALL = SamplingRule(num_pokes=12, queries_per_poke=5, min_num_tracks=20)


class PublishedStart(np.random.Generator):
    """The published loader's draws of start frame and order."""

    def __init__(self, seed: int):
        super().__init__(np.random.PCG64(0))
        torch.manual_seed(seed)

    def integers(self, low, high):
        return int(torch.randint(low, high, (1,)))

    def permutation(self, x):
        return torch.randperm(x).numpy()


class PublishedOffsets(np.random.Generator):
    """The published loader's draws of query offsets."""

    def __init__(self, seed: int):
        super().__init__(np.random.PCG64(0))
        self.python = random.Random(seed)

    def integers(self, low, high):
        return self.python.randrange(low, high)


def moving_tracks(num_frames=10, num_tracks=60, seed=0, speed=0.01) -> tuple[np.ndarray, np.ndarray]:
    """Tracks that stay in the square, all visible."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0.3, 0.7, (1, num_tracks, 2))
    velocity = rng.normal(0, speed / 3, (1, num_tracks, 2))
    tracks = (start + np.arange(num_frames)[:, None, None] * velocity).astype(np.float32)
    return tracks, np.ones(tracks.shape[:2], dtype=bool)


def motion_of(num_tracks: int) -> Motion:
    """A motion whose positions are (index, 0) / 1000 in the shuffled order."""
    pos = np.stack([np.arange(num_tracks) / 1000, np.zeros(num_tracks)], axis=1).astype(np.float32)
    return Motion(0, 5, np.arange(num_tracks), pos, pos + 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_published_rule(seed, golden, fill):
    start = fill.uniform(0, "tracks0", 1, 60, 2, low=-0.1, high=1.1)
    velocity = fill.normal(0, "vel", 1, 60, 2)
    tracks = torch.cat([start + 0.01 * t * velocity for t in range(14)]).numpy()
    visible = (fill.uniform(0, "vis", 14, 60) > 0.2).numpy()
    rule = SamplingRule(num_pokes=12, queries_per_poke=5, min_num_tracks=20, unbiased=False)
    motion = extract_motion(tracks, visible, 6, rule, PublishedStart(seed))
    points = build_targets(motion, rule, PublishedOffsets(seed))
    expected = golden("fpt_data_rules")
    assert motion.start == expected.data[f"i_frame_{seed}"]
    found = {
        "pos": motion.pos,
        "flow": motion.flow,
        "pos_poke": points.poke_pos,
        "flow_poke": points.poke_flow,
        "pos_query": points.query_pos,
        "flow_query": points.query_flow,
        "camera_static": np.array(points.camera_static),
    }
    for name, value in found.items():
        expected.check(f"{name}_{seed}", value, atol=1e-7, rtol=0)


def test_published_static_camera(golden, fill):
    flow = fill.normal(0, "camflow", 100, 2, std=0.2).numpy()
    found = []
    for still in (30, 50, 90):
        scaled = flow.copy()
        scaled[:still] *= 0.01
        found.append(camera_static(scaled, SamplingRule()))
    golden("fpt_data_rules").check("camera_static_heuristic", np.array(found), atol=0, rtol=0)


def test_published_image(golden, fill):
    golden("fpt_data_rules").check("augment_64", square_image(fill.image(0, "frame", 1, 90, 90), 64), 1e-6, 0)


def known_share(rule: SamplingRule, num_tracks: int, repeats: int = 200) -> float:
    """Share of the last group's queries that ask for points known by then."""
    rng = np.random.default_rng(0)
    last = [build_targets(motion_of(num_tracks), rule, rng).query_pos[-1, :, 0] for _ in range(repeats)]
    return float((np.concatenate(last) * 1000 < rule.num_pokes - 1.5).mean())


def test_late_queries_ask_for_known_points_as_often_as_chance_has_it():
    """The published rule's bias (76 % at 128 pokes of 300 tracks) is gone: 127 of 300 are known by then."""
    assert known_share(SamplingRule(unbiased=False), 300, repeats=1000) == pytest.approx(0.76, abs=0.03)
    assert known_share(SamplingRule(), 300) == pytest.approx(127 / 300, abs=0.03)
    assert known_share(SamplingRule(allow_overlap=False), 300) == 0


@pytest.mark.parametrize("allow_overlap", [True, False])
def test_every_track_is_asked_for_equally_often_and_once_per_group(allow_overlap):
    rng = np.random.default_rng(0)
    rule = SamplingRule(num_pokes=6, queries_per_poke=4, min_num_tracks=1, allow_overlap=allow_overlap)
    counts = np.zeros((6, 20))
    for _ in range(3000):
        asked = np.rint(build_targets(motion_of(20), rule, rng).query_pos[..., 0] * 1000).astype(int)
        assert all(len(set(group)) == 4 for group in asked)
        counts[np.arange(6)[:, None], asked] += 1
    for group in range(6):
        hidden = 0 if allow_overlap else group
        assert counts[group, :hidden].sum() == 0
        np.testing.assert_allclose(counts[group, hidden:] / 3000, 4 / (20 - hidden), atol=0.05)


def test_queries_carry_the_flow_of_their_own_track():
    points = build_targets(motion_of(40), SMALL, np.random.default_rng(0))
    np.testing.assert_array_equal(points.query_flow, points.query_pos + 1)
    np.testing.assert_array_equal(points.poke_flow, points.poke_pos + 1)
    assert points.poke_pos.shape == (12, 2) and points.query_pos.shape == (12, 5, 2)


def test_flow_is_the_way_over_the_gap():
    tracks, visible = moving_tracks()
    motion = extract_motion(tracks, visible, 4, SMALL, np.random.default_rng(0))
    assert motion.end == motion.start + 4
    np.testing.assert_array_equal(motion.pos, tracks[motion.start, motion.tracks])
    np.testing.assert_array_equal(motion.pos + motion.flow, tracks[motion.end, motion.tracks])
    assert sorted(motion.tracks) == list(range(60)) and list(motion.tracks) != list(range(60))


def test_every_start_with_enough_tracks_is_drawn():
    tracks, visible = moving_tracks()
    visible[3, 10:] = False
    rng = np.random.default_rng(0)
    starts = {extract_motion(tracks, visible, 4, SMALL, rng).start for _ in range(100)}
    assert starts == {0, 1, 2, 4, 5}


def test_ends_may_be_hidden_or_outside_unless_forbidden():
    tracks, visible = moving_tracks(num_frames=2)
    tracks[1, :10] += 5
    visible[1, 10:25] = False
    usable = {
        (invisible, outside): len(
            extract_motion(
                tracks,
                visible,
                1,
                SamplingRule(12, 5, 20, allow_invisible_ends=invisible, allow_out_of_frame_ends=outside),
                np.random.default_rng(0),
            ).pos
        )
        for invisible in (True, False)
        for outside in (True, False)
    }
    assert usable == {(True, True): 60, (True, False): 50, (False, True): 45, (False, False): 35}


def test_starts_must_be_visible_inside_and_ends_finite():
    tracks, visible = moving_tracks(num_frames=2)
    tracks[0, :5] = [1.2, 0.5]
    visible[0, 5:9] = False
    tracks[1, 9:11] = np.nan
    motion = extract_motion(tracks, visible, 1, SMALL, np.random.default_rng(0))
    assert sorted(motion.tracks) == list(range(11, 60))
    assert np.isfinite(motion.flow).all()


def test_a_frame_that_fails_only_at_its_end_is_not_drawn_by_the_unbiased_rule():
    """The published rule may draw it, and then gives the clip up."""
    tracks, visible = moving_tracks(num_frames=3)
    visible[1, 5:] = False  # seen at the start of 1, so 0 is the only start, and hidden at 1, the end of 0
    visible[2] = True
    rule = SamplingRule(12, 5, 20, allow_invisible_ends=False)
    with pytest.raises(NoTrainingSample, match="too few tracks with a usable end"):
        extract_motion(tracks, visible, 1, rule, np.random.default_rng(0))
    assert extract_motion(tracks, visible, 2, rule, np.random.default_rng(0)).start == 0
    published = SamplingRule(12, 5, 20, unbiased=False, allow_invisible_ends=False)
    with pytest.raises(NoTrainingSample, match="from frame 0"):
        extract_motion(tracks, visible, 1, published, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("tracks", "visible", "gap", "reason"),
    [
        (*moving_tracks(num_frames=24), 25, "clip shorter than the time gap"),
        (*moving_tracks(num_tracks=19), 4, "too few visible tracks"),
        (moving_tracks()[0], np.zeros((10, 60), dtype=bool), 4, "too few visible tracks"),
        (*moving_tracks(num_tracks=0), 4, "too few visible tracks"),
        (moving_tracks()[0] + 2, moving_tracks()[1], 4, "too few visible tracks"),
    ],
)
@pytest.mark.parametrize("unbiased", [True, False])
def test_starvation_has_a_reason(tracks, visible, gap, reason, unbiased):
    rule = SamplingRule(12, 5, 20, unbiased=unbiased)
    with pytest.raises(NoTrainingSample) as caught:
        extract_motion(tracks, visible, gap, rule, np.random.default_rng(0))
    assert caught.value.reason == reason
    assert any(digit in str(caught.value) for digit in "0123456789")


@pytest.mark.parametrize("allow_overlap", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_as_many_tracks_as_the_rule_asks_for_suffice(unbiased, allow_overlap):
    rule = SamplingRule(12, 5, 1, unbiased=unbiased, allow_overlap=allow_overlap)
    enough, few = motion_of(rule.num_needed), motion_of(rule.num_needed - 1)
    assert build_targets(enough, rule, np.random.default_rng(0)).query_pos.shape == (12, 5, 2)
    with pytest.raises(NoTrainingSample, match="too few"):
        build_targets(few, rule, np.random.default_rng(0))


def test_samples_are_reproducible():
    tracks, visible = moving_tracks()

    def sample(seed):
        rng = np.random.default_rng(seed)
        return build_targets(extract_motion(tracks, visible, 3, SMALL, rng), SMALL, rng)

    assert np.array_equal(sample(1).query_pos, sample(1).query_pos)
    assert not np.array_equal(sample(1).query_pos, sample(2).query_pos)


@pytest.mark.parametrize(("gap_s", "fps", "frames"), [(1.0, 25.0, 25), (0.5, 29.97, 15), (0.01, 10.0, 1)])
def test_gap_in_seconds(gap_s, fps, frames):
    assert gap_in_frames(gap_s, fps) == frames


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"gap_s=0\.0"):
        gap_in_frames(0.0, 25.0)
    with pytest.raises(ValueError, match="num_pokes=0"):
        SamplingRule(num_pokes=0)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 40), (50, 50)])
def test_points_and_image_of_a_frame_agree(height, width):
    """A bright pixel lands where its position says."""
    top, left, side = central_square(height, width)
    x, y = left + 7, top + 21
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    frame[y, x] = 255
    image = frame_to_image(frame, size=8 * side)[0]
    row, column = divmod(int(image.argmax()), image.shape[1])
    position = points_in_square(torch.tensor([float(x), float(y)]), height, width)
    found = (torch.tensor([column, row]) + 0.5) / (8 * side)
    torch.testing.assert_close(position, found.float(), atol=0.6 / side, rtol=0)
    corner = points_in_square(torch.tensor([left - 0.5, top + side - 0.5]), height, width)
    torch.testing.assert_close(corner, torch.tensor([0.0, 1.0]))


def test_points_of_an_array_are_those_of_a_tensor():
    points_px = np.random.default_rng(0).uniform(-100, 700, (3, 50, 2)).astype(np.float32)
    found = points_in_square(points_px, 270, 481)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, points_in_square(torch.from_numpy(points_px), 270, 481).numpy())


def test_image_stays_in_range_where_cubic_interpolation_overshoots():
    frame = np.zeros((32, 32, 3), dtype=np.uint8)
    frame[:, 16:] = 255
    image = frame_to_image(frame, size=48)
    assert image.min() == -1 and image.max() == 1
