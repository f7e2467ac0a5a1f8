"""One flow out of several estimates of it: at each pixel what the pictures and the estimates themselves support.

What speaks against an estimate, in pixels, averaged over a square of `2 * RADIUS + 1` pixels:

- round trip: how far a pixel ends from where it began, there by the estimate and back by its own backward flow, at
  most `MAX_TRIP_PX`;
- difference: how unlike its surroundings are where it is sent to (`CENSUS_WEIGHT` pixels for complete unlikeness).

Where the target leaves the frame neither can be seen; both are then what is usual for the estimate. The sum is
multiplied by 1 + (distance from the first estimate) / `APART_PX`: a large departure needs better support. The flow is
the mean of the estimates with weights (least / theirs)^`SHARPNESS`: one that is clearly worse has no say, and ones that
are equally good and agree support each other against their own noise. The least sum is the error to expect.

Pixels that half of the estimates or more take to be hidden (by the forward-backward check) have no counterpart that
could support anything, and estimates may agree on what is wrong. There the first one counts, by as much as its
surroundings are hidden too: name a network first, which has learnt how hidden things move. docs/LOG.md has the figures.

Source of the census difference: Zabih and Woodfill, ECCV 1994, in the soft form of Stone et al., CVPR 2021.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kinema.models.flow.geometry import round_trip, warp

RADIUS = 2
MAX_TRIP_PX = 20.0
CENSUS_WEIGHT = 20.0
SHARPNESS = 4
HIDDEN_SHARE = 0.5
APART_PX = 20.0
CENSUS_RADIUS = 3
_CENSUS_EPS2, _CENSUS_HALF = 0.81 / 255**2, 0.1
_NONE = 1e-6
_GREY = (0.299, 0.587, 0.114)


class Consensus(NamedTuple):
    """The agreed flow of a pair."""

    flow_px: Float[Tensor, "2 H W"]
    expected_error_px: Float[Tensor, "H W"]
    """What speaks against the best estimate; 0 is full confidence."""
    weights: Float[Tensor, "K H W"]
    """What each estimate counted; their sum is 1."""


def consensus(
    image1: Float[Tensor, "3 H W"],
    image2: Float[Tensor, "3 H W"],
    forward: Sequence[Float[Tensor, "2 H W"]],
    backward: Sequence[Float[Tensor, "2 H W"]],
) -> Consensus:
    """Flow from image1 to image2 (0..1) by several estimates, each with its own backward flow; the first is special.

    Raises: ValueError without estimates, or for one without backward flow.
    """
    if not forward or len(forward) != len(backward):
        raise ValueError(f"{len(forward)} forward and {len(backward)} backward flows; give one of each per estimate")
    judged = [_judged(image1, image2, there, back) for there, back in zip(forward, backward, strict=True)]
    against, hidden = (torch.stack(parts) for parts in zip(*judged, strict=True))
    flows = torch.stack(list(forward))
    against = against * (1 + (flows - flows[0]).norm(dim=1) / APART_PX)
    least = against.amin(dim=0)
    # A least sum of 0 is an estimate that nothing speaks against: it, and what equals it, gets all the weight.
    weights = ((least + _NONE) / (against + _NONE)) ** SHARPNESS
    weights = weights / weights.sum(dim=0)
    unseen = _averaged((hidden.float().mean(dim=0) >= HIDDEN_SHARE).float())
    weights = weights * (1 - unseen)
    weights[0] += unseen
    flow = (weights[:, None] * flows).sum(dim=0)
    return Consensus(flow, least, weights)


def _judged(
    image1: Tensor, image2: Tensor, there: Tensor, back: Tensor
) -> tuple[Float[Tensor, "H W"], Bool[Tensor, "H W"]]:
    """Round trip and difference of one estimate, in pixels, and what it takes to be hidden."""
    trip = round_trip(there[None], back[None])
    trip_px, seen = trip.gap_px2[0].sqrt().clamp(max=MAX_TRIP_PX), trip.inside[0]
    grey = image1.new_tensor(_GREY).view(3, 1, 1)
    moved, _ = warp((image2 * grey).sum(0)[None, None], there[None])
    sums = trip_px + CENSUS_WEIGHT * census_difference((image1 * grey).sum(0), moved[0, 0])
    usual = sums[seen].mean() if bool(seen.any()) else sums.new_tensor(MAX_TRIP_PX)
    return _averaged(torch.where(seen, sums, usual)), trip.occluded()[0]


def census_difference(grey1: Float[Tensor, "H W"], grey2: Float[Tensor, "H W"]) -> Float[Tensor, "H W"]:
    """How differently two pictures relate each pixel to its neighbours, 0 to below 1; brightness hardly matters."""
    r = CENSUS_RADIUS
    padded = F.pad(torch.stack([grey1, grey2])[None], (r, r, r, r), mode="replicate")[0]
    middle = torch.stack([grey1, grey2])
    height, width = grey1.shape
    total = torch.zeros_like(grey1)
    for dy in range(2 * r + 1):
        for dx in range(2 * r + 1):
            step = padded[:, dy : dy + height, dx : dx + width] - middle
            first, second = step / torch.sqrt(_CENSUS_EPS2 + step.square())
            square = (first - second).square()
            total += square / (_CENSUS_HALF + square)
    return total / ((2 * r + 1) ** 2 - 1)


def _averaged(values: Float[Tensor, "H W"]) -> Float[Tensor, "H W"]:
    side = 2 * RADIUS + 1
    padded = F.pad(values[None, None], (RADIUS,) * 4, mode="replicate")
    return F.avg_pool2d(padded, side, stride=1)[0, 0]
