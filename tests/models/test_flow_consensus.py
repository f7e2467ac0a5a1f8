"""The consensus of flows: right where one estimate is, sure where it is right, indifferent to brightness."""

import pytest
import torch

from kinema.models.flow.consensus import census_difference, consensus
from kinema.models.flow.geometry import warp
from kinema.pipelines.scenes import Scene


@pytest.fixture(scope="module")
def pair():
    """Both frames of a rendered scene, its flow there and back, and where it is visible."""
    scene = Scene(seed=12, height=64, width=80, num_frames=2, num_objects=3)
    first, second = (torch.from_numpy(scene.frame(t)).permute(2, 0, 1).float() / 255 for t in range(2))
    there, hidden = (torch.from_numpy(part) for part in scene.motion(0, 1))
    back, _ = (torch.from_numpy(part) for part in scene.motion(1, 0))
    return first, second, there, back, ~hidden


def test_each_half_is_taken_from_whom_it_is_right(pair):
    first, second, there, back, visible = pair
    left, right = there.clone(), there.clone()
    left[:, :, 40:] += 3.0
    right[:, :, :40] -= 3.0
    found = consensus(first, second, [right, left, there], [back, back, back])
    error = (found.flow_px - there).norm(dim=0)
    away = torch.ones_like(visible)
    away[:, 36:44] = False
    assert (error[visible & away] < 0.05).float().mean() > 0.9
    assert torch.allclose(found.weights.sum(0), torch.ones(64, 80))
    assert found.weights[0, :, :30].mean() < 0.2 and found.weights[1, :, 50:].mean() < 0.1
    wrong = (left - there).norm(dim=0)[visible].mean()
    assert error[visible].mean() < 0.1 * wrong


def test_the_expected_error_tells_wrong_flow_from_right(pair):
    first, second, there, back, visible = pair
    off = there.clone()
    off[:, 32:] += 4.0
    found = consensus(first, second, [off], [back])
    expected = found.expected_error_px
    assert expected[40:][visible[40:]].median() > 4 * expected[:24][visible[:24]].median()
    assert torch.equal(found.flow_px, off) and bool((found.weights == 1).all())


def test_hidden_pixels_are_the_first_ones(pair):
    """A block that both estimates lose sight of: the way back contradicts them."""
    first, second, there, back, visible = pair
    lost = back.clone()
    lost[:, 16:48, 16:48] += 25.0
    guess = there + 2.0
    found = consensus(first, second, [guess, there], [lost, lost])
    assert (found.flow_px - guess).norm(dim=0)[24:36, 24:36].max() < 0.1


def test_a_target_outside_the_frame_decides_nothing(pair):
    first, second, there, back, _ = pair
    gone = torch.full_like(there, 1e4)
    found = consensus(first, second, [there, gone], [back, back])
    assert bool(found.flow_px.isfinite().all()) and found.weights[1].mean() < 0.05


def test_equally_good_estimates_are_averaged(pair):
    first, second, there, back, visible = pair
    noise = 0.3 * torch.randn(4, 2, 64, 80, generator=torch.Generator().manual_seed(0))
    found = consensus(first, second, [there + one for one in noise], [back] * 4)
    error = (found.flow_px - there).norm(dim=0)[visible].mean()
    assert error < 0.7 * noise.norm(dim=1).mean()


def test_census_ignores_brightness_and_sees_shifts(pair):
    grey = pair[0].mean(0)
    assert census_difference(grey, 0.5 * grey + 0.2).mean() < census_difference(grey, grey.roll(2, 1)).mean() / 3
    assert census_difference(grey, grey).max() == 0
    moved, _ = warp(grey[None, None], torch.zeros(1, 2, *grey.shape))
    assert census_difference(grey, moved[0, 0]).max() < 1e-6


def test_every_estimate_needs_its_way_back(pair):
    with pytest.raises(ValueError, match="2 forward and 1 backward flows"):
        consensus(*pair[:2], [pair[2], pair[2]], [pair[3]])
