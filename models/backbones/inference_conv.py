"""A convolution that a frozen network evaluates faster on a CPU: channels-last, its norm folded in, its ReLU fused.

The arithmetic is that of the layers up to rounding, in float32 or bfloat16. PyTorch's own path for 1x1 convolutions of
channels-last maps multiplies through MKL, at 63 GFLOP/s a core where oneDNN reaches 100 (AMD EPYC); batch norms, ReLUs
and sums of a residual network each walk over its largest maps once more (9 % of SEA-RAFT's encoder).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = int | Sequence[int]
_CACHED_BYTES = 2**18
"""Of a map and of a copy that are worked on at a time: a core has 1 MB of cache or more."""


def inference_dtype(x: Tensor) -> torch.dtype | None:
    """The type in which convolutions of a map may be evaluated this way; None where the layers have to be called.

    That is on a CPU with nothing recorded, compiled or traced: float32, or bfloat16 where autocast asks for it.
    """
    if (
        x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.bfloat16)
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    ):
        return None
    if torch.is_autocast_enabled("cpu"):
        return torch.bfloat16 if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None
    return torch.float32 if x.dtype == torch.float32 else None


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see the layers being called."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class InferenceConv:
    """`F.conv2d` with a weight kept in channels-last order; maps are converted to the weight's type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: Pair = 1, padding: Pair = 0, groups: int = 1):
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias, self.groups = bias, groups
        self.stride, self.padding = _pair(stride), _pair(padding)

    @classmethod
    def of(
        cls, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, dtype: torch.dtype = torch.float32
    ) -> InferenceConv:
        """A layer, and the evaluated batch norm behind it."""
        weight, bias = conv.weight, conv.bias
        if norm is not None:
            weight, bias = folded(weight, bias, norm)
        assert not isinstance(conv.padding, str)
        bias = None if bias is None else bias.to(dtype)
        return cls(weight.to(dtype), bias, conv.stride, conv.padding, conv.groups)

    def __call__(self, x: Tensor) -> Tensor:
        return self._convolve(x, "none")

    def relu(self, x: Tensor) -> Tensor:
        """With a ReLU behind it."""
        return self._convolve(x, "relu")

    def _convolve(self, x: Tensor, activation: str) -> Tensor:
        x = x.to(self.weight.dtype)
        if bool(torch.backends.mkldnn.enabled) and _has_operator(x.dtype):
            x = x.contiguous(memory_format=torch.channels_last)
            arguments = (x, self.weight, self.bias, self.padding, self.stride, (1, 1), self.groups)
            return torch.ops.mkldnn._convolution_pointwise(*arguments, activation, [], "")
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
        return y.relu_() if activation == "relu" else y


def folded(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution followed by a batch norm that is not training."""
    assert norm.running_mean is not None and norm.running_var is not None and not norm.training
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    return weight * scale[:, None, None, None], norm.bias + scale * shift


def _pair(value: Pair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return first, second


@functools.cache
def _has_operator(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def instance_norm_(x: Tensor, relu: bool, eps: float = 1e-5) -> Tensor:
    """Instance norm of one channels-last map [1, C, H, W], and a ReLU behind it, in place; any floating type.

    Two passes over parts that stay in a core's cache. Sums are float32 within a part, about the first part's mean, so
    that maps far from 0 keep their variance, and float64 over parts.
    """
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # [N, C]
    assert len(x) == 1 and rows.data_ptr() == x.data_ptr(), "a channels-last map of one image"
    parts = rows.split(max(1, _CACHED_BYTES // (4 * rows.shape[1])))
    buffer = torch.empty(parts[0].shape)
    about = parts[0].float().mean(0)
    sums = torch.zeros(2, rows.shape[1], dtype=torch.float64)
    for part in parts:
        centred = torch.sub(part, about, out=buffer[: len(part)])
        sums[0] += centred.sum(0)
        sums[1] += centred.mul_(centred).sum(0)
    mean, square = sums / len(rows)
    scale = torch.rsqrt(square - mean * mean + eps)
    offset = (-scale * (mean + about)).float()
    scale = scale.float()
    for part in parts:
        normed = torch.mul(part, scale, out=buffer[: len(part)]).add_(offset)
        part.copy_(normed.relu_() if relu else normed)
    return x
