"""SEA-RAFT written plainly, as published: the yardstick of the benchmarks. It borrows our layers and nothing else.

Each pair on its own, maps in planar order: each image through the feature network, both through the context network, a
volume of all products sampled by `grid_sample`, and flow and mixture at full size after every step.

Source: Wang, Lipson and Deng, ECCV 2024, arXiv:2405.14793. Sides must be multiples of 8, at least 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kinema.models.flow.sea_raft.network import SEARAFT
from kinema.pipelines.bench.plain_raft import enlarged, grid, sampled, volumes


def plain_predictions(network: SEARAFT, image1: Tensor, image2: Tensor, iters: int) -> list[tuple[Tensor, Tensor]]:
    """Flow [B, 2, H, W] and mixture [B, 4, H, W], the regressed ones and those of each step; images in 0..1."""
    x1, x2 = 2 * image1 - 1, 2 * image2 - 1
    hidden, context = network.init_conv(network.cnet(torch.cat([x1, x2], dim=1))).chunk(2, dim=1)
    flow, info = network.flow_head(hidden).split([2, 4], dim=1)
    found = [_full_size(network, flow, info, hidden)]
    pyramid = volumes(network.fnet(x1), network.fnet(x2))
    start = grid(*flow.shape[-2:]).repeat(len(flow), 1, 1, 1)
    for _ in range(iters):
        hidden = network.update_block(hidden, context, sampled(pyramid, start + flow, network.radius), flow)
        increment, info = network.flow_head(hidden).split([2, 4], dim=1)
        flow = flow + increment
        found.append(_full_size(network, flow, info, hidden))
    return found


def _full_size(network: SEARAFT, flow: Tensor, info: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    logits = 0.25 * network.upsample_weight(hidden)
    return enlarged(8 * flow, logits), enlarged(info, logits)
