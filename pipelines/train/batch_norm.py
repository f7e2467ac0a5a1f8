"""Batch norms that see the batches of all ranks.

On a GPU this is torch's SyncBatchNorm, which takes no CPU tensors; on a CPU the same statistics are exchanged through
gloo. Either way a model's numbers do not depend on how many ranks share a batch, and every rank keeps the same running
statistics, so that the checkpoint of the first is that of all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


class _SumOfRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, to each of them; a rank's part is in every rank's result, so in the backward
    the gradients of all are summed too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        whole = gradient.contiguous().clone()
        dist.all_reduce(whole)
        return whole


class RankBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose batch is that of all ranks; parameters and state-dict keys are the same."""

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if not self.training or not (dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        x = input.float()
        pixels = x.new_full((1,), x.numel() / x.shape[1])
        sums = _SumOfRanks.apply(torch.cat([x.sum(dim=(0, 2, 3)), pixels]))
        number, mean = sums[-1], sums[:-1] / sums[-1]
        # Centred before squaring: the difference of large sums would lose what matters.
        centred = x - mean[:, None, None]
        variance = _SumOfRanks.apply(centred.square().sum(dim=(0, 2, 3))) / number
        self._follow(mean.detach(), (variance * (number / (number - 1).clamp_min(1))).detach())
        out = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            out = out * self.weight[:, None, None] + self.bias[:, None, None]
        return out.to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def synchronise_batch_norms(module: nn.Module) -> nn.Module:
    """Make every batch norm inside `module` one of all ranks, in place; its tensors stay the same."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                on_gpu = any(t.is_cuda for t in (*child.parameters(), *child.buffers()))
                parent.add_module(name, nn.SyncBatchNorm.convert_sync_batchnorm(child) if on_gpu else _of_ranks(child))
    return module


def _of_ranks(norm: nn.BatchNorm2d) -> RankBatchNorm2d:
    made = RankBatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    for name, parameter in norm.named_parameters():
        made.register_parameter(name, parameter)
    for name, buffer in norm.named_buffers():
        made.register_buffer(name, buffer)
    return made.train(norm.training)
