"""`correlation_lookup`: windows of the correlation between two feature maps, formed on demand."""

import torch
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.correlation_lookup.planner import LookupPlan, free_memory, plan_lookup
from kinema.kernels.correlation_lookup.reference import correlation_lookup_reference
from kinema.kernels.correlation_lookup.volume import (
    correlation_pyramid,
    correlation_volume,
    feature_pyramid,
    volume_bytes,
    volume_lookup,
)
from kinema.kernels.correlation_lookup.window import WindowOrder, check_lookup
from kinema.kernels.dispatch import check_impl, use_triton, why_no_triton

__all__ = [
    "LookupPlan",
    "correlation_lookup",
    "correlation_pyramid",
    "correlation_volume",
    "feature_pyramid",
    "free_memory",
    "plan_lookup",
    "volume_bytes",
    "volume_lookup",
    "why_not_triton",
]

KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_GRID = 65535
"""Programs along the second and third axis of a launch: CUDA programming guide."""


def correlation_lookup(
    fmap1: Float[Tensor, "B C H W"],
    fmap2_pyramid: list[Float[Tensor, "_ _ _ _"]],
    coords: Float[Tensor, "_ 2 _ _"],
    radius: int,
    impl: str = "auto",
    window_order: WindowOrder = "x_major",
) -> Float[Tensor, "B P H W"]:
    """Correlation of each pixel with a window around its target, at every pyramid level.

    `reference.correlation_lookup_reference` is the specification: [B, L (2 radius + 1)^2, H, W],
    float32, channels over levels, then the outer window axis, then the inner one; coords (x, y) in pixels
    of level 0, without gradient.

    Raises: ValueError for an unknown `impl` or `window_order`, arguments that do not fit together, or
        impl='triton' where no kernel can run (`why_not_triton` says why).
    """
    check_impl(impl)
    check_lookup(fmap1, fmap2_pyramid, coords, radius, window_order)
    if use_triton(impl, why_not_triton(fmap1, fmap2_pyramid, coords, radius)):
        from kinema.kernels.correlation_lookup.op import lookup_forward

        return lookup_forward(fmap1, fmap2_pyramid, coords, radius, window_order)
    return correlation_lookup_reference(fmap1, fmap2_pyramid, coords, radius, window_order)


def why_not_triton(
    fmap1: Float[Tensor, "B C H W"],
    fmap2_pyramid: list[Float[Tensor, "_ _ _ _"]],
    coords: Float[Tensor, "_ 2 _ _"],
    radius: int,
    window_order: WindowOrder = "x_major",
) -> str | None:
    """A sentence that says why the Triton kernels cannot take these arguments, or None."""
    reason = why_no_triton(fmap1, *fmap2_pyramid, coords)
    if reason is not None:
        return reason
    if fmap1.dtype not in KERNEL_TYPES:
        return f"the maps are {fmap1.dtype}; the kernels take float32, float16 and bfloat16"
    B, C, H, W = fmap1.shape
    if 0 in fmap1.shape:
        return f"fmap1 is {list(fmap1.shape)}, without elements; a kernel needs at least one"
    per_pixel = max(C, (2 * radius + 2) ** 2, len(fmap2_pyramid) * (2 * radius + 1) ** 2)
    largest = max(per_pixel * H * W, *(C * fmap2.shape[2] * fmap2.shape[3] for fmap2 in fmap2_pyramid))
    if largest >= 2**31:
        return f"one image has {largest} elements in a map; the kernels count to 2^31 within an image"
    if B > LARGEST_GRID:
        return f"the batch of {B} is larger than {LARGEST_GRID}; split it"
    return None
