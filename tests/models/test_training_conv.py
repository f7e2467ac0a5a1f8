"""Convolutions with weights' gradients of their own give what PyTorch's give."""

import pytest
import torch
from torch import nn

from kinema.models.backbones import training_conv
from kinema.models.backbones.training_conv import Conv2d, ConvTranspose2d


@pytest.fixture
def taken(monkeypatch):
    """One entry for each call that went our way, on a CPU that is slow with channels-last maps."""
    calls = []
    ours = training_conv._convolution
    monkeypatch.setattr(training_conv, "_convolution", lambda *given, **named: calls.append(1) or ours(*given, **named))
    monkeypatch.setattr(training_conv, "slow_with_channels_last", lambda: True)
    return calls


def channels_last(*shape, requires_grad=True):
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(requires_grad)


LAYERS = [
    lambda: Conv2d(6, 5, 3, padding=1),
    lambda: Conv2d(6, 5, 3, stride=2, padding=1, bias=False),
    lambda: Conv2d(6, 5, 5, stride=2, padding=2),
    lambda: Conv2d(6, 5, 3, padding=2, dilation=2),
    lambda: ConvTranspose2d(6, 5, 4, stride=4),
    lambda: ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=1, bias=False),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("wants_input", [True, False])
def test_output_and_gradients_are_pytorchs(make, wants_input, taken):
    torch.manual_seed(0)
    layer, x = make(), channels_last(2, 6, 9, 12, requires_grad=wants_input)
    y = layer(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    assert len(taken) == 1
    found = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    expected_y = super(type(layer), layer).forward(x)
    (expected_y * weight).sum().backward()
    expected = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    torch.testing.assert_close(y, expected_y)
    assert y.stride() == expected_y.stride()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_frozen_bias_and_a_piece_of_a_larger_map(taken):
    """The layout of what `unflatten` makes of tokens behind a class token: channels last with a gap."""
    torch.manual_seed(0)
    layer = Conv2d(6, 5, 3, padding=1)
    layer.bias.requires_grad_(False)
    tokens = torch.randn(2, 1 + 8 * 7, 6, requires_grad=True)
    layer(tokens[:, 1:].mT.unflatten(2, (8, 7))).square().sum().backward()
    found, tokens.grad = tokens.grad, None
    found_weight, layer.weight.grad = layer.weight.grad, None
    nn.Conv2d.forward(layer, tokens[:, 1:].mT.unflatten(2, (8, 7))).square().sum().backward()
    assert len(taken) == 1 and layer.bias.grad is None
    torch.testing.assert_close(found, tokens.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_weight, layer.weight.grad, rtol=1e-4, atol=1e-4)


def test_pytorch_has_what_is_fast_already_or_not_ours_to_do(taken):
    x = channels_last(2, 6, 9, 12)
    Conv2d(6, 5, 3)(x.contiguous())
    Conv2d(6, 5, 1)(x)
    Conv2d(6, 6, 3, groups=6)(x)
    Conv2d(6, 5, 3, padding="same")(x)
    Conv2d(6, 5, 3, padding=1, padding_mode="circular")(x)
    Conv2d(6, 5, 3).double()(x.double())
    Conv2d(6, 5, 3).requires_grad_(False)(x)
    ConvTranspose2d(6, 5, 2, stride=2)(x, output_size=[18, 24])
    layer = Conv2d(6, 5, 3)
    with torch.no_grad():
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert taken == []
    layer(x)
    assert taken == [1]


def test_other_cpus_are_left_alone(taken, monkeypatch):
    monkeypatch.setattr(training_conv, "slow_with_channels_last", lambda: False)
    Conv2d(6, 5, 3)(channels_last(2, 6, 9, 12))
    assert taken == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exporters_see_an_ordinary_convolution(taken):
    layer, x = Conv2d(6, 5, 3), channels_last(2, 6, 9, 12, requires_grad=False)
    torch.export.export(layer, (x,))
    torch.jit.trace(layer, x)
    assert taken == []
