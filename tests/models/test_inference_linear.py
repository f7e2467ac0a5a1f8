"""The faster linear layer is the ordinary one, to rounding, wherever it is used."""

import pytest
import torch
import torch.nn.functional as F

from kinema.models.backbones.inference_linear import Linear, linear


@pytest.mark.parametrize("shape", [(1, 7), (3, 257, 7), (0, 7), (2, 1, 5, 7)])
@pytest.mark.parametrize("with_bias", [True, False])
@torch.no_grad()
def test_equals_torch(shape, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(11, 7)
    bias = torch.randn(11) if with_bias else None
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_strided_input():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 9).transpose(1, 2)[:, ::2], torch.randn(11, 7), torch.randn(11)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_gradients_reach_weight_and_input():
    layer = Linear(7, 11)
    x = torch.randn(3, 7, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(3, 7))
    assert layer.weight.grad.abs().sum() > 0 and layer.bias.grad.eq(3).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_other_dtypes_and_exporters_get_the_ordinary_layer():
    layer, x = Linear(7, 11).eval(), torch.randn(3, 7)
    assert layer.double()(x.double()).dtype == torch.float64
    layer = layer.float()
    exported = torch.export.export(layer, (x,)).graph_module.code
    assert "_linear_pointwise" not in exported
    assert "_linear_pointwise" not in torch.jit.trace(layer, x).code
