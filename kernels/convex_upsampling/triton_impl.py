"""Convex upsampling on a GPU as a torch operation with autograd: launches and the sum over neighbours."""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.convex_upsampling.kernels import gradients_kernel, upsample_kernel
from kinema.kernels.dispatch import INTERPRETING
from kinema.kernels.launch import launch, on_device
from kinema.kernels.maps import map_of

ELEMENTS = 4096 if INTERPRETING else 2048
"""Of fine values that a program holds: channels, coarse pixels and fine pixels of each, multiplied."""


def _factor(logits: Tensor) -> int:
    return math.isqrt(logits.shape[1] // 9)


def _empty_fine(maps: Tensor, logits: Tensor) -> Tensor:
    (B, C, H, W), factor = maps.shape, _factor(logits)
    return torch.empty(B, C, factor * H, factor * W, dtype=torch.float32, device=maps.device)


def _readable(tensor: Tensor) -> Tensor:
    """What the kernels may load in triton's interpreter, which has no bfloat16."""
    return tensor.float() if INTERPRETING and tensor.dtype == torch.bfloat16 else tensor


def _start(kernel: Any, tensors: tuple[Tensor, ...], maps: Tensor, logits: Tensor, scale: float) -> None:
    B, C, H, W = maps.shape
    factor = _factor(logits)
    padded, sub = triton.next_power_of_2(C), triton.next_power_of_2(factor**2)
    pixels = max(1, min(triton.next_power_of_2(W), ELEMENTS // (padded * sub)))
    launch(
        kernel,
        (B * H * triton.cdiv(W, pixels),),
        *(*map(map_of, tensors), H, W, scale),
        FACTOR=factor,
        CHANNELS=C,
        PADDED=padded,
        SUB=sub,
        PIXELS=pixels,
        num_warps=4,
    )


def upsample(maps: Tensor, logits: Tensor, scale: float) -> Tensor:
    """The combination on the current device."""
    out = _empty_fine(maps, logits)
    if maps.shape[0]:
        _start(upsample_kernel, (_readable(maps), _readable(logits), out), maps, logits, scale)
    return out


def gradients(grad: Tensor, maps: Tensor, logits: Tensor, scale: float) -> list[Tensor]:
    """Of the maps and of the logits, on the current device."""
    B, C, H, W = maps.shape
    if B == 0:
        return [torch.empty_like(maps), torch.empty_like(logits)]
    logits_grad = torch.empty_like(_readable(logits))
    shares = torch.empty(B, 9 * C, H, W, dtype=torch.float32, device=maps.device)
    tensors = (grad, _readable(maps), _readable(logits), logits_grad, shares)
    _start(gradients_kernel, tensors, maps, logits, scale)
    # Folding gathers, for each pixel, what its neighbours took from it.
    maps_grad = F.fold(shares.flatten(2), (H, W), 3, padding=1)
    return [maps_grad.to(maps.dtype), logits_grad.to(logits.dtype)]


@torch.library.custom_op("kinema::convex_upsample", mutates_args=())
def _upsample(maps: Tensor, logits: Tensor, scale: float) -> Tensor:
    with on_device(maps):
        return upsample(maps, logits, scale)


@torch.library.custom_op("kinema::convex_upsample_backward", mutates_args=())
def _gradients(grad: Tensor, maps: Tensor, logits: Tensor, scale: float) -> list[Tensor]:
    with on_device(maps):
        return gradients(grad, maps, logits, scale)


@_upsample.register_fake
def _(maps: Tensor, logits: Tensor, scale: float) -> Tensor:
    return _empty_fine(maps, logits)


@_gradients.register_fake
def _(grad: Tensor, maps: Tensor, logits: Tensor, scale: float) -> list[Tensor]:
    return [torch.empty(maps.shape, dtype=maps.dtype, device=maps.device), torch.empty_like(logits)]


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    maps, logits, ctx.scale = inputs
    ctx.save_for_backward(maps, logits)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    maps_grad, logits_grad = _gradients(grad, *ctx.saved_tensors, ctx.scale)
    return maps_grad, logits_grad, None


_upsample.register_autograd(_differentiate, setup_context=_save)


def convex_upsample_triton(
    maps: Float[Tensor, "B C H W"], logits: Float[Tensor, "B K H W"], scale: float
) -> Float[Tensor, "B C Hf Wf"]:
    """`reference.convex_upsample_reference` by the kernels; arguments are checked by the caller."""
    return _upsample(maps, logits, scale)
