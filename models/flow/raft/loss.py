"""RAFT's training loss and the errors it logs.

Source: Teed and Deng, arXiv:2003.12039, section 3.4, and the published training script, which averages
over all elements (masked ones count as zeros) and leaves out motion of 400 pixels and more.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_MOTION_PX = 400.0


def sequence_loss(
    predictions: Sequence[Float[Tensor, "B 2 H W"]],
    flow_gt: Float[Tensor, "B 2 H W"],
    valid: Float[Tensor, "B H W"],
    gamma: float = 0.8,
    max_motion_px: float = MAX_MOTION_PX,
) -> Float[Tensor, ""]:
    """Sum over the n refinements of gamma^(n-1-i) times the mean absolute error of prediction i."""
    mask = _counted(flow_gt, valid, max_motion_px)[:, None]
    # Unknown ground truth may be nan, which no later product with 0 would take out of the gradient.
    known = torch.where(mask, flow_gt, 0.0)
    last = len(predictions) - 1
    losses = [
        gamma ** (last - i) * torch.where(mask, (flow - known).abs(), 0.0).mean() for i, flow in enumerate(predictions)
    ]
    return torch.stack(losses).sum()


def flow_errors(
    flow: Float[Tensor, "B 2 H W"],
    flow_gt: Float[Tensor, "B 2 H W"],
    valid: Float[Tensor, "B H W"],
    max_motion_px: float = MAX_MOTION_PX,
) -> dict[str, float]:
    """End-point error in pixels, and the shares of pixels with an error below 1, 3 and 5 pixels."""
    error = (flow - flow_gt).norm(dim=1)[_counted(flow_gt, valid, max_motion_px)]
    shares = {f"px{t}": (error < t).float().mean().item() for t in (1, 3, 5)}
    return {"epe": error.mean().item(), **shares}


def _counted(flow_gt: Tensor, valid: Tensor, max_motion_px: float) -> Bool[Tensor, "B H W"]:
    return (valid >= 0.5) & (flow_gt.norm(dim=1) < max_motion_px)
