"""A linear layer that a frozen network evaluates faster on CPUs with AVX-512 that are not made by Intel.

PyTorch sends float32 matrix products to MKL, which leaves half of such a CPU idle; oneDNN, which PyTorch uses for
convolutions, does not. Measured on an AMD EPYC, 514 x 384 tokens to 1536 channels, one thread: 6.1 ms through MKL,
3.0 ms through oneDNN; results agree to rounding. On Intel's own (Xeon with AMX) MKL is the faster one: 128 x 768 to
4608 channels 7.4 ms against 8.2, two rows 0.64 ms against 1.21.

Without AVX-512 the two are equal but for many outputs, 16 rows of 768 to 4608 channels 8.8 and 5.3 ms, 128 rows 21.7
and 15.4, 1028 rows 145 and 130 (Zen 3).

With two to four rows MKL is faster if the weight comes first, on an AMD without AVX-512 (Zen 3): the products of a
layer of the Flow Poke Transformer for two tokens take 4.4 instead of 6.2 ms of processor time, for three 5.2, not 8.0.

With few rows a product takes as long as reading the weight: 16 bits halve it, but only where the weight already lies as
the library multiplies it (`Bf16Linear`, `Fp16WeightLinear`).
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Activation = Literal["none", "gelu", "gelu_tanh"]
"""GELU, exact or in its tanh form, of a product while it is in the cache: 2.3 instead of 5.6 ms for 8160 x 512."""
Module = TypeVar("Module", bound=nn.Module)


class Linear(nn.Linear):
    """`nn.Linear` whose forward without gradient takes the faster of two libraries."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """Same as `F.linear`, with an activation behind it."""
    is_plain = _is_plain_inference(x)
    if is_plain and (_onednn_is_faster() or (activation == "none" and _many_outputs(x, weight))):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *_ONEDNN_NAMES[activation])
    turned = is_plain and _is_thin(x) and _is_amd_with_avx2()
    y = _few_rows(x, weight, bias) if turned else F.linear(x, weight, bias)
    return y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


_ONEDNN_NAMES: dict[Activation, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}


class Bf16Linear(nn.Module):
    """A frozen `nn.Linear` that multiplies in bf16, as autocast would; its result is bf16.

    On a CPU the weight is kept in the order in which oneDNN multiplies it: else that order is made anew in every call.
    It belongs to the device where it was made, and is no part of a state dict.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, bias = linear.weight.detach().bfloat16(), linear.bias
        self.is_packed = weight.device.type == "cpu" and _can_pack()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.is_packed else weight
        self.bias = None if bias is None else bias.detach().bfloat16()

    def forward(self, x: Float[Tensor, "*B d_in"]) -> Float[Tensor, "*B d_out"]:
        with torch.no_grad():
            if self.is_packed:
                return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, self.bias, "none", [], "")
            return F.linear(x.bfloat16(), self.weight, self.bias)


class Fp16WeightLinear(nn.Module):
    """A frozen `nn.Linear` on a CPU whose weight is kept in fp16; input, sums, bias and result are float32.

    FBGEMM, which comes with PyTorch on x86, packs the weight and widens it while it multiplies. Rounding a weight to
    11 bits moves a product by 2e-4 of its size (bf16: 4e-3). One thread of a Zen 3, ms for 768 to 4608 channels, two
    rows 0.83 instead of 2.5, 16 rows 2.7 instead of 6; from 128 rows on there is nothing in it. No part of a state
    dict.

    Raises: ValueError if `can_keep_fp16` is false, or for weights that fp16 cannot hold.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, bias = linear.weight.detach(), linear.bias
        if weight.device.type != "cpu" or not can_keep_fp16():
            raise ValueError(f"weights in fp16 are multiplied by FBGEMM on x86 CPUs only, these are on {weight.device}")
        largest = weight.abs().max().item() if weight.numel() else 0.0
        if not largest <= torch.finfo(torch.float16).max:
            raise ValueError(f"the largest weight is {largest:g}, which fp16 cannot hold (65504 at most); use float32")
        self.packed = torch.ops.quantized.linear_prepack_fp16(
            weight.float(), None if bias is None else bias.detach().float()
        )

    def forward(self, x: Float[Tensor, "*B d_in"]) -> Float[Tensor, "*B d_out"]:
        with torch.no_grad():
            return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)


def can_keep_fp16() -> bool:
    """Whether this CPU multiplies by weights in fp16 without widening them in memory: PyTorch's x86 builds do."""
    return "fbgemm" in torch.backends.quantized.supported_engines and torch.backends.quantized.engine in (
        "fbgemm",
        "x86",
    )


def multiplying_in_bf16(module: Module) -> Module:
    """A copy for use without gradient whose `Linear` layers are `Bf16Linear`; it shares all other weights.

    As with autocast, what is between two products gets bf16 from the first; a layer that stays must be given its own
    dtype, as one behind a residual stream is.
    """
    return _with_linears(module, Bf16Linear)


def with_fp16_weights(module: Module) -> Module:
    """A copy for use without gradient whose `Linear` layers are `Fp16WeightLinear`; it shares all other weights."""
    return _with_linears(module, Fp16WeightLinear)


def _with_linears(module: Module, make: Callable[[nn.Linear], nn.Module]) -> Module:
    """Subclasses of `Linear` stay as they are: they do more than multiply."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, shared)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if type(child) is Linear:
                setattr(parent, name, make(child))
    return twin.eval()


@functools.cache
def _can_pack() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@functools.cache
def _onednn_is_faster() -> bool:
    return _has_onednn() and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not _made_by_intel()


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _is_amd_with_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and not _made_by_intel()


def _is_thin(x: Tensor) -> bool:
    return 2 <= _num_rows(x) <= 4


def _many_outputs(x: Tensor, weight: Tensor) -> bool:
    return len(weight) >= 3072 and 4 < _num_rows(x) <= 1028 and _is_amd_with_avx2() and _has_onednn()


def _num_rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _few_rows(x: Float[Tensor, "*B d_in"], weight: Tensor, bias: Tensor | None) -> Float[Tensor, "*B d_out"]:
    product = (weight @ x.flatten(0, -2).mT).mT.contiguous().unflatten(0, x.shape[:-1])
    return product if bias is None else product + bias


def _made_by_intel() -> bool:
    """Whether Linux says so; elsewhere nothing is known, and MKL stays."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def _is_plain_inference(x: Tensor) -> bool:
    # oneDNN's operator has no gradient, and exporters and compilers expect the ordinary one.
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )
