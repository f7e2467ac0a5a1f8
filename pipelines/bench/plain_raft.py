"""RAFT written plainly, as published: the yardstick of the benchmarks. It borrows our parameters and nothing else.

Each pair on its own: both images through the encoder, the volume of all products pooled and sampled by `grid_sample`,
the GRU's convolutions over [hidden, context, motion], and a flow at full size after every iteration.

Source: Teed and Deng, ECCV 2020, arXiv:2003.12039. Sides must be multiples of 8, at least 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.models.flow.raft.layers import ContextGRU, UpdateBlock
from kinema.models.flow.raft.network import RAFT

NUM_LEVELS = 4


def plain_predictions(network: RAFT, image1: Tensor, image2: Tensor, iters: int) -> list[Tensor]:
    """[B, 2, H, W] after each iteration; images [B, 3, H, W] in 0..1."""
    block, x1, x2 = network.update_block, 2 * image1 - 1, 2 * image2 - 1
    fmap1, fmap2 = network.fnet(torch.cat([x1, x2])).chunk(2)
    pyramid = volumes(fmap1, fmap2)
    hidden, context = network.cnet(x1).split([block.hidden_channels, block.context_channels], dim=1)
    hidden, context = torch.tanh(hidden), torch.relu(context)
    start = grid(*fmap1.shape[-2:]).repeat(len(fmap1), 1, 1, 1)
    target, flows = start, []
    for _ in range(iters):
        motion = block.encoder(target - start, sampled(pyramid, target, network.radius))
        hidden = _gru(block.gru, hidden, torch.cat([context, motion], dim=1))
        target = target + block.flow_head(hidden)
        flows.append(_enlarge(network, target - start, hidden))
    return flows


def volumes(fmap1: Tensor, fmap2: Tensor) -> list[Tensor]:
    """All products, [B H W, 1, h, w] at each level."""
    B, C, H, W = fmap1.shape
    volume = (fmap1.flatten(2).transpose(1, 2) @ fmap2.flatten(2)) / C**0.5
    levels = [volume.view(B * H * W, 1, H, W)]
    for _ in range(NUM_LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1], 2, stride=2))
    return levels


def sampled(pyramid: list[Tensor], target: Tensor, radius: int) -> Tensor:
    """Every pixel's products are an image of their own, sampled on a grid of points; x is the outer axis."""
    B, _, H, W = target.shape
    steps = torch.arange(-radius, radius + 1.0)
    window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)
    centres = target.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    found = []
    for level, images in enumerate(pyramid):
        last = torch.tensor([images.shape[-1] - 1, images.shape[-2] - 1])
        grid = 2 * (centres / 2**level + window) / last - 1
        found.append(F.grid_sample(images, grid, align_corners=True).view(B, H, W, -1))
    return torch.cat(found, dim=-1).permute(0, 3, 1, 2).contiguous()


def _gru(gru: ContextGRU, hidden: Tensor, inputs: Tensor) -> Tensor:
    for suffix in gru.suffixes:
        convz, convr, convq = (getattr(gru, f"conv{gate}{suffix}") for gate in "zrq")
        joined = torch.cat([hidden, inputs], dim=1)
        z, r = torch.sigmoid(convz(joined)), torch.sigmoid(convr(joined))
        q = torch.tanh(convq(torch.cat([r * hidden, inputs], dim=1)))
        hidden = (1 - z) * hidden + z * q
    return hidden


def _enlarge(network: RAFT, flow: Tensor, hidden: Tensor) -> Tensor:
    B, _, H, W = flow.shape
    if not isinstance(network.update_block, UpdateBlock):
        return 8 * F.interpolate(flow, size=(8 * H, 8 * W), mode="bilinear", align_corners=True)
    return enlarged(8 * flow, 0.25 * network.update_block.mask(hidden))


def enlarged(maps: Tensor, logits: Tensor) -> Tensor:
    """[B, C, 8 H, 8 W]: each pixel a convex combination of 3x3 neighbours."""
    B, C, H, W = maps.shape
    weights = torch.softmax(logits.view(B, 1, 9, 8, 8, H, W), dim=2)
    around = F.unfold(maps, 3, padding=1).view(B, C, 9, 1, 1, H, W)
    return (weights * around).sum(dim=2).permute(0, 1, 4, 2, 5, 3).reshape(B, C, 8 * H, 8 * W)


def grid(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y]).float()
