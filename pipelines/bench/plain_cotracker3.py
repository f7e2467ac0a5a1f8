"""CoTracker3 offline written plainly, as published: the yardstick of the benchmarks. It borrows our parameters.

All frames of a clip go through the encoder at once, in planar order; every refinement samples windows of features by
`grid_sample`, multiplies them with the query's, and passes all tokens through the transformer at once.

Source: Karaev et al., arXiv:2410.11831.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.backbones.inference_linear import Linear
from kinema.models.tracks.cotracker3.correlation import NUM_LEVELS, RADIUS, STRIDE, WINDOW
from kinema.models.tracks.cotracker3.layers import Attention, Mlp
from kinema.models.tracks.cotracker3.network import CoTracker3, PointTracks, TrackState


def plain(network: CoTracker3) -> CoTracker3:
    """A copy whose linear layers, MLPs and attention are PyTorch's own; for `plain_tracks`."""
    network = copy.deepcopy(network)
    kinds: tuple[tuple[type, type], ...] = ((Linear, nn.Linear), (Mlp, _PlainMlp), (Attention, _PlainAttention))
    for module in network.modules():
        for kind, plain_kind in kinds:
            if type(module) is kind:
                module.__class__ = plain_kind
    return network


def plain_tracks(network: CoTracker3, video: Tensor, queries: Tensor, iters: int) -> PointTracks:
    """Tracks of queries [1, N, 3] (t, x, y) through a clip [1, T, 3, H, W] in 0..255, by a `plain` network."""
    T, N = video.shape[1], queries.shape[1]
    levels = [F.normalize(network.fnet(2 * (video[0] / 255) - 1), dim=1, eps=1e-6)]  # [T, C, h, w]
    for _ in range(NUM_LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    start = queries[0, :, 1:] / STRIDE
    frames = queries[0, :, 0].long()
    templates = [
        _windows(level[frames], start[:, None] / 2**k)[:, :, 0].flatten(2) for k, level in enumerate(levels)
    ]  # [N, C, 49]
    xy, visibility, confidence = start[:, None].repeat(1, T, 1), torch.zeros(N, T), torch.zeros(N, T)
    for _ in range(iters):
        codes = []
        for k, level in enumerate(levels):
            found = _windows(level, xy.transpose(0, 1) / 2**k).flatten(3)  # [T, C, N, 49]
            products = torch.einsum("tcnw,ncv->ntwv", found, templates[k])
            codes.append(network.corr_mlp(products.flatten(2)))
        motion = network._motion(xy[None])[0]
        inputs = torch.cat([visibility[..., None], confidence[..., None], *codes, motion], dim=-1)
        dx, dy, more_visible, surer = _transformed(network, inputs + network.times(T)).unbind(-1)
        xy, visibility, confidence = xy + torch.stack([dx, dy], dim=-1), visibility + more_visible, confidence + surer
    return TrackState(xy[None], visibility[None], confidence[None]).published()


def _windows(maps: Tensor, xy: Tensor) -> Tensor:
    """[B, C, P, 7, 7] around positions [B, P, 2] in cells of maps [B, C, h, w]; x is the outer axis."""
    steps = torch.arange(-RADIUS, RADIUS + 1.0)
    window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).flatten(0, 1)
    last = torch.tensor([maps.shape[-1] - 1, maps.shape[-2] - 1])
    points = 2 * (xy[:, :, None] + window) / last - 1  # [B, P, 49, 2]
    return F.grid_sample(maps, points, align_corners=True, padding_mode="border").unflatten(3, (WINDOW, WINDOW))


def _transformed(network: CoTracker3, inputs: Tensor) -> Tensor:
    """Updates [N, T, 4] of tokens [N, T, C]."""
    former = network.updateformer
    N, T, _ = inputs.shape
    tokens = torch.cat([former.input_transform(inputs), former.virual_tracks[0].expand(-1, T, -1)])
    blocks = zip(
        former.time_blocks,
        former.space_virtual2point_blocks,
        former.space_virtual_blocks,
        former.space_point2virtual_blocks,
        strict=True,
    )
    for over_time, virtual_from_points, among_virtual, points_from_virtual in blocks:
        at_frames = over_time(tokens).transpose(0, 1)  # [T, N + V, D]
        points, virtual = at_frames[:, :N], at_frames[:, N:]
        virtual = among_virtual(virtual_from_points(virtual, points))
        tokens = torch.cat([points_from_virtual(points, virtual), virtual], dim=1).transpose(0, 1)
    return torch.cat([former.flow_head(tokens[:N]), former.vis_conf_head(tokens[:N])], dim=-1)


class _PlainMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.fc2(F.gelu(self.fc1(x), approximate=approximate))


class _PlainAttention(Attention):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.to_q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.to_kv(context).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))
