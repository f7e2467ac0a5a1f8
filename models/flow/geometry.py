"""Every conversion of flow and points: units, resize, crop, pad, flip, warp, occlusion, colours.

Conventions: (x, y) order; pixel centres at integers; `flow_px` in pixels of the image it was computed
on, `flow_norm` in fractions of the image's width and height (points: 0..1 from edge to edge),
`flow_half` in units of half the width and height, so that the image spans -1..1 (FlowFeat's targets).

Shapes: flow is [..., 2, H, W], points are [..., 2], masks are [..., H, W].
"""

import math
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kinema.models.flow.padding import Padding

UNKNOWN_ABOVE_PX = 1e9
"""Flow files mark unknown pixels by values above this."""

Array = TypeVar("Array", Tensor, np.ndarray)
Points = TypeVar("Points", Float[Tensor, "*B 2"], Float[np.ndarray, "*B 2"])


def filled(like: Tensor, *values: float) -> Float[Tensor, "N"]:
    """Numbers of the host with the dtype and device of `like`.

    The device writes them itself. `new_tensor` copies them from the host, which waits for the device and which no CUDA
    graph can record (models/cuda_graphs.py).
    """
    return torch.stack([like.new_full((), value) for value in values])


def px_to_norm(flow_px: Float[Tensor, "*B 2 H W"]) -> Float[Tensor, "*B 2 H W"]:
    """Pixels to fractions of the image's width (x) and height (y)."""
    return flow_px / _size_xy(flow_px)


def norm_to_px(flow_norm: Float[Tensor, "*B 2 H W"]) -> Float[Tensor, "*B 2 H W"]:
    """Fractions of the image's width and height to pixels."""
    return flow_norm * _size_xy(flow_norm)


def px_to_half(flow_px: Float[Tensor, "*B 2 H W"]) -> Float[Tensor, "*B 2 H W"]:
    """Pixels to units of half the image: x * 2 / W and y * 2 / H."""
    return flow_px * 2 / _size_xy(flow_px)


def half_to_px(flow_half: Float[Tensor, "*B 2 H W"]) -> Float[Tensor, "*B 2 H W"]:
    """Units of half the image to pixels."""
    return flow_half * _size_xy(flow_half) / 2


def points_px_to_norm(points_px: Points, height: int, width: int) -> Points:
    """Pixel positions (centres at integers) to 0..1 from image edge to image edge; of a tensor or an array."""
    return (points_px + 0.5) / xy_like(points_px, width, height)


def xy_like(points: Array, x: float, y: float) -> Array:
    """(x, y) [2], to compute with `points`."""
    return filled(points, x, y) if isinstance(points, Tensor) else np.array([x, y], points.dtype)


def points_norm_to_px(points_norm: Float[Tensor, "*B 2"], height: int, width: int) -> Float[Tensor, "*B 2"]:
    """Positions in 0..1 from image edge to image edge to pixel positions (centres at integers)."""
    return points_norm * filled(points_norm, width, height) - 0.5


def resize_flow(
    flow_px: Float[Tensor, "*B 2 H W"], height: int, width: int, antialias: bool = True
) -> Float[Tensor, "*B 2 h w"]:
    """Flow of the same scene for images of another size: resampled, and values rescaled.

    Bilinear between pixel centres; `antialias` averages over the source pixels when shrinking. Unknown
    values are not treated: use `resize_sparse_flow` where some pixels have no flow.
    """
    old_height, old_width = flow_px.shape[-2:]
    if (height, width) == (old_height, old_width):
        return flow_px
    scale = filled(flow_px, width / old_width, height / old_height).view(2, 1, 1)
    return _resample(flow_px, height, width, antialias) * scale


def resize_sparse_flow(
    flow_px: Float[Tensor, "*B 2 H W"], valid: Bool[Tensor, "*B H W"], height: int, width: int
) -> tuple[Float[Tensor, "*B 2 h w"], Bool[Tensor, "*B h w"]]:
    """As `resize_flow`, averaging valid pixels only.

    Returns: the flow, 0 where unknown, and where at least half of the weight came from valid pixels.
    """
    weight = valid.unsqueeze(-3).to(flow_px.dtype)
    known = torch.where(valid.unsqueeze(-3), flow_px, 0.0)
    share = _resample(weight, height, width, antialias=True)
    flow = resize_flow(known, height, width) / share.clamp_min(1e-6)
    covered = share.squeeze(-3) >= 0.5
    return torch.where(covered.unsqueeze(-3), flow, 0.0), covered


def crop_flow(
    flow_px: Float[Tensor, "*B 2 H W"],
    top: int,
    left: int,
    height: int,
    width: int,
    second_top_left: tuple[int, int] | None = None,
) -> Float[Tensor, "*B 2 h w"]:
    """Flow between equal windows of both frames.

    Values stay as they are when both frames are cropped at the same place; if the second frame is
    cropped at `second_top_left`, the displacement between the windows is taken off.

    Raises: ValueError if the window leaves the image.
    """
    image_height, image_width = flow_px.shape[-2:]
    if min(top, left) < 0 or top + height > image_height or left + width > image_width:
        raise ValueError(
            f"crop of {height}x{width} at row {top}, column {left} leaves the {image_height}x{image_width} flow"
        )
    cropped = flow_px[..., top : top + height, left : left + width]
    if second_top_left is None:
        return cropped
    shift = filled(flow_px, left - second_top_left[1], top - second_top_left[0])
    return cropped + shift.view(2, 1, 1)


def pad_flow(flow_px: Float[Tensor, "*B 2 H W"], padding: Padding, value: float = 0.0) -> Float[Tensor, "*B 2 Hp Wp"]:
    """Flow between frames that were both padded; the margins hold `value`. Inverse: `padding.unpad`."""
    return F.pad(flow_px, (padding.left, padding.right, padding.top, padding.bottom), value=value)


def flip_flow(
    flow_px: Float[Tensor, "*B 2 H W"], horizontal: bool = False, vertical: bool = False
) -> Float[Tensor, "*B 2 H W"]:
    """Flow between the mirrored frames (left-right and/or top-bottom); its own inverse."""
    axes = [axis for axis, flipped in ((-1, horizontal), (-2, vertical)) if flipped]
    sign = filled(flow_px, -1.0 if horizontal else 1.0, -1.0 if vertical else 1.0)
    return flow_px.flip(axes) * sign.view(2, 1, 1)


def pixel_grid(height: int, width: int, like: Tensor) -> Float[Tensor, "2 H W"]:
    """(x, y) of every pixel centre, with the dtype and device of `like`."""
    y, x = torch.meshgrid(
        torch.arange(height, device=like.device, dtype=like.dtype),
        torch.arange(width, device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack([x, y])


def warp(
    maps: Float[Tensor, "B C H W"], flow_px: Float[Tensor, "B 2 h w"], outside: str = "border"
) -> tuple[Float[Tensor, "B C h w"], Bool[Tensor, "B h w"]]:
    """Backward warp: the value of `maps` (frame 2) where each pixel of frame 1 moves to; bilinear.

    Args: outside, what lies beyond the frame: "border" repeats its border, "zeros" is 0 (a target less
        than one pixel outside is a blend of the two).

    Returns: the warped maps, and where the target lies inside the frame, that
    is within [0, W-1] x [0, H-1]. Unknown flow (nan or huge) is outside.
    """
    height, width = maps.shape[-2:]
    target = pixel_grid(flow_px.shape[-2], flow_px.shape[-1], like=flow_px) + flow_px  # [B, 2, h, w]
    x, y = target.unbind(1)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    # Edge-to-edge normalisation: unlike the corner-aligned one it is defined for a side of one pixel.
    grid = points_px_to_norm(target.permute(0, 2, 3, 1), height, width) * 2 - 1
    grid = torch.where(inside.unsqueeze(-1), grid, grid.nan_to_num().clamp(-2, 2)).to(maps.dtype)
    return F.grid_sample(maps, grid, padding_mode=outside, align_corners=False), inside


class RoundTrip(NamedTuple):
    """Where pixels of frame 1 come back to, going to frame 2 by one flow and back by the other."""

    gap_px2: Float[Tensor, "B H W"]
    """|f + b(w)|^2, b(w) the backward flow at the target: squared distance from the start, in squared pixels."""
    size_px2: Float[Tensor, "B H W"]
    """|f|^2 + |b(w)|^2."""
    inside: Bool[Tensor, "B H W"]
    """Where the target lies inside frame 2."""

    def occluded(self, relative: float = 0.01, absolute_px2: float = 0.5) -> Bool[Tensor, "B H W"]:
        """See `occlusion`."""
        return ~((self.gap_px2 < relative * self.size_px2 + absolute_px2) & self.inside)


def round_trip(
    flow_forward_px: Float[Tensor, "B 2 H W"], flow_backward_px: Float[Tensor, "B 2 H W"], outside: str = "border"
) -> RoundTrip:
    """Forward-backward consistency of two opposite flows; `outside` as in `warp`."""
    backward, inside = warp(flow_backward_px, flow_forward_px, outside)
    gap_px2 = (flow_forward_px + backward).square().sum(1)
    return RoundTrip(gap_px2, flow_forward_px.square().sum(1) + backward.square().sum(1), inside)


def occlusion(
    flow_forward_px: Float[Tensor, "B 2 H W"],
    flow_backward_px: Float[Tensor, "B 2 H W"],
    relative: float = 0.01,
    absolute_px2: float = 0.5,
) -> Bool[Tensor, "B H W"]:
    """Pixels of frame 1 that frame 2 does not show, by the forward-backward check.

    Occluded where |f + b(w)|^2 >= relative (|f|^2 + |b(w)|^2) + absolute_px2, b(w) the backward flow
    at the target, or where the target leaves the frame.

    Source: Sundaram, Brox, Keutzer, ECCV 2010, section 4.
    """
    return round_trip(flow_forward_px, flow_backward_px).occluded(relative, absolute_px2)


def known_flow(flow_px: Float[Tensor, "*B 2 H W"]) -> Bool[Tensor, "*B H W"]:
    """Where both components are finite and not marked as unknown (above 1e9)."""
    return (flow_px.abs() <= UNKNOWN_ABOVE_PX).all(dim=-3)


def flow_to_colour(flow_px: Float[Tensor, "*B 2 H W"], max_px: float | None = None) -> UInt8[Tensor, "*B H W 3"]:
    """Picture of a flow field: hue is direction, saturation is length; unknown pixels are black.

    Args:
        max_px: the length of full saturation; the longest known vector of each field by default.
            Longer vectors are darkened.

    Source: Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011.
    """
    known = known_flow(flow_px)
    flow = torch.where(known.unsqueeze(-3), flow_px, 0.0).float()
    length = flow.norm(dim=-3)
    longest = length.amax(dim=(-2, -1), keepdim=True) if max_px is None else length.new_full((), max_px)
    radius = (length / longest.clamp_min(1e-6)).unsqueeze(-1)  # [..., H, W, 1]
    wheel = _colour_wheel().to(flow.device)
    angle = torch.atan2(-flow.select(-3, 1), -flow.select(-3, 0)) / math.pi  # -1..1
    position = (angle + 1) / 2 * (len(wheel) - 1)
    lower = position.floor().long()
    fraction = (position - lower).unsqueeze(-1)
    colour = torch.lerp(wheel[lower], wheel[(lower + 1) % len(wheel)], fraction)
    colour = torch.where(radius <= 1 + 1e-6, 1 - radius.clamp(max=1) * (1 - colour), colour * 0.75)
    return torch.where(known.unsqueeze(-1), colour * 255, 0.0).byte()


def _colour_wheel() -> Float[Tensor, "55 3"]:
    """RGB in 0..1 around the circle; perceptually similar arcs: red to yellow 15 steps, and so on."""
    arcs = [(15, 0, 1, +1), (6, 1, 0, -1), (4, 1, 2, +1), (11, 2, 1, -1), (13, 2, 0, +1), (6, 0, 2, -1)]
    rows = []
    for steps, full, moving, direction in arcs:
        ramp = torch.arange(steps) / steps
        arc = torch.zeros(steps, 3)
        arc[:, full] = 1.0
        arc[:, moving] = ramp if direction > 0 else 1.0 - ramp
        rows.append(arc)
    return torch.cat(rows)


def _size_xy(flow: Tensor) -> Tensor:
    height, width = flow.shape[-2:]
    return filled(flow, width, height).view(2, 1, 1)


def _resample(maps: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    flat = maps.reshape(-1, *maps.shape[-3:])
    out = F.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False, antialias=antialias)
    return out.reshape(*maps.shape[:-2], height, width)
