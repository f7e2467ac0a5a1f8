"""What a training step of DisMo says about itself: loss by noise level, and whether the embeddings still differ."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kinema.models.dismo.model import TrainingLoss

NUM_BINS = 4


def draw_noise_shares(count: int, device: torch.device, shift: float = 0.0) -> Float[Tensor, "N"]:
    """Shares of noise t = sigmoid(N(shift, 1)), one from each of `count` equally likely ranges, in random order.

    With shift 0 each is distributed as published; together they cover all noise levels evenly, in batches of any size.
    """
    ranks = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
    return (torch.special.ndtri(ranks.clamp(1e-6, 1 - 1e-6)) + shift).sigmoid()


def step_metrics(
    result: TrainingLoss, t: Float[Tensor, "N"], collapse_spread: float, shift: float = 0.0
) -> dict[str, Tensor]:
    """Scalars of a step.

    loss_t1 .. loss_t4: mean loss of the pairs in each quarter of the noise levels, least noise first; where a quarter
    has no pair, that of all. motion_std_batch, motion_std_video: as the published code logs them. motion_norm: length
    of an embedding. motion_spread: see `spread`; collapsed: 1 where it is below `collapse_spread`.
    """
    per_sample, motion = result.per_sample.detach(), result.motion.detach().float()
    metrics = {}
    bins = (torch.special.ndtr(torch.logit(t.float()) - shift) * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    for number in range(NUM_BINS):
        members = (bins == number).float()
        count = members.sum()
        mean = (per_sample * members).sum() / count.clamp(min=1)
        metrics[f"loss_t{number + 1}"] = torch.where(count > 0, mean, per_sample.mean())
    metrics["motion_norm"] = motion.norm(dim=-1).mean()
    if motion.shape[1] * motion.shape[0] * motion.shape[2] > 1:
        metrics["motion_std_batch"] = result.motion_std_batch.detach()
        metrics["motion_std_video"] = result.motion_std_video.detach()
    metrics["motion_spread"] = spread(motion)
    metrics["collapsed"] = (metrics["motion_spread"] < collapse_spread).float()
    return metrics


def spread(motion: Float[Tensor, "B P d"]) -> Float[Tensor, ""]:
    """Deviation of embeddings from their mean over clips, relative to their size: 0 when all are alike, at most 1.

    Of a single clip: deviation over time.
    """
    over = 0 if len(motion) > 1 else 1
    deviation = (motion - motion.mean(dim=over, keepdim=True)).square().mean()
    return (deviation / motion.square().mean().clamp(min=1e-12)).sqrt()
