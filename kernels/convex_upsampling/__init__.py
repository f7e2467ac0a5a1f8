"""`convex_upsample`: coarse maps at f times the size, with weights over 3x3 neighbours that a network gives."""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from kinema.kernels.convex_upsampling.reference import convex_upsample_reference
from kinema.kernels.dispatch import check_impl, use_triton, why_no_triton

__all__ = ["convex_upsample", "why_not_triton"]

LARGEST_TRITON_FACTOR = 8
LARGEST_TRITON_CHANNELS = 16
"""A program holds all channels of its pixels."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def convex_upsample(
    maps: Shaped[Tensor, "*shape1"], logits: Shaped[Tensor, "*shape2"], scale: float = 1.0, impl: str = "auto"
) -> Float[Tensor, "B C Hf Wf"]:
    """Maps at f times the size: convex combinations of 3x3 coarse neighbours, the same for every channel.

    Args:
        maps: [B, C, H, W], any floating type and strides; outside they count as 0. Values stay as they are: flow in
            coarse pixels must be multiplied by f.
        logits: [B, 9 f^2, H, W], any floating type and strides, over neighbours (row-major), then fine rows, then
            fine columns.
        scale: what logits are multiplied by before the softmax over neighbours; RAFT has 0.25.
        impl: "auto" takes the Triton kernel where it can run, "triton" insists on it, "reference" is PyTorch.

    Returns: [B, C, f H, f W], contiguous, float32 (float64 if one of the two is). Differentiable once by the kernel,
        whose backward is deterministic; to any order by the reference.
    Raises: ValueError for tensors that break these rules, or when impl is "triton" and it cannot run.
    Source: `reference.convex_upsample_reference` is the specification and names the paper.
    """
    _check_arguments(maps, logits)
    check_impl(impl)
    if use_triton(impl, why_not_triton(maps, logits)):
        from kinema.kernels.convex_upsampling.triton_impl import convex_upsample_triton

        return convex_upsample_triton(maps, logits, scale)
    return convex_upsample_reference(maps, logits, scale)


def why_not_triton(maps: Tensor, logits: Tensor) -> str | None:
    """A sentence that says why the Triton kernel cannot run on these arguments, or None."""
    factor = math.isqrt(logits.shape[1] // 9)
    if torch.float64 in (maps.dtype, logits.dtype):
        return "maps or logits are float64, which the kernel does not take; use impl='reference', or float32"
    if factor > LARGEST_TRITON_FACTOR:
        return f"the factor {factor} is over the kernel's limit of {LARGEST_TRITON_FACTOR}; use impl='reference'"
    if maps.shape[1] > LARGEST_TRITON_CHANNELS:
        return f"{maps.shape[1]} channels are over the kernel's {LARGEST_TRITON_CHANNELS}; use impl='reference'"
    return why_no_triton(maps, logits)


def _check_arguments(maps: Tensor, logits: Tensor) -> None:
    if maps.ndim != 4 or logits.ndim != 4 or min(maps.shape[1:]) < 1:
        raise ValueError(
            f"maps are {list(maps.shape)} and logits {list(logits.shape)}: both must be [B, channels, H, W] with at "
            "least one channel and pixel; add the missing axes with unsqueeze"
        )
    if maps.shape[0] != logits.shape[0] or maps.shape[2:] != logits.shape[2:]:
        raise ValueError(
            f"maps are {list(maps.shape)} and logits {list(logits.shape)}: B, H and W must agree; logits are made at "
            "the coarse size"
        )
    factor = math.isqrt(logits.shape[1] // 9)
    if factor < 1 or 9 * factor**2 != logits.shape[1]:
        raise ValueError(f"logits have {logits.shape[1]} channels, which must be 9 f^2 for a factor f: 576 for f = 8")
    for name, tensor in (("maps", maps), ("logits", logits)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} are {tensor.dtype}; convert them to a floating type with .to(dtype)")
    if maps.device != logits.device:
        raise ValueError(f"maps are on {maps.device} and logits on {logits.device}; move one with .to")
