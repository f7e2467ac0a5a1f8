"""Convolutions whose weights' gradients are computed in the order of memory that is fast for them.

Maps with the channels last suit everything else, but on CPUs with AVX2 and without AVX-512 oneDNN has no good kernel
for the weights' gradient of such maps. One thread of a Zen 3, 3x3 convolution of 128 to 128 channels, two maps of
224 x 224: 3.5 s; 0.86 s with copies of both maps that have the channels first; 0.45 s by Winograd's algorithm. Forward
and the input's gradient take 0.5 s each. A transposed convolution of 384 channels, 4x4 with a stride of 4, from
16 x 16: 235 ms, and 67 with the channels first. Gradients agree to rounding.
"""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kinema.models.backbones.winograd import weights_gradient

_ORDINARY = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
"""Stride, padding, dilation, transposed, output padding and groups of a 3x3 convolution that keeps a map's size."""


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with a fast gradient of its weights on CPUs that are slow with channels-last maps."""

    def forward(self, input: Tensor) -> Tensor:
        if _is_slow(self, input):
            return _convolution(self, input)
        return super().forward(input)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d`, likewise."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is None and _is_slow(self, input):
            return _convolution(self, input)
        return super().forward(input, output_size)


@functools.cache
def slow_with_channels_last() -> bool:
    """Whether this CPU's vector instructions are AVX2 and no wider."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _is_slow(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and layer.weight.requires_grad
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and not x.is_contiguous()
        and max(layer.kernel_size) > 1
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and slow_with_channels_last()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )


def _convolution(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> Tensor:
    settings = (layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups)
    result: Tensor = _Convolution.apply(x, layer.weight, layer.bias, settings)
    return result


class _Convolution(torch.autograd.Function):
    """Only the weights' and the bias' gradients differ from PyTorch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.num_biases = settings, None if bias is None else len(bias)
        y: Tensor = torch.ops.aten.convolution(x, weight, bias, *settings)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        biases = None if ctx.num_biases is None else [ctx.num_biases]
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad

        def gradients(gradient: Tensor, x: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
            found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
                gradient, x, weight, biases, *ctx.settings, wanted
            )
            return found

        dx = gradients(gradient, x, [True, False, False])[0] if for_x else None
        if weight.shape[2:] == (3, 3) and ctx.settings == _ORDINARY:
            dweight = weights_gradient(x, gradient) if for_weight else None
            return dx, dweight, gradient.sum((0, 2, 3)) if for_bias else None, None
        _, dweight, dbias = gradients(_channels_first(gradient), _channels_first(x), [False, for_weight, for_bias])
        return dx, dweight, dbias, None


def _channels_first(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """The same map, contiguous: image by image a transposed matrix, which is copied in 0.6 of the time of the whole."""
    if x.is_contiguous():
        return x
    y = torch.empty(x.shape, dtype=x.dtype)
    for image, copy in zip(x.flatten(2), y.flatten(2), strict=True):
        copy.copy_(image)
    return y
