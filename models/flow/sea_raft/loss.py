"""SEA-RAFT's training loss, and the error that its mixture of Laplace distributions expects.

The network gives each pixel two mixture weights (logits) and two log-scales: `info` [B, 4, H, W],
(weight 0, weight 1, log-scale 0, log-scale 1). Component 0 has a scale of 1 to e^10 pixels, component 1
of exactly 1 pixel, whatever the fourth number is. Both flow channels share the mixture.

Source: Wang, Lipson and Deng, arXiv:2405.14793, section 3.2; clamps as in all published configurations.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kinema.models.flow.raft.loss import MAX_MOTION_PX

MAX_LOG_SCALE = 10.0


def mixture_nll(
    flow: Float[Tensor, "B 2 H W"], info: Float[Tensor, "B 4 H W"], flow_gt: Float[Tensor, "B 2 H W"]
) -> Float[Tensor, "B 2 H W"]:
    """Negative log-likelihood of the true flow, per pixel and flow channel."""
    weights, log_scales = info[:, None, :2], _log_scales(info)[:, None]  # [B, 1, 2, H, W]
    error = (flow_gt - flow).abs()[:, :, None]  # [B, 2, 1, H, W]
    components = weights - math.log(2.0) - log_scales - error * torch.exp(-log_scales)
    return torch.logsumexp(weights, dim=2) - torch.logsumexp(components, dim=2)


def mixture_sequence_loss(
    predictions: Sequence[tuple[Float[Tensor, "B 2 H W"], Float[Tensor, "B 4 H W"]]],
    flow_gt: Float[Tensor, "B 2 H W"],
    valid: Float[Tensor, "B H W"],
    gamma: float = 0.85,
    max_motion_px: float = MAX_MOTION_PX,
) -> Float[Tensor, ""]:
    """Sum over the n (flow, info) predictions of gamma^(n-1-i) times the mean of `mixture_nll` of prediction i.

    Pixels that are not valid, move by `max_motion_px` or more, or have no finite likelihood are left out
    of each prediction's mean; a prediction without any pixel adds 0.
    """
    counted = ((valid >= 0.5) & (flow_gt.norm(dim=1) < max_motion_px))[:, None]
    # Unknown ground truth may be nan, which no later product with 0 would take out of the gradient.
    known = torch.where(counted, flow_gt, 0.0)
    last, losses = len(predictions) - 1, []
    for i, (flow, info) in enumerate(predictions):
        nll = mixture_nll(flow, info, known)
        mask = counted & torch.isfinite(nll.detach())
        losses.append(gamma ** (last - i) * torch.where(mask, nll, 0.0).sum() / mask.sum().clamp_min(1))
    return torch.stack(losses).sum()


def expected_error_px(info: Float[Tensor, "B 4 H W"]) -> Float[Tensor, "B 1 H W"]:
    """The end-point error that the mixture expects, in pixels of the image the network saw.

    The mean length of (x, y) when x and y are drawn independently from the mixture, as the loss treats
    them: sum over i, j of w_i w_j E(b_i, b_j), with the closed form, s^2 = a^2 + b^2,

        E(a, b) = (a^3 + b^3) / s^2 + a^2 b^2 / s^3 (asinh(a / b) + asinh(b / a)),

    the integral of r^2 exp(-r (cos t / a + sin t / b)) / (a b) over r > 0 and t in 0..pi/2. Two equal
    scales give 1.623 b; a pixel that is sure of component 1 has 1.623 px, the least there is.
    """
    scale, unit = _log_scales(info).exp().split(1, dim=1)
    weight, rest = info[:, :2].float().softmax(dim=1).split(1, dim=1)
    equal = _mean_length(torch.ones_like(unit), unit)
    return (weight**2 * scale + rest**2) * equal + 2 * weight * rest * _mean_length(scale, unit)


def _mean_length(a: Tensor, b: Tensor) -> Tensor:
    """Mean length of a vector whose components are Laplace distributed with scales a and b."""
    squares = a**2 + b**2
    return (a**3 + b**3) / squares + (a * b) ** 2 / squares**1.5 * (torch.asinh(a / b) + torch.asinh(b / a))


def _log_scales(info: Float[Tensor, "B 4 H W"]) -> Float[Tensor, "B 2 H W"]:
    wide = info[:, 2:3].float().clamp(0.0, MAX_LOG_SCALE)
    return torch.cat([wide, torch.zeros_like(wide)], dim=1)
