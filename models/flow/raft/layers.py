"""Encoders and update blocks of RAFT and RAFT-small.

Attribute names are those of the published checkpoints. Shapes: B batch, H W map at 1/8 of the image.

Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020,
arXiv:2003.12039, section 3 and appendix A.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinema.kernels.convex_upsampling import convex_upsample

Norm = Literal["instance", "batch", "none"]


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "instance":
        # Not the faster group norm with one channel per group: its rounding differs from the published
        # network's enough to move the error of ill-conditioned pairs (KITTI) by 0.006 px.
        return nn.InstanceNorm2d(channels)
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()


def name_twice(state: dict[str, Tensor], module: nn.Module, prefix1: str, prefix2: str) -> None:
    """Gives a module's tensors, which `state` holds under one of two prefixes, both names."""
    for name in module.state_dict():
        for missing, present in ((prefix1 + name, prefix2 + name), (prefix2 + name, prefix1 + name)):
            if missing not in state and present in state:
                state[missing] = state[present]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with norms, added to the (strided) input."""

    def __init__(self, in_channels: int, channels: int, norm: Norm, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = _norm(norm, channels)
        self.norm2 = _norm(norm, channels)
        self.downsample = None
        if stride != 1:
            # The same norm is registered under two names: the checkpoints hold both.
            self.norm3 = _norm(norm, channels)
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride), self.norm3)

    def adapt_state_dict(self, state: dict[str, Tensor], prefix: str) -> None:
        """Fills in the other name of the shared norm, which safetensors files leave out."""
        if self.downsample is not None:
            name_twice(state, self.norm3, f"{prefix}norm3.", f"{prefix}downsample.1.")

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        return F.relu((x if self.downsample is None else self.downsample(x)) + y, inplace=True)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions through a quarter of the channels, added to the (strided) input."""

    def __init__(self, in_channels: int, channels: int, norm: Norm, stride: int) -> None:
        super().__init__()
        inner = channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1)
        self.conv3 = nn.Conv2d(inner, channels, 1)
        self.norm1 = _norm(norm, inner)
        self.norm2 = _norm(norm, inner)
        self.norm3 = _norm(norm, channels)
        self.downsample = None
        if stride != 1:
            self.norm4 = _norm(norm, channels)
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride), self.norm4)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = F.relu(self.norm3(self.conv3(y)), inplace=True)
        return F.relu((x if self.downsample is None else self.downsample(x)) + y, inplace=True)


class Encoder(nn.Module):
    """Image in -1..1 to a feature map at 1/8 of its size."""

    def __init__(
        self,
        block: type[ResidualBlock] | type[BottleneckBlock],
        channels: tuple[int, int, int],
        out_channels: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.norm1 = _norm(norm, channels[0])
        self.conv1 = nn.Conv2d(3, channels[0], 7, 2, padding=3)
        self.layer1 = nn.Sequential(block(channels[0], channels[0], norm, 1), block(channels[0], channels[0], norm, 1))
        self.layer2 = nn.Sequential(block(channels[0], channels[1], norm, 2), block(channels[1], channels[1], norm, 1))
        self.layer3 = nn.Sequential(block(channels[1], channels[2], norm, 2), block(channels[2], channels[2], norm, 1))
        self.conv2 = nn.Conv2d(channels[2], out_channels, 1)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        x = F.relu(self.norm1(self.conv1(images)), inplace=True)
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class FlowHead(nn.Module):
    """Hidden state to a flow increment, in pixels of the map."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, hidden: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 2 H W"]:
        return self.conv2(F.relu(self.conv1(hidden)))


class MotionEncoder(nn.Module):
    """Looked-up correlations and the current flow to motion features; the flow is appended as it is."""

    def __init__(self, lookup_channels: int) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(lookup_channels, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
        self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(64 + 192, 128 - 2, 3, padding=1)

    def forward(
        self, flow: Float[Tensor, "B 2 H W"], correlation: Float[Tensor, "B P H W"]
    ) -> Float[Tensor, "B 128 H W"]:
        correlation = F.relu(self.convc2(F.relu(self.convc1(correlation))))
        motion = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([correlation, motion], 1))), flow], 1)


class SmallMotionEncoder(nn.Module):
    """`MotionEncoder` of RAFT-small: one convolution fewer, narrower."""

    def __init__(self, lookup_channels: int) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(lookup_channels, 96, 1)
        self.convf1 = nn.Conv2d(2, 64, 7, padding=3)
        self.convf2 = nn.Conv2d(64, 32, 3, padding=1)
        self.conv = nn.Conv2d(128, 80, 3, padding=1)

    def forward(
        self, flow: Float[Tensor, "B 2 H W"], correlation: Float[Tensor, "B P H W"]
    ) -> Float[Tensor, "B 82 H W"]:
        correlation = F.relu(self.convc1(correlation))
        motion = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([correlation, motion], 1))), flow], 1)


class ContextGRU(nn.Module):
    """Convolutional GRU whose input is [context, motion], with the context's share computed once.

    The context does not change over the refinement steps, so its part of the gate convolutions is
    linear algebra done before the loop (`prepare`). One pass for each entry of `suffixes`: RAFT-small
    has a single 3x3 pass, RAFT a horizontal 1x5 and then a vertical 5x1 pass.
    """

    def __init__(
        self,
        hidden_channels: int,
        context_channels: int,
        motion_channels: int,
        passes: dict[str, tuple[int, int]],
    ) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.context_channels = context_channels
        self.suffixes = tuple(passes)
        in_channels = hidden_channels + context_channels + motion_channels
        for suffix, kernel in passes.items():
            for gate in "zrq":
                padding = (kernel[0] // 2, kernel[1] // 2)
                conv = nn.Conv2d(in_channels, hidden_channels, kernel, padding=padding)
                self.add_module(f"conv{gate}{suffix}", conv)

    def prepare(self, context: Float[Tensor, "B C H W"]) -> list["PreparedPass"]:
        """The gates of each pass with weights split and the context's contribution filled in."""
        return [
            PreparedPass([getattr(self, f"conv{gate}{suffix}") for gate in "zrq"], context) for suffix in self.suffixes
        ]


class PreparedPass:
    """One GRU pass for a fixed context: update z and reset r in one convolution, candidate q in another."""

    def __init__(self, convs: list[nn.Conv2d], context: Float[Tensor, "B C H W"]) -> None:
        channels = convs[0].out_channels
        first, last = channels, channels + context.shape[1]
        self.padding = convs[0].padding
        weight = torch.cat([conv.weight for conv in convs])  # [3 hidden, hidden + context + motion, k, k]
        bias = torch.cat([conv.bias for conv in convs if conv.bias is not None])
        shares = F.conv2d(context, weight[:, first:last], bias, padding=self.padding)
        self.context_zr, self.context_q = shares.split([2 * channels, channels], dim=1)
        variable = torch.cat([weight[:, :first], weight[:, last:]], dim=1)
        variable = variable.contiguous(memory_format=torch.channels_last)
        self.weight_zr, self.weight_q = variable.split([2 * channels, channels])

    def step(self, hidden: Float[Tensor, "B D H W"], motion: Float[Tensor, "B M H W"]) -> Float[Tensor, "B D H W"]:
        """The next hidden state."""
        inputs = torch.cat([hidden, motion], 1)
        gates = torch.sigmoid(F.conv2d(inputs, self.weight_zr, padding=self.padding) + self.context_zr)
        z, r = gates.chunk(2, dim=1)
        inputs = torch.cat([r * hidden, motion], 1)
        q = torch.tanh(F.conv2d(inputs, self.weight_q, padding=self.padding) + self.context_q)
        return torch.lerp(hidden, q.type_as(hidden), z.type_as(hidden))  # they differ under autocast


class UpdateBlock(nn.Module):
    """One refinement step of RAFT: motion features, separable GRU, flow increment, upsampling mask."""

    hidden_channels, context_channels = 128, 128

    def __init__(self, lookup_channels: int) -> None:
        super().__init__()
        self.encoder = MotionEncoder(lookup_channels)
        self.gru = ContextGRU(128, 128, 128, {"1": (1, 5), "2": (5, 1)})
        self.flow_head = FlowHead(128, 256)
        self.mask = nn.Sequential(nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64 * 9, 1))

    def upsample(self, flow: Float[Tensor, "B 2 H W"], hidden: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 2 H8 W8"]:
        """Flow at 8 times the size, in pixels there: convex combinations of 3x3 coarse neighbours.

        Neighbours outside the map count as zero flow; the mask's logits are scaled by 0.25.
        """
        return convex_upsample(8.0 * flow, self.mask(hidden), 0.25)


class SmallUpdateBlock(nn.Module):
    """One refinement step of RAFT-small: plain 3x3 GRU and no upsampling mask."""

    hidden_channels, context_channels = 96, 64

    def __init__(self, lookup_channels: int) -> None:
        super().__init__()
        self.encoder = SmallMotionEncoder(lookup_channels)
        self.gru = ContextGRU(96, 64, 82, {"": (3, 3)})
        self.flow_head = FlowHead(96, 128)

    def upsample(self, flow: Float[Tensor, "B 2 H W"], hidden: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 2 H8 W8"]:
        """Flow at 8 times the size, in pixels there: bilinear with aligned corners, as published."""
        return 8.0 * F.interpolate(flow, scale_factor=8, mode="bilinear", align_corners=True)
