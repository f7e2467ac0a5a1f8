"""DinoFlow's loss: what counts, and that nothing else reaches the gradient."""

import math

import pytest
import torch

from kinema.kernels import local_correlation
from kinema.models.dinoflow.loss import endpoint_loss, matching_loss


def test_unknown_far_and_invalid_pixels_do_not_count():
    flow = torch.zeros(2, 2, 2, 2, requires_grad=True)
    truth = torch.tensor([3.0, -4.0]).view(1, 2, 1, 1).repeat(2, 1, 2, 2)
    truth[0, :, 0, 0], truth[0, 0, 0, 1] = float("nan"), 400.0
    valid = torch.ones(2, 2, 2)
    valid[0, 1, 0] = 0.0
    valid[1] = 0.0
    errors, counted = endpoint_loss(flow, truth, valid)
    assert errors.tolist() == pytest.approx([7.0, 0.0]) and counted.tolist() == [True, False]
    errors.sum().backward()
    assert flow.grad[0, :, 1, 1].tolist() == [-1.0, 1.0]
    assert flow.grad.abs().sum() == 2.0


def test_the_cap_is_a_setting():
    truth = torch.full((1, 2, 1, 2), 3.0)
    truth[..., 1] = 6.0
    errors, _ = endpoint_loss(torch.zeros(1, 2, 1, 2), truth, torch.ones(1, 1, 2), max_motion_px=5.0)
    assert errors.item() == pytest.approx(6.0)


def test_patches_match_where_their_true_motion_leads():
    """Features of 8 x 8 patches of 4 px that move by (2, -1) patches, and by half a patch."""
    features = 5 * torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = features.roll((-1, 2), dims=(2, 3))
    truth = torch.tensor([8.0, -4.0]).view(1, 2, 1, 1).repeat(1, 1, 32, 32)
    valid = torch.ones(1, 32, 32)
    correlation = local_correlation(features, moved, 2)
    assert matching_loss(correlation, truth, valid).item() < 1e-3
    assert matching_loss(correlation, -truth, valid).item() > 10
    # Of two displacements with equal shares, neither can be more probable than one half.
    halfway = truth - torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    both = torch.full((1, 5, 5, 8, 8), -100.0)
    both[:, 1, 3:] = 0.0
    assert matching_loss(both.flatten(1, 2), halfway, valid).item() == pytest.approx(math.log(2))
    assert matching_loss(torch.zeros(1, 25, 8, 8), truth, valid).item() == pytest.approx(math.log(25))


def test_patches_without_a_known_place_in_reach_do_not_match():
    correlation = torch.zeros(3, 25, 2, 4, requires_grad=True)
    truth = torch.zeros(3, 2, 8, 16)
    valid = torch.ones(3, 8, 16)
    truth[0, 0, 0, 0] = float("nan")  # the first patch of the first row
    truth[0, 0, :, 8:12] = 8.0  # two patches to the right of the third column is out of the picture
    valid[0, 4:, 4:8] = 0.0  # the second patch of the second row
    truth[1] = 9.0  # farther than two patches of 4 px
    truth[2] = float("nan")
    losses = matching_loss(correlation, truth, valid)
    losses.sum().backward()
    reached = correlation.grad.abs().sum(dim=1) > 0
    assert reached[0].tolist() == [[False, True, False, True], [True, False, False, True]]
    assert not reached[1:].any() and losses[1:].tolist() == [0.0, 0.0] and losses[0] > 0
    assert correlation.grad[0, :, 0, 1].sum().abs() < 1e-6
