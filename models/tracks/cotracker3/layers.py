"""Layers of CoTracker3: the frame encoder and the transformer over time and tracks.

Source: Karaev et al., "CoTracker3: Simpler and Better Point Tracking by Pseudo-Labelling Real Videos",
arXiv:2410.11831, section 3. Names follow the published checkpoints.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.inference_linear import Activation, Linear, linear
from kinema.models.flow.raft.layers import ResidualBlock

TOKENS_AT_ONCE_CPU, TOKENS_AT_ONCE_CUDA = 2**13, 2**17
"""Without gradient, blocks run on about this many tokens at a time, which bounds their hidden layers."""


class FrameEncoder(nn.Module):
    """Image to a feature map at 1/stride of its size, from four scales; CoTracker3's stride is 4, its range -1..1."""

    def __init__(self, out_channels: int = 128, stride: int = 4) -> None:
        super().__init__()
        self.stride = stride
        widths = (64, 96, 128, 128)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3)
        self.norm1 = nn.InstanceNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                ResidualBlock(before, width, "instance", 1 if scale == 0 else 2),
                ResidualBlock(width, width, "instance", 1),
            )
            for scale, (before, width) in enumerate(zip((64, *widths), widths, strict=False))
        )
        self.conv2 = nn.Conv2d(sum(widths), 2 * out_channels, 3, padding=1)
        self.norm2 = nn.InstanceNorm2d(2 * out_channels)
        self.conv3 = nn.Conv2d(2 * out_channels, out_channels, 1)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        size = (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        x = F.relu(self.norm1(self.conv1(images)), inplace=True)
        scales = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            scales.append(F.interpolate(x, size, mode="bilinear", align_corners=True))
        return self.conv3(F.relu(self.norm2(self.conv2(torch.cat(scales, dim=1))), inplace=True))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, exact or in its tanh form."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.fc1 = Linear(in_channels, hidden_channels)
        self.fc2 = Linear(hidden_channels, out_channels)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B D"]:
        return self.fc2(linear(x, self.fc1.weight, self.fc1.bias, self.activation))


class Attention(nn.Module):
    """Multi-head attention of x to a context, which may be x itself."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(width, width)
        self.to_kv = Linear(width, 2 * width)
        self.to_out = Linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B M D"]) -> Float[Tensor, "B N D"]:
        q = rearrange(self.to_q(x), "b n (heads e) -> b heads n e", heads=self.num_heads)
        k, v = rearrange(self.to_kv(context), "b m (two heads e) -> two b heads m e", two=2, heads=self.num_heads)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n e -> b n (heads e)"))


class SelfBlock(nn.Module):
    """Pre-norm block in which the tokens of a row attend to one another; its norms have no weights."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, 4 * width, width, "gelu_tanh")

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        normed = self.norm1(x)
        x = x + self.attn(normed, normed)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Pre-norm block in which x attends to a context; only the context's norm has weights, and another epsilon."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm_context = nn.LayerNorm(width, eps=1e-5)
        self.cross_attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, 4 * width, width, "gelu_tanh")

    def forward(self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B M D"]) -> Float[Tensor, "B N D"]:
        x = x + self.cross_attn(self.norm1(x), self.norm_context(context))
        return x + self.mlp(self.norm2(x))


class TrackTransformer(nn.Module):
    """Tokens of all tracks at all frames to updates of position, visibility and confidence.

    Tracks attend over time each on its own; they hear of one another at each frame through `num_virtual`
    learnt tracks, so that the cost grows linearly with the number of tracks.
    """

    def __init__(
        self,
        in_channels: int = 1110,
        width: int = 384,
        num_heads: int = 8,
        depth: int = 3,
        num_virtual: int = 64,
    ) -> None:
        super().__init__()
        # Misspelt in the published checkpoints.
        self.virual_tracks = nn.Parameter(torch.randn(1, num_virtual, 1, width))
        self.input_transform = Linear(in_channels, width)
        self.flow_head = Linear(width, 2)
        self.vis_conf_head = Linear(width, 2)
        self.time_blocks = nn.ModuleList(SelfBlock(width, num_heads) for _ in range(depth))
        self.space_virtual_blocks = nn.ModuleList(SelfBlock(width, num_heads) for _ in range(depth))
        self.space_point2virtual_blocks = nn.ModuleList(CrossBlock(width, num_heads) for _ in range(depth))
        self.space_virtual2point_blocks = nn.ModuleList(CrossBlock(width, num_heads) for _ in range(depth))

    def forward(self, inputs: Float[Tensor, "B N T C"]) -> Float[Tensor, "B N T 4"]:
        """Updates: x and y in cells of the feature map, visibility and confidence logits."""
        B, N, T, _ = inputs.shape
        points = self.input_transform(inputs)
        tokens = torch.cat([points, self.virual_tracks.expand(B, -1, T, -1)], dim=1)  # [B, N + V, T, D]
        blocks = zip(
            self.time_blocks,
            self.space_virtual2point_blocks,
            self.space_virtual_blocks,
            self.space_point2virtual_blocks,
            strict=True,
        )
        for over_time, virtual_from_points, among_virtual, points_from_virtual in blocks:
            tokens = by_rows(over_time, [rearrange(tokens, "b n t d -> (b n) t d")])
            frames = rearrange(tokens, "(b n) t d -> (b t) n d", b=B)
            points, virtual = frames[:, :N], frames[:, N:]
            virtual = among_virtual(by_rows(virtual_from_points, [virtual, points]))
            points = by_rows(points_from_virtual, [points, virtual])
            tokens = rearrange(torch.cat([points, virtual], dim=1), "(b t) n d -> b n t d", b=B)
        points = tokens[:, :N]
        return torch.cat([self.flow_head(points), self.vis_conf_head(points)], dim=-1)


def by_rows(block: Callable[..., Tensor], inputs: Sequence[Float[Tensor, "B _ D"]]) -> Float[Tensor, "B N D"]:
    """`block(*inputs)`, for a few rows of the batch at a time where memory would grow with their number."""
    limit = TOKENS_AT_ONCE_CUDA if inputs[0].is_cuda else TOKENS_AT_ONCE_CPU
    rows = max(limit // max(x.shape[1] for x in inputs), 1)
    if rows >= inputs[0].shape[0] or torch.is_grad_enabled():
        return block(*inputs)
    return torch.cat([block(*parts) for parts in zip(*(x.split(rows) for x in inputs), strict=True)])
