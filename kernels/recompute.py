"""Elementwise work whose intermediate results a backward pass makes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def made_again(work: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """work(x, *others), whose intermediate results are made again in the backward pass instead of being kept.

    A matrix product at the end of the work is not computed again, only its input is. On a CPU, where fresh memory costs
    time too; on other devices nothing was measured, and nothing changes.
    """
    if not torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return work(x, *others)
    made: Tensor = checkpoint(work, x, *others, use_reentrant=False, preserve_rng_state=False)
    return made
