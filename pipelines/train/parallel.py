"""Ranks: where a worker is, and how a recipe's module is replicated.

The only place that knows DistributedDataParallel; what is sharded instead is so already (`sharded.py`).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kinema.pipelines.train.batch_norm import synchronise_batch_norms
from kinema.pipelines.train.recipes.protocol import Batch, Loss, Recipe
from kinema.pipelines.train.sharded import whole_tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """One rank among `world_size`, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")


class LossModule(nn.Module):
    """The recipe's loss as a forward pass, so that wrappers see every use of the parameters."""

    def __init__(self, recipe: Recipe, module: nn.Module):
        super().__init__()
        self.recipe = recipe
        self.module = module

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss: Loss = self.recipe.loss(self.module, batch)
        return loss.value, loss.num_samples, loss.metrics


def replicate(recipe: Recipe, module: nn.Module, place: Place, sharded: bool = False) -> nn.Module:
    """The loss as a callable module whose gradients are averaged over ranks. Args: sharded, whether they are anyway."""
    loss_module = LossModule(recipe, module)
    if place.world_size == 1 or sharded:
        return loss_module
    ids = [place.device.index] if place.device.type == "cuda" else None
    synchronise_batch_norms(module)
    # Buffers stay as each rank has them: all ranks start from the same ones, and batch norms, which move theirs, see
    # the batches of all ranks.
    return DistributedDataParallel(loss_module, device_ids=ids, broadcast_buffers=False)


def without_sync(parallel: nn.Module, skip: bool) -> contextlib.AbstractContextManager[None]:
    """No gradient exchange in this backward pass (all but the last micro-batch of a step)."""
    return parallel.no_sync() if skip and isinstance(parallel, DistributedDataParallel) else contextlib.nullcontext()


def scale_gradients(module: nn.Module, factor: float) -> None:
    """Multiply every gradient."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, factor)


def gradient_norm(module: nn.Module) -> Tensor:
    """Euclidean norm over all gradients, scalar."""
    return whole_tensor(nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))


def module_tensors(module: nn.Module) -> Mapping[str, Tensor]:
    """The whole state dict, on every rank the same."""
    return module.state_dict()


def same_on_all_ranks(value: T, place: Place) -> T:
    """Rank 0's value."""
    if place.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python, numpy and torch for one optimizer step.

    Every step begins from a seed of its own, so a step's random numbers do not depend on what ran before it:
    resuming, losing a rank or changing their number needs no stored generator state.
    """
    words = np.random.SeedSequence([seed, step, rank]).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
    torch.manual_seed(int(words[2] >> np.uint64(1)))
