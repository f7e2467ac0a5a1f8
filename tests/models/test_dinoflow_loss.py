"""DinoFlow's loss: what counts, and that nothing else reaches the gradient."""

import pytest
import torch

from kinema.models.dinoflow.loss import endpoint_loss


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
