"""Encoders and update block of SEA-RAFT.

Attribute names are those of the published checkpoints. Shapes: B batch, H W map at 1/8 of the image.

Source: Wang, Lipson and Deng, "SEA-RAFT: Simple, Efficient, Accurate RAFT for Optical Flow", ECCV 2024,
arXiv:2405.14793, section 3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.flow.raft.layers import MotionEncoder, name_twice

HIDDEN_CHANNELS = 128
"""Channels of the state, of the context and of the motion features."""


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions with batch norms, added to the (strided or widened) input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            # The same norm is registered under two names: the .pth checkpoints hold both.
            self.bn3 = nn.BatchNorm2d(channels)
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride), self.bn3)

    def adapt_state_dict(self, state: dict[str, Tensor], prefix: str) -> None:
        """Fills in the other name of the shared norm, which safetensors files leave out."""
        if self.downsample is not None:
            name_twice(state, self.bn3, f"{prefix}bn3.", f"{prefix}downsample.1.")

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu((x if self.downsample is None else self.downsample(x)) + y, inplace=True)


class ResNetEncoder(nn.Module):
    """The first three stages of a residual network: images in -1..1 to a map at 1/8 of their size.

    Args: depths, the number of blocks in each stage: (2, 2, 2) of ResNet-18, (3, 4, 6) of ResNet-34.
    """

    def __init__(self, in_channels: int, depths: tuple[int, int, int], out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, depths[0], stride=1)
        self.layer2 = _stage(64, 128, depths[1], stride=2)
        self.layer3 = _stage(128, 256, depths[2], stride=2)
        self.final_conv = nn.Conv2d(256, out_channels, 1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return self.final_conv(self.layer3(self.layer2(self.layer1(x))))


def _stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    first = ResNetBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(ResNetBlock(channels, channels, 1) for _ in range(depth - 1)))


class ConvNextBlock(nn.Module):
    """Depthwise 7x7 convolution and a two-layer network per pixel, added to the input; then a projection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(in_channels, in_channels, 7, padding=3, groups=in_channels)
        self.norm = nn.LayerNorm(in_channels, eps=1e-6)
        self.pwconv1 = nn.Linear(in_channels, 4 * out_channels)
        self.pwconv2 = nn.Linear(4 * out_channels, in_channels)
        self.gamma = nn.Parameter(torch.full((in_channels,), 1e-6))
        self.final = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # [B, H, W, C]
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return self.final(x + y.permute(0, 3, 1, 2))


class SeaRaftUpdateBlock(nn.Module):
    """One refinement step: motion features, then blocks that each replace the state."""

    def __init__(self, lookup_channels: int, num_blocks: int) -> None:
        super().__init__()
        self.encoder = MotionEncoder(lookup_channels)
        self.refine = nn.ModuleList(ConvNextBlock(3 * HIDDEN_CHANNELS, HIDDEN_CHANNELS) for _ in range(num_blocks))

    def forward(
        self,
        state: Float[Tensor, "B C H W"],
        context: Float[Tensor, "B C H W"],
        correlation: Float[Tensor, "B P H W"],
        flow: Float[Tensor, "B 2 H W"],
    ) -> Float[Tensor, "B C H W"]:
        motion = self.encoder(flow, correlation)
        for block in self.refine:
            state = block(torch.cat([state, context, motion], 1))
        return state
