"""AdamW and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from kinema.configs import TrainConfig

POLY_POWER = 0.9


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (0-based); a pure function, so there is no schedule to restore.

    Linear warm-up to `lr` over `warmup_steps`, then the schedule from `lr` down to `min_lr` at the last step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(config.steps - config.warmup_steps - 1, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "poly": (1 - progress) ** POLY_POWER,
        "linear": 1 - progress,
    }[config.schedule]
    return config.min_lr + (config.lr - config.min_lr) * remaining


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that ask for gradients, in the fused form (it exists on CPU and CUDA).

    Raises: ValueError if nothing asks for gradients.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad: nothing to train")
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
