"""Signals about a pair of frames say what a person would say."""

import numpy as np
import pytest
import torch

from kinema.models.flow.dis import DIS
from kinema.models.flow.geometry import round_trip
from kinema.pipelines.scenes import Scene
from kinema.pipelines.teach import quality
from kinema.pipelines.teach.quality import pair_quality


def grey(frame):
    image = torch.from_numpy(frame).float().permute(2, 0, 1) / 255
    return (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)


def trip(forward, backward):
    return round_trip(forward[None], backward[None])


def motion(scene, t0, t1):
    flow, hidden = scene.motion(t0, t1)
    return torch.from_numpy(flow), hidden


@pytest.fixture(scope="module")
def scene():
    return Scene(seed=11, height=120, width=160, num_frames=6)


def test_true_motion_is_consistent_and_explains_the_picture(scene):
    forward, hidden = motion(scene, 0, 2)
    backward, _ = motion(scene, 2, 0)
    first, second = grey(scene.frame(0)), grey(scene.frame(2))
    right = pair_quality(0, 2, first, second, forward, trip(forward, backward))
    assert right.motion_px == pytest.approx(float(forward.norm(dim=0).mean()), rel=1e-6)
    assert right.consistency_px < 0.1 and abs(right.occluded_share - hidden.mean()) < 0.05
    assert right.photometric < 0.3 * right.still
    assert not right.static and not right.cut
    wrong = pair_quality(0, 2, first, second, forward + 3, trip(forward + 3, backward))
    assert wrong.consistency_px > 2 and wrong.occluded_share > 0.9 and wrong.photometric is None or wrong.cut


def test_equal_pictures_are_static_and_a_moving_one_is_not(scene):
    first = grey(scene.frame(0))
    still = torch.zeros(2, *first.shape[-2:])
    assert pair_quality(0, 1, first, first, still, trip(still, still)).static
    assert not pair_quality(0, 1, first, grey(scene.frame(3)), still, trip(still, still)).static


@pytest.mark.parametrize("both_directions", [True, False])
def test_a_cut_is_seen_with_and_without_the_other_direction(both_directions):
    network, scenes = DIS(), [Scene(seed=s, height=120, width=160, num_frames=3) for s in range(6)]
    found = {"cut": 0, "shot": 0}
    for a, b in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        for name, (one, two) in {"cut": (a.frame(0), b.frame(0)), "shot": (a.frame(0), a.frame(1))}.items():
            images = [torch.from_numpy(f).permute(2, 0, 1)[None].float() / 255 for f in (one, two)]
            forward, backward = network(*images)[0], network(*images[::-1])[0]
            there_and_back = trip(forward, backward) if both_directions else None
            signals = pair_quality(0, 1, grey(one), grey(two), forward, there_and_back)
            assert (signals.consistency_px is None) == (not both_directions)
            found[name] += signals.cut
    assert found["cut"] >= 5 and found["shot"] == 0


def test_flow_that_leaves_the_picture_counts_as_a_cut():
    picture = torch.rand(1, 20, 30, generator=torch.Generator().manual_seed(0))
    away = torch.full((2, 20, 30), 500.0)
    signals = pair_quality(0, 1, picture, picture, away, trip(away, -away))
    assert signals.cut and signals.photometric is None and signals.consistency_px is None
    assert signals.occluded_share == 1.0


def test_disagreement_is_the_mean_distance_and_columns_follow_the_blob():
    picture = torch.zeros(1, 4, 5)
    flow = torch.zeros(2, 4, 5)
    other = flow.clone()
    other[0, :, 0] = 5.0
    pairs = [pair_quality(t, g, picture, picture, flow, other_px=other) for t, g in [(1, -1), (0, 2), (0, 1)]]
    columns = quality.columns(pairs)
    assert list(columns) == list(quality.COLUMNS)
    assert (columns["pair_t"], columns["pair_gap"]) == ([0, 0, 1], [1, 2, -1])
    np.testing.assert_allclose(columns["pair_disagreement_px"], 1.0)
    assert columns["pair_uncertainty_px"] == [None] * 3
