"""`local_correlation`: products of each pixel with a window around the same place in another map."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from kinema.kernels.dispatch import check_impl, use_triton, why_no_triton
from kinema.kernels.local_correlation.reference import local_correlation_reference

__all__ = ["local_correlation", "why_not_triton"]

LARGEST_TRITON_RADIUS = 28
"""The kernel's tiles are 64 pixels wide: a block of 8 and its reach to both sides."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def local_correlation(
    fmap1: Shaped[Tensor, "*shape1"], fmap2: Shaped[Tensor, "*shape2"], radius: int, impl: str = "auto"
) -> Float[Tensor, "B P H W"]:
    """Products of each pixel of fmap1 with the window around the same place in fmap2, divided by sqrt(C).

    out[b, (dy + r) (2r + 1) + dx + r, y, x] = <fmap1[b, :, y, x], fmap2[b, :, y + dy, x + dx]> / sqrt(C); 0 where
    the target is outside fmap2. dy is the outer window axis, dx the inner one, both ascending from -r to r.

    Args:
        fmap1, fmap2: [B, C, H, W] of one size, device and dtype (float32, float16, bfloat16, float64), contiguous,
            channels-last or with any strides.
        radius: r >= 0; the window is 2r + 1 wide.
        impl: "auto" takes the Triton kernel where it can run, "triton" insists on it, "reference" is PyTorch.

    Returns: [B, (2r + 1)^2, H, W] float32 (float64 for float64 maps), accumulated in that; memory format of fmap1.
        Differentiable towards both maps, to any order; the backward is deterministic and keeps only the maps.
    Raises: ValueError for maps or a radius that break these rules, or when impl is "triton" and it cannot run.
    Source: `reference.local_correlation_plain` is the specification and names the papers.
    """
    _check_arguments(fmap1, fmap2, radius)
    check_impl(impl)
    if use_triton(impl, why_not_triton(fmap1, fmap2, radius)):
        from kinema.kernels.local_correlation.triton_impl import local_correlation_triton

        return local_correlation_triton(fmap1, fmap2, radius)
    return local_correlation_reference(fmap1, fmap2, radius)


def why_not_triton(fmap1: Tensor, fmap2: Tensor, radius: int) -> str | None:
    """A sentence that says why the Triton kernel cannot run on these arguments, or None."""
    if fmap1.dtype == torch.float64:
        return "the maps are float64, which the kernel does not take; use impl='reference', or float32 maps"
    if radius > LARGEST_TRITON_RADIUS:
        return f"radius={radius} is over the kernel's limit of {LARGEST_TRITON_RADIUS}; use impl='reference'"
    return why_no_triton(fmap1, fmap2)


def _check_arguments(fmap1: Tensor, fmap2: Tensor, radius: int) -> None:
    if fmap1.ndim != 4 or min(fmap1.shape[1:]) < 1:
        raise ValueError(
            f"fmap1 is {list(fmap1.shape)}: the maps must be [B, C, H, W] with at least one channel and pixel; "
            "add the missing axes with unsqueeze"
        )
    if fmap1.shape != fmap2.shape:
        raise ValueError(
            f"fmap1 is {list(fmap1.shape)} and fmap2 is {list(fmap2.shape)}: both maps must have one shape; "
            "resize or pad them alike"
        )
    if fmap1.dtype not in DTYPES or fmap1.dtype != fmap2.dtype:
        raise ValueError(
            f"fmap1 is {fmap1.dtype} and fmap2 is {fmap2.dtype}: both must have one dtype out of "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}; convert them with .to(dtype)"
        )
    if fmap1.device != fmap2.device:
        raise ValueError(
            f"fmap1 is on {fmap1.device} and fmap2 on {fmap2.device}: both must be on one device; move one with .to"
        )
    if isinstance(radius, bool) or not isinstance(radius, int) or radius < 0:
        raise ValueError(f"radius={radius!r} is not a whole number of at least 0; radius=4 gives 9x9 windows")
