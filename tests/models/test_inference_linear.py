"""The faster linear layer is the ordinary one, to rounding, wherever it is used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kinema.models.backbones import inference_linear
from kinema.models.backbones.inference_linear import (
    Bf16Linear,
    Fp16WeightLinear,
    Linear,
    can_keep_fp16,
    linear,
    multiplying_in_bf16,
    with_fp16_weights,
)


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


@pytest.mark.parametrize(
    ("shape", "turned"), [((2, 70), 1), ((1, 3, 70), 1), ((2, 2, 70), 1), ((1, 70), 0), ((5, 70), 0)]
)
@pytest.mark.parametrize("with_bias", [True, False])
@torch.no_grad()
def test_few_rows_come_second_where_that_is_faster(shape, turned, with_bias, monkeypatch):
    ways = []
    few_rows = inference_linear._few_rows
    monkeypatch.setattr(inference_linear, "_few_rows", lambda *given: ways.append(1) or few_rows(*given))
    monkeypatch.setattr(inference_linear, "_onednn_is_faster", lambda: False)
    monkeypatch.setattr(inference_linear, "_is_amd_with_avx2", lambda: True)
    torch.manual_seed(0)
    layer, x = Linear(70, 110, bias=with_bias), torch.randn(shape)
    found = layer(x)
    assert len(ways) == turned and found.is_contiguous()
    torch.testing.assert_close(found, F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        assert layer(x.requires_grad_()).requires_grad and len(ways) == turned


@pytest.mark.parametrize(("rows", "outputs", "wide"), [(5, 3072, 1), (4, 3072, 0), (5, 3071, 0), (1029, 3072, 0)])
@torch.no_grad()
def test_many_outputs_take_the_library_that_is_faster_there(rows, outputs, wide, monkeypatch):
    if not inference_linear._has_onednn():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(inference_linear, "_onednn_is_faster", lambda: False)
    monkeypatch.setattr(inference_linear, "_is_amd_with_avx2", lambda: True)
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 70), torch.randn(outputs, 70)
    assert inference_linear._many_outputs(x, weight) == bool(wide)
    torch.testing.assert_close(linear(x, weight, None), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    exact = F.gelu(F.linear(x, weight))
    torch.testing.assert_close(linear(x, weight, None, "gelu"), exact, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("shape", [(1, 70), (3, 257, 70), (2, 1, 5, 70)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_products_in_bf16_are_those_of_bf16_values(shape, with_bias, packed, monkeypatch):
    if packed and not inference_linear._can_pack():
        pytest.skip("this CPU has no instructions for bf16")
    monkeypatch.setattr(inference_linear, "_can_pack", lambda: packed)
    torch.manual_seed(0)
    layer, x = Linear(70, 110, bias=with_bias), torch.randn(shape)
    found = Bf16Linear(layer)(x)
    assert found.dtype == torch.bfloat16
    bias = layer.bias.bfloat16().double() if with_bias else None
    exact = F.linear(x.bfloat16().double(), layer.weight.bfloat16().double(), bias)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-3)  # the result's own rounding


needs_fbgemm = pytest.mark.skipif(not can_keep_fp16(), reason="this build of PyTorch has no FBGEMM")


@needs_fbgemm
@pytest.mark.parametrize("shape", [(1, 70), (2, 70), (3, 257, 70), (0, 70), (2, 1, 5, 70)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_weights_in_fp16_are_multiplied_in_float32(shape, with_bias):
    torch.manual_seed(0)
    layer, x = Linear(70, 110, bias=with_bias), torch.randn(shape)
    found = Fp16WeightLinear(layer)(x)
    assert found.dtype == torch.float32 and not found.requires_grad
    weight = layer.weight.half().double()
    bias = layer.bias.double() if with_bias else None
    torch.testing.assert_close(found.double(), F.linear(x.double(), weight, bias), rtol=1e-5, atol=1e-5)


@needs_fbgemm
@pytest.mark.parametrize("largest", [1e5, float("inf"), float("nan")])
def test_weights_that_fp16_cannot_hold_are_refused(largest):
    layer = Linear(4, 4)
    layer.weight.data[1, 2] = largest
    with pytest.raises(ValueError, match="fp16 cannot hold"):
        Fp16WeightLinear(layer)


def test_weights_in_fp16_need_a_cpu_that_can(monkeypatch):
    monkeypatch.setattr(inference_linear, "can_keep_fp16", lambda: False)
    with pytest.raises(ValueError, match="x86 CPUs only"):
        with_fp16_weights(nn.Sequential(Linear(4, 4)))


@pytest.mark.parametrize(
    ("narrow", "kind", "allowed"),
    [
        (multiplying_in_bf16, Bf16Linear, 0.05),
        pytest.param(with_fp16_weights, Fp16WeightLinear, 0.002, marks=needs_fbgemm),
    ],
)
def test_a_narrow_copy_shares_what_it_does_not_multiply_with(narrow, kind, allowed):
    class Own(Linear):
        def forward(self, x):
            return -super().forward(x)

    module = nn.Sequential(Own(8, 8), nn.LayerNorm(8), Linear(8, 8)).train()
    twin = narrow(module)
    assert type(module[2]) is Linear and module.training and not twin.training
    assert isinstance(twin[2], kind) and isinstance(twin[0], Own)
    assert twin[1].weight is module[1].weight and twin[0].weight is module[0].weight
    x = torch.randn(4, 8)
    difference = (twin(x) - module(x)).abs().max()
    assert 0 < difference < allowed
