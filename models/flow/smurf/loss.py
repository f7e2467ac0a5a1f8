"""Losses that train flow without labels: census, smoothness, occlusion, self-supervision.

Conventions are those of kinema.models.flow.geometry: flow is (x, y) in pixels, images are RGB in 0..1.
Masks are float [B, 1, H, W]. The published code stores flow as (row, column).

Source: Stone et al., "SMURF", CVPR 2021, arXiv:2105.07014, section 3, and the published TensorFlow code,
whose constants and normalisations are kept. Occlusion estimates: Wang et al., "Occlusion Aware
Unsupervised Learning of Optical Flow", CVPR 2018; Sundaram, Brox, Keutzer, ECCV 2010.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kinema.models.flow.geometry import crop_flow, pad_flow, pixel_grid, resize_flow, round_trip, warp
from kinema.models.flow.padding import Padding

Mask = Float[Tensor, "B 1 H W"]

CENSUS_PATCH = 7


@dataclass(frozen=True)
class SmurfLossWeights:
    """Weights of the terms, and how they are formed; the published training's values."""

    census: float = 1.0
    """Weight of the photometric term."""
    smooth1: float = 0.0
    """Weight of first-order smoothness."""
    smooth2: float = 2.0
    """Weight of second-order smoothness."""
    edge_weighting: str = "exponential"
    """How image edges weaken smoothness: exponential or gaussian."""
    edge_constant: float = 150.0
    """How fast they do."""
    occlusion: str = "wang"
    """Occlusion estimate that masks the photometric term: wang, brox or none."""
    decay: float = 0.8
    """Weight of a refinement relative to the next one."""


def unsupervised_sequence_loss(
    image1: Float[Tensor, "B 3 H W"],
    image2: Float[Tensor, "B 3 H W"],
    forward_flows: Sequence[Float[Tensor, "B 2 H W"]],
    backward_flows: Sequence[Float[Tensor, "B 2 H W"]],
    weights: SmurfLossWeights = SmurfLossWeights(),
    full_images: tuple[Float[Tensor, "B 3 Hf Wf"], Float[Tensor, "B 3 Hf Wf"]] | None = None,
    top_left: tuple[int, int] = (0, 0),
) -> dict[str, Float[Tensor, ""]]:
    """The terms census, smooth1 and smooth2, weighted and summed over refinements, and their sum `total`.

    Each term is the mean of both directions; refinement i of n counts decay^(n-1-i). The images are not
    changed photometrically (the network may have seen other versions of them). `self_supervision_loss`
    is a term of its own; the published training adds it with weight 0.3 once the flow has settled.

    Args:
        forward_flows, backward_flows: flow after every refinement, image1 to image2 and back.
        full_images: the frames that image1 and image2 were cut out of at (row, column) `top_left`. Then
            motion that leaves the crop but not the frame keeps its photometric loss (full-image warping).
    Raises: ValueError if the numbers of flows differ or are 0.
    """
    if len(forward_flows) != len(backward_flows) or not forward_flows:
        raise ValueError(
            f"{len(forward_flows)} forward and {len(backward_flows)} backward flows: "
            "there must be one of each per refinement, and at least one"
        )
    total: dict[str, Tensor] = {}
    sources = full_images or (image1, image2)
    for there, back in zip(forward_flows, backward_flows, strict=True):
        terms = _direction(image1, sources[1], there, back, weights, full_images is not None, top_left)
        others = _direction(image2, sources[0], back, there, weights, full_images is not None, top_left)
        for name, value in terms.items():
            total[name] = (value + others[name]) / 2 + weights.decay * total.get(name, 0.0)
    return {**total, "total": sum(total.values(), start=image1.new_zeros(()))}


def _direction(
    image: Tensor,
    source: Tensor,
    flow: Tensor,
    backward: Tensor,
    weights: SmurfLossWeights,
    full: bool,
    top_left: tuple[int, int],
) -> dict[str, Tensor]:
    """The weighted terms of one direction; `source` is the other image, or the whole frame around it."""
    terms = {}
    if weights.census:
        warped, valid = _warp_from(source.detach(), flow, top_left)
        with torch.no_grad():
            occluded = occlusion_mask(flow, backward, weights.occlusion)
            if full:  # motion off the crop is seen in the whole frame
                occluded = torch.minimum(occluded, warp(backward, flow)[1][:, None].float())
            mask = (1 - occluded) * valid
        terms["census"] = weights.census * census_loss(image, warped, mask)
    for order, weight in ((1, weights.smooth1), (2, weights.smooth2)):
        if weight:
            loss = smoothness_loss(image, flow, order, weights.edge_weighting, weights.edge_constant)
            terms[f"smooth{order}"] = weight * loss
    return terms


def _warp_from(source: Tensor, flow: Tensor, top_left: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Frame 2 at the targets of a crop's flow, and where they are inside it."""
    (height, width), (top, left) = flow.shape[-2:], top_left
    full_height, full_width = source.shape[-2:]
    margins = Padding(left, full_width - width - left, top, full_height - height - top)
    warped, inside = warp(source, pad_flow(flow, margins), outside="zeros")
    return margins.unpad(warped), margins.unpad(inside[:, None].float())


def census_loss(
    image1: Float[Tensor, "B 3 H W"], warped: Float[Tensor, "B 3 H W"], mask: Mask, patch: int = CENSUS_PATCH
) -> Float[Tensor, ""]:
    """Mean of (distance + 0.01)^0.4 over the mask, borders of half a patch left out; see `census_distance`.

    Args: mask, the share by which each pixel counts; no gradient goes into it.
    """
    border = patch // 2
    inner = torch.zeros_like(mask)
    inner[..., border:-border, border:-border] = mask.detach()[..., border:-border, border:-border]
    penalty = (census_distance(image1, warped, patch) + 0.01) ** 0.4
    return (penalty * inner).sum() / (inner + 1e-6).sum()


def census_distance(
    image1: Float[Tensor, "B 3 H W"], image2: Float[Tensor, "B 3 H W"], patch: int = CENSUS_PATCH
) -> Mask:
    """Soft Hamming distance between the census transforms: about the number of neighbours that differ."""
    squares = (_census(image1, patch) - _census(image2, patch)).square()
    return (squares / (0.1 + squares)).sum(dim=1, keepdim=True)


def _census(image: Tensor, patch: int) -> Float[Tensor, "B N H W"]:
    """Differences of grey values to each neighbour, squashed to -1..1; 0 beyond the image."""
    grey = image.new_tensor([0.2989, 0.5870, 0.1140]).mul(255).view(1, 3, 1, 1).mul(image).sum(dim=1, keepdim=True)
    difference = F.unfold(grey, patch, padding=patch // 2).unflatten(2, grey.shape[-2:]) - grey
    return difference / (0.81 + difference.square()).sqrt()


def smoothness_loss(
    image: Float[Tensor, "B 3 H W"],
    flow: Float[Tensor, "B 2 H W"],
    order: int = 2,
    edge_weighting: str = "exponential",
    edge_constant: float = 150.0,
) -> Float[Tensor, ""]:
    """Mean robust size of the flow's first or second differences along x and y, less where the image has edges.

    Edge weights, g the image's difference over `order` pixels and c `edge_constant`: exp(-mean |c g|)
    ("exponential") or exp(-mean (c g)^2) ("gaussian"), means over colours.
    Raises: ValueError for another order or weighting, or sides of at most `order` pixels.
    """
    if order not in (1, 2) or edge_weighting not in ("exponential", "gaussian"):
        raise ValueError(
            f"order={order}, edge_weighting={edge_weighting!r}: order is 1 or 2, weighting 'exponential' or 'gaussian'"
        )
    if min(flow.shape[-2:]) <= order:
        raise ValueError(f"flow of {flow.shape[-2]}x{flow.shape[-1]}: sides must be above order={order}")
    losses = []
    for axis in (-2, -1):
        edge = edge_constant * _difference(image, axis, order)
        edge = edge.abs() if edge_weighting == "exponential" else edge.square()
        change = flow
        for _ in range(order):
            change = _difference(change, axis)
        losses.append((torch.exp(-edge.mean(dim=1, keepdim=True)) * _robust(change)).mean())
    return (losses[0] + losses[1]) / 2


def _difference(maps: Tensor, axis: int, step: int = 1) -> Tensor:
    size = maps.shape[axis] - step
    return maps.narrow(axis, step, size) - maps.narrow(axis, 0, size)


def _robust(x: Tensor) -> Tensor:
    return (x.square() + 1e-6).sqrt()


def range_map(flow: Float[Tensor, "B 2 H W"]) -> Mask:
    """How often each pixel of frame 2 is a target of `flow`: bilinear shares of every arrow's end, summed."""
    B, _, H, W = flow.shape
    x, y = (pixel_grid(H, W, like=flow) + flow).flatten(2).unbind(1)  # [B, H W]
    counts = flow.new_zeros(B, H * W)
    for corner_x in (x.floor(), x.floor() + 1):
        for corner_y in (y.floor(), y.floor() + 1):
            share = (1 - (x - corner_x).abs()) * (1 - (y - corner_y).abs())
            inside = (corner_x >= 0) & (corner_x < W) & (corner_y >= 0) & (corner_y < H)
            # Only what is inside is cast: nan and huge values do not fit an integer.
            column, row = (torch.where(inside, corner, 0.0).long() for corner in (corner_x, corner_y))
            counts = counts.scatter_add(1, row * W + column, torch.where(inside, share, 0.0))
    return counts.view(B, 1, H, W)


def occlusion_mask(forward: Float[Tensor, "B 2 H W"], backward: Float[Tensor, "B 2 H W"], method: str = "wang") -> Mask:
    """Where pixels of frame 1 are hidden in frame 2, 0..1.

    "wang": 1 - the number of backward arrows that end on the pixel, clipped to 0..1. "brox": 1 where
    |f + b(w)|^2 > 0.01 (|f|^2 + |b(w)|^2) + 0.5, b(w) the backward flow at the target, 0 beyond the frame
    (so that, unlike in `flow_geometry.occlusion`, leaving the frame slowly is not occlusion). "none": 0.

    Raises: ValueError for another method.
    """
    if method == "wang":
        return 1 - range_map(backward).clamp(0, 1)
    if method == "brox":
        trip = round_trip(forward, backward, outside="zeros")
        return (trip.gap_px2 > 0.01 * trip.size_px2 + 0.5)[:, None].to(forward.dtype)
    if method == "none":
        return torch.zeros_like(forward[:, :1])
    raise ValueError(f"occlusion method {method!r} is not one of 'wang', 'brox', 'none'")


def self_supervision_loss(
    teacher_forward: Float[Tensor, "B 2 H W"],
    teacher_backward: Float[Tensor, "B 2 H W"],
    student_forward: Float[Tensor, "B 2 h w"],
    student_backward: Float[Tensor, "B 2 h w"],
    crop: int = 64,
    mask: str = "gaussian",
    sigma_teacher: float = 0.003,
    sigma_student: float = 0.03,
) -> Float[Tensor, ""]:
    """Robust difference of the student's flow to the teacher's, where the teacher is sure and the student is not.

    The student saw the teacher's images with `crop` pixels cut off each side, and perhaps resized: the
    teacher's flow and mask are cropped and brought to the student's size. Mean over all pixels, not
    over the mask. No gradient goes to the teacher or into the masks.

    Args: mask, how sure is measured, d the length of f + b(w): "gaussian" exp(-(d / sigma)^2 / (H^2 + W^2))
        with the teacher's H and W for both; "ddflow" the forward-backward check; "none" everywhere.
    Raises: ValueError for another mask, or a crop that leaves nothing.
    """
    if mask not in ("gaussian", "ddflow", "none"):
        raise ValueError(f"mask={mask!r} is not one of 'gaussian', 'ddflow', 'none'")
    height, width = (side - 2 * crop for side in teacher_forward.shape[-2:])
    if min(height, width) < 1:
        raise ValueError(f"crop={crop} leaves nothing of {list(teacher_forward.shape[-2:])}; use a smaller one")
    with torch.no_grad():
        size = (student_forward.shape[-2], student_forward.shape[-1])
        target = crop_flow(teacher_forward, crop, crop, height, width)
        target = resize_flow(target, size[0], size[1], antialias=False)
        share = torch.ones_like(student_forward[:, :1])
        if mask != "none":
            diagonal = teacher_forward.shape[-2] ** 2 + teacher_forward.shape[-1] ** 2
            sure = _consistency(teacher_forward, teacher_backward, mask, sigma_teacher**2 * diagonal)
            sure = Padding(crop, crop, crop, crop).unpad(sure)
            if sure.shape[-2:] != size:
                sure = F.interpolate(sure, size=size, mode="bilinear", align_corners=False)
            share = sure * (1 - _consistency(student_forward, student_backward, mask, sigma_student**2 * diagonal))
    return (share * _robust(target - student_forward)).mean()


def _consistency(forward: Tensor, backward: Tensor, mask: str, variance: float) -> Mask:
    """How well the flows undo one another, 0..1; 0 where the target is beyond the frame."""
    trip = round_trip(forward, backward, outside="zeros")
    if mask == "gaussian":
        agreement = torch.exp(-trip.gap_px2 / variance)
    else:
        agreement = (trip.gap_px2 < 0.01 * trip.size_px2 + 0.5).to(trip.gap_px2.dtype)
    return (agreement * trip.inside)[:, None]
