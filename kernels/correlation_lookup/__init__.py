"""`correlation_lookup`: windows of the correlation between two feature maps, formed on demand."""

from jaxtyping import Float
from torch import Tensor

from kinema.kernels.correlation_lookup.reference import (
    correlation_lookup_reference,
    correlation_pyramid,
    correlation_volume,
    feature_pyramid,
    volume_bytes,
    volume_lookup,
)

__all__ = [
    "correlation_lookup",
    "correlation_pyramid",
    "correlation_volume",
    "feature_pyramid",
    "volume_bytes",
    "volume_lookup",
]


def correlation_lookup(
    fmap1: Float[Tensor, "B C H W"],
    fmap2_pyramid: list[Float[Tensor, "_ _ _ _"]],
    coords: Float[Tensor, "_ 2 _ _"],
    radius: int,
    impl: str = "auto",
) -> Float[Tensor, "B P H W"]:
    """Correlation of each pixel with a window around its target, at every pyramid level.

    `reference.correlation_lookup_reference` is the specification: [B, L (2 radius + 1)^2, H, W],
    float32, channels over levels, then x, then y; coords (x, y) in pixels of level 0.

    Raises: ValueError for an unknown `impl`, or maps that disagree in size.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl={impl!r} is not one of 'auto', 'reference'")
    return correlation_lookup_reference(fmap1, fmap2_pyramid, coords, radius)
