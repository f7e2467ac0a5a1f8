"""AllTracker's training losses: sparse point tracks in windows of a clip, and flow between pairs.

Source: Harley et al., arXiv:2506.07310, section 3.4, and the published training scripts; a step's weight is
0.8^(steps after it), visibility and confidence weigh every step the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kinema.models.flow.geometry import pixel_grid
from kinema.models.tracks.alltracker.network import DenseTracks

GAMMA = 0.8
HUBER_PX, CONFIDENT_PX = 6.0, 12.0
VISIBLE_WEIGHT, PAIR_WEIGHT = 0.05, 0.01
INVISIBLE_WEIGHTS = {1: 0.01, 2: 0.02}
"""Weight of the positions of hidden points, by training stage."""


class TrackLoss(NamedTuple):
    """The loss of a clip, and its terms before they are weighted."""

    total: Float[Tensor, ""]
    visible: Float[Tensor, ""]
    """Position error of points while they are seen, in pixels (with `huber`, its Huber penalty)."""
    invisible: Float[Tensor, ""]
    """The same while they are hidden."""
    visibility: Float[Tensor, ""]
    """Cross entropy of being seen."""
    confidence: Float[Tensor, ""]
    """Cross entropy of being within 12 pixels, counted while a point is seen."""


def sparse_track_loss(
    windows: Sequence[Sequence[DenseTracks]],
    tracks_px: Float[Tensor, "B T N 2"],
    visible: Float[Tensor, "B T N"],
    valid: Float[Tensor, "B T N"],
    stage: int = 1,
    huber: bool = False,
) -> TrackLoss:
    """Loss of dense predictions against tracks of points that begin in frame 0.

    Args:
        windows: for each window, the tracks after every refinement, as `AllTracker.predictions` gives them.
        tracks_px: (x, y) of each point in each frame; where a point begins outside the frame, it begins at its border.
        valid: whether a position is known at all.
        stage: 1 or 2, a key of `INVISIBLE_WEIGHTS`.
        huber: Huber penalty with a delta of 6 pixels instead of the absolute error.
    """
    height, width = windows[0][0].flow.shape[-2:]
    start = torch.minimum(tracks_px[:, 0].clamp_min(0), tracks_px.new_tensor([width - 1, height - 1]))  # [B, N, 2]
    tracks_px = torch.cat([start[:, None], tracks_px[:, 1:]], dim=1)
    sums = [tracks_px.new_zeros(()) for _ in range(4)]
    for number, steps in enumerate(windows):
        length = steps[0].flow.shape[1]
        span = slice(number * (length // 2), number * (length // 2) + length)
        truth, seen, known = tracks_px[:, span], visible[:, span], valid[:, span]
        for i, step in enumerate(steps):
            weight = GAMMA ** (len(steps) - 1 - i)
            position, seen_probability, confident = _read_points(step, start)
            error = _error(position, truth, huber)
            right = ((position.detach() - truth).square().sum(-1) <= CONFIDENT_PX**2).float()
            confidence = F.binary_cross_entropy(confident, right, reduction="none")
            terms = (
                weight * _masked_mean(error, known * seen),
                weight * _masked_mean(error, known * (1 - seen)),
                F.binary_cross_entropy(seen_probability, seen),
                (confidence * seen).mean(),
            )
            sums = [total + term / len(steps) for total, term in zip(sums, terms, strict=True)]
    seen_px, hidden_px, visibility, confidence = (total / len(windows) for total in sums)
    total = VISIBLE_WEIGHT * seen_px + INVISIBLE_WEIGHTS[stage] * hidden_px + visibility + confidence
    return TrackLoss(total, seen_px, hidden_px, visibility, confidence)


def pair_loss(
    predictions: Sequence[Float[Tensor, "B 2 H W"]],
    flow_gt: Float[Tensor, "B 2 H W"],
    valid: Float[Tensor, "B 1 H W"],
) -> Float[Tensor, ""]:
    """Loss of the flow after every refinement against dense flow: 0.01 times the mean |dx| + |dy| where it is known."""
    known = valid >= 0.5
    truth = torch.where(known, flow_gt, 0.0)
    losses = [
        GAMMA ** (len(predictions) - 1 - i)
        * torch.where(known, flow - truth, 0.0).abs().sum()
        / known.sum().clamp_min(1)
        for i, flow in enumerate(predictions)
    ]
    return PAIR_WEIGHT * torch.stack(losses).sum()


def _read_points(
    step: DenseTracks, start: Float[Tensor, "B N 2"]
) -> tuple[Float[Tensor, "B S N 2"], Float[Tensor, "B S N"], Float[Tensor, "B S N"]]:
    """Positions, and the two probabilities, that the maps hold for points of frame 0.

    Positions are interpolated; probabilities are read at the nearest pixel, since an interpolated one may leave 0..1.
    """
    B, S, _, height, width = step.flow.shape
    targets = (step.flow + pixel_grid(height, width, like=step.flow)).flatten(0, 1)  # [B S, 2, H, W]
    size = start.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    grid = (start * (2 / size) - 1).repeat_interleave(S, dim=0)[:, None]  # [B S, 1, N, 2]
    read = F.grid_sample(targets, grid, padding_mode="border", align_corners=True)[:, :, 0]
    positions = read.transpose(1, 2).unflatten(0, (B, S))
    x, y = start.round().long().unbind(-1)  # half to even
    clips = torch.arange(B, device=start.device)[:, None]
    probabilities = step.visconf[clips, :, :, y, x]  # [B, N, S, 2]
    seen, confident = probabilities.transpose(1, 2).unbind(-1)
    return positions, seen, confident


def _error(position: Tensor, truth: Tensor, huber: bool) -> Float[Tensor, "B S N"]:
    if huber:
        return F.huber_loss(position, truth, reduction="none", delta=HUBER_PX).mean(-1)
    return (position - truth).abs().mean(-1)


def _masked_mean(values: Tensor, mask: Tensor) -> Float[Tensor, ""]:
    return (values * mask).sum() / (1e-6 + mask.sum())
