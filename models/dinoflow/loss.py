"""DinoFlow's training loss: masked L1 end-point error; and what an encoder that learns from scratch needs besides.

Source: model card of blanchon/dinoflow-model, which names the loss and its cap of 400 pixels. The matching loss is not
of the card: a trained encoder's features can be told apart already.

Shape legend: B batch, P = (2r+1)^2 displacements, h w patch grid, H W image.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

MATCHING_SCALE = 20.0
"""Correlations times this are logits: those of an untrained encoder differ by a few hundredths."""


def endpoint_loss(
    flow: Float[Tensor, "B 2 H W"],
    flow_gt: Float[Tensor, "B 2 H W"],
    valid: Float[Tensor, "B H W"],
    max_motion_px: float = 400.0,
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """|du| + |dv| in pixels, averaged over the pixels of each sample that count.

    A pixel counts where `valid` is at least 0.5 and it moves less than `max_motion_px`; unknown flow may be nan.

    Returns: the mean of each sample, 0 with a graph where none of its pixels counts, and whether one does.
    """
    counted = (valid >= 0.5) & (flow_gt.norm(dim=1) < max_motion_px)
    # Unknown ground truth may be nan, which no later product with 0 would take out of the gradient.
    known = torch.where(counted[:, None], flow_gt, 0.0)
    error = torch.where(counted, (flow.float() - known).abs().sum(dim=1), 0.0)
    number = counted.sum(dim=(1, 2))
    return error.sum(dim=(1, 2)) / number.clamp_min(1), number > 0


def matching_loss(
    correlation: Float[Tensor, "B P h w"], flow_gt: Float[Tensor, "B 2 H W"], valid: Float[Tensor, "B H W"]
) -> Float[Tensor, " B"]:
    """Cross entropy of each patch's correlations against its mean true motion, averaged over the patches that count.

    The truth is shared out among the four displacements around it, as bilinear sampling would. A patch counts where all
    of its flow is valid and known, and leads to a place in the picture that the correlations reach.

    Args: correlation, as `kinema.kernels.local_correlation` gives it for the patch grid; H and W whole patches.
    Returns: the mean of each sample, 0 with a graph where none of its patches counts.
    """
    height, width = correlation.shape[-2:]
    patch, radius = flow_gt.shape[-1] // width, (math.isqrt(correlation.shape[1]) - 1) // 2
    known = (valid >= 0.5) & flow_gt.isfinite().all(dim=1)
    step = F.avg_pool2d(torch.where(known[:, None], flow_gt, 0.0), patch) / patch  # in patches
    rows = torch.arange(height, device=step.device, dtype=step.dtype)[:, None]
    columns = torch.arange(width, device=step.device, dtype=step.dtype)
    x, y = columns + step[:, 0], rows + step[:, 1]
    counted = F.avg_pool2d(known[:, None].to(step.dtype), patch)[:, 0] == 1
    counted &= (step.abs() <= radius).all(dim=1) & (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    places = torch.arange(-radius, radius + 1, device=step.device, dtype=step.dtype)[:, None, None]
    share_x, share_y = ((1 - (step[:, axis, None] - places).abs()).clamp_min(0) for axis in (0, 1))
    wanted = (share_y[:, :, None] * share_x[:, None]).flatten(1, 2)
    entropy = -(wanted * (MATCHING_SCALE * correlation.float()).log_softmax(dim=1)).sum(dim=1)
    number = counted.sum(dim=(1, 2)).clamp_min(1)
    return torch.where(counted, entropy, 0.0).sum(dim=(1, 2)) / number
