"""`correlation_lookup`: windows of the correlation between two feature maps, formed on demand."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.correlation_lookup.planner import LookupPlan, free_memory, plan_lookup
from kinema.kernels.correlation_lookup.reference import correlation_lookup_reference
from kinema.kernels.correlation_lookup.volume import (
    LARGEST_GRID,
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
    "lookup_into",
    "plan_lookup",
    "volume_bytes",
    "volume_lookup",
    "why_not_triton",
]

if TYPE_CHECKING:
    from kinema.kernels.correlation_lookup.op import PreparedMaps

PRECISIONS = ("float32", "tf32")
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def correlation_lookup(
    fmap1: Float[Tensor, "B C H W"],
    fmap2_pyramid: list[Float[Tensor, "_ _ _ _"]],
    coords: Float[Tensor, "_ 2 _ _"],
    radius: int,
    impl: str = "auto",
    window_order: WindowOrder = "x_major",
    precision: str = "float32",
) -> Float[Tensor, "B P H W"]:
    """Correlation of each pixel with a window around its target, at every pyramid level.

    `reference.correlation_lookup_reference` is the specification: [B, L (2 radius + 1)^2, H, W],
    float32, channels over levels, then the outer window axis, then the inner one; coords (x, y) in pixels
    of level 0, without gradient. Several lookups between the same maps: `lookup_into`.

    Args:
        precision: what the kernel multiplies float32 maps in: "float32", to 1e-5, or "tf32", as many bits as TF32 with
            a third of the products. The reference is always as exact as its input.

    Raises: ValueError for an unknown `impl`, `window_order` or `precision`, arguments that do not fit together, or
        impl='triton' where no kernel can run (`why_not_triton` says why).
    """
    return lookup_into(fmap1, fmap2_pyramid, radius, impl, window_order, precision)(coords)


def lookup_into(
    fmap1: Float[Tensor, "B C H W"],
    fmap2_pyramid: list[Float[Tensor, "_ _ _ _"]],
    radius: int,
    impl: str = "auto",
    window_order: WindowOrder = "x_major",
    precision: str = "float32",
) -> Callable[[Tensor], Tensor]:
    """`correlation_lookup` as a function of coords: maps are laid out for the kernels once, at its first call."""
    check_impl(impl)
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of 'float32', 'tf32'")
    prepared: list[PreparedMaps] = []

    def look(coords: Tensor) -> Tensor:
        check_lookup(fmap1, fmap2_pyramid, coords, radius, window_order)
        if not use_triton(impl, why_not_triton(fmap1, fmap2_pyramid, coords, radius)):
            return correlation_lookup_reference(fmap1, fmap2_pyramid, coords, radius, window_order)
        # Imported where it runs: triton is not installed everywhere, and takes its time.
        from kinema.kernels.correlation_lookup.op import lookup_prepared, prepare_maps

        if not prepared:
            prepared.append(prepare_maps(fmap1, fmap2_pyramid, precision))
        return lookup_prepared(prepared[0], coords, radius, window_order)

    return look


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
