"""`correlation_lookup`: windows of the correlation between two feature maps, formed on demand."""

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
from kinema.kernels.dispatch import check_impl

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
]


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
    return correlation_lookup_reference(fmap1, fmap2_pyramid, coords, radius, window_order)
