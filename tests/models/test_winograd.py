"""Fewer products, the same gradient."""

import pytest
import torch
import torch.nn.functional as F

from kinema.models.backbones import winograd
from kinema.models.backbones.winograd import weights_gradient


def expected_gradient(x, gradient):
    weight = torch.zeros(gradient.shape[1], x.shape[1], 3, 3, dtype=x.dtype, requires_grad=True)
    (found,) = torch.autograd.grad(F.conv2d(x, weight, padding=1), weight, gradient)
    return found


@pytest.mark.parametrize("size", [(9, 12), (8, 7), (1, 12), (12, 1), (2, 2), (1, 1), (31, 5)])
@pytest.mark.parametrize("tiles", [1, 6, 18])
def test_tiles_and_strips_meet_at_their_borders(size, tiles, monkeypatch):
    monkeypatch.setattr(winograd, "TILES_PER_STRIP", tiles)
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 3, *size).double(), torch.randn(2, 5, *size).double()
    for layout in (torch.contiguous_format, torch.channels_last):
        found = weights_gradient(x.contiguous(memory_format=layout), gradient.contiguous(memory_format=layout))
        torch.testing.assert_close(found, expected_gradient(x, gradient), rtol=1e-10, atol=1e-10)


def test_float32_loses_no_more_than_plain_sums_do():
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 32, 56, 56).relu(), torch.randn(2, 24, 56, 56)
    x, gradient = (t.contiguous(memory_format=torch.channels_last) for t in (x, gradient))
    exact = expected_gradient(x.double(), gradient.double())

    def error(found):
        return (found - exact).norm() / exact.norm()

    assert error(weights_gradient(x, gradient)) < 2 * max(error(expected_gradient(x, gradient)), 5e-7)
