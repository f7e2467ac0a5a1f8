"""Geometry of a correlation window: lattice positions, bilinear weights, blending and its adjoint.

All points of a window share one fraction, so K = 2 radius + 2 lattice values per axis give the
k = 2 radius + 1 interpolated ones. Lattice points outside the target map get weight 0, which is what
zero padding means; a coordinate that is not finite makes the whole window nan, as grid sampling does.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

WindowOrder = Literal["x_major", "y_major"]


class Axis(NamedTuple):
    """One axis of the windows of n query pixels."""

    first: Int[Tensor, "n"]
    """First lattice position, radius left of the centre; may lie outside the map."""
    left: Float[Tensor, "n k"]
    """Weight of the left (upper) neighbour of each interpolated value."""
    right: Float[Tensor, "n k"]
    """Weight of the right (lower) neighbour."""


def check_window(radius: int, window_order: str) -> None:
    """Raises: ValueError for a negative radius or an unknown order."""
    if radius < 0:
        raise ValueError(f"radius={radius} must be at least 0; RAFT takes 4, RAFT-small 3")
    if window_order not in ("x_major", "y_major"):
        raise ValueError(f"window_order={window_order!r} is not one of 'x_major', 'y_major'")


def window_axis(centre: Float[Tensor, "n"], size: int, radius: int) -> Axis:
    """Positions and weights along an axis of `size` pixels."""
    lower = centre.floor()
    fraction = (centre - lower).nan_to_num(0.0).unsqueeze(1)
    # Clamped before the cast: a coordinate far outside does not fit an integer.
    first = lower.nan_to_num(0.0).clamp(-radius - 2, size + radius + 1).long() - radius
    position = positions(first, 2 * radius + 2)
    inside = (position >= 0) & (position < size)
    return Axis(first, (1.0 - fraction) * inside[:, :-1], fraction * inside[:, 1:])


def positions(first: Int[Tensor, "*n"], count: int) -> Int[Tensor, "*n K"]:
    """`count` lattice positions from `first` on."""
    return first.unsqueeze(-1) + torch.arange(count, device=first.device)


def clamped_index(y: Int[Tensor, "*n Ky"], x: Int[Tensor, "*n Kx"], h: int, w: int) -> Int[Tensor, "*n KyKx"]:
    """Row-major index of a lattice in an h x w map; positions outside name the nearest pixel."""
    rows = y.clamp(0, h - 1).unsqueeze(-1) * w
    return (rows + x.clamp(0, w - 1).unsqueeze(-2)).flatten(-2)


def blend(lattice: Float[Tensor, "n K K"], y: Axis, x: Axis, window_order: WindowOrder) -> Float[Tensor, "n P"]:
    """Lattice values (rows y, columns x) interpolated along x, then y, and flattened in the given order."""
    rows = torch.addcmul(lattice[:, :, :-1] * x.left.unsqueeze(1), lattice[:, :, 1:], x.right.unsqueeze(1))
    window = torch.addcmul(rows[:, :-1] * y.left.unsqueeze(2), rows[:, 1:], y.right.unsqueeze(2))
    return (window.transpose(1, 2) if window_order == "x_major" else window).flatten(1)


def unblend(grad: Float[Tensor, "n P"], y: Axis, x: Axis, window_order: WindowOrder) -> Float[Tensor, "n K K"]:
    """Gradient of the lattice values from that of the window: the adjoint of `blend`."""
    n, k = x.left.shape
    window = grad.view(n, k, k)
    if window_order == "x_major":
        window = window.transpose(1, 2)
    rows = grad.new_zeros(n, k + 1, k)
    rows[:, :-1] = window * y.left.unsqueeze(2)
    rows[:, 1:].addcmul_(window, y.right.unsqueeze(2))
    lattice = grad.new_zeros(n, k + 1, k + 1)
    lattice[:, :, :-1] = rows * x.left.unsqueeze(1)
    lattice[:, :, 1:].addcmul_(rows, x.right.unsqueeze(1))
    return lattice


def accumulation_dtype(fmap: Tensor) -> torch.dtype:
    """float64 for float64 maps, else float32."""
    return torch.float64 if fmap.dtype == torch.float64 else torch.float32


def pixel_rows(fmap: Float[Tensor, "B C H W"], dtype: torch.dtype) -> Float[Tensor, "B N C"]:
    """Pixels as contiguous rows; a view where the map is channels-last and has this type."""
    return fmap.to(dtype).permute(0, 2, 3, 1).reshape(fmap.shape[0], -1, fmap.shape[1])


def mark_not_finite(windows: Float[Tensor, "*n P"], points: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n P"]:
    """nan where the coordinates are not finite; such windows pass no gradient."""
    return windows.masked_fill(~points.isfinite().all(dim=-1, keepdim=True), float("nan"))


def check_maps(fmap1: Tensor, fmap2_pyramid: list[Tensor]) -> None:
    """Raises: ValueError for maps that cannot be correlated."""
    if not fmap2_pyramid:
        raise ValueError("fmap2_pyramid is empty; it needs at least the map itself (`feature_pyramid`)")
    for level, fmap2 in enumerate(fmap2_pyramid):
        if fmap1.ndim != 4 or fmap2.ndim != 4 or fmap1.shape[:2] != fmap2.shape[:2]:
            raise ValueError(
                f"fmap1 is {list(fmap1.shape)} and fmap2 at level {level} is {list(fmap2.shape)}: "
                "both must be [B, C, H, W], and batch size and channels must agree"
            )
        if fmap1.dtype != fmap2.dtype or not fmap1.is_floating_point():
            raise ValueError(
                f"fmap1 is {fmap1.dtype} and fmap2 at level {level} is {fmap2.dtype}: "
                "both must have one floating-point type; convert one of them"
            )
        if 0 in fmap2.shape[-2:]:
            raise ValueError(f"fmap2 at level {level} is {list(fmap2.shape)}, without pixels; ask for fewer levels")


def check_lookup(fmap1: Tensor, fmap2_pyramid: list[Tensor], coords: Tensor, radius: int, window_order: str) -> None:
    """Raises: ValueError for arguments of a lookup that do not fit together."""
    check_window(radius, window_order)
    check_maps(fmap1, fmap2_pyramid)
    if tuple(coords.shape) != (fmap1.shape[0], 2, *fmap1.shape[2:]) or not coords.is_floating_point():
        raise ValueError(
            f"coords is {coords.dtype} {list(coords.shape)} and fmap1 is {list(fmap1.shape)}: "
            "there must be one (x, y) per pixel of fmap1, in floating point"
        )
