"""Layers of AllTracker: the ConvNeXt encoder and the update block over space and time.

Names follow the published checkpoints. Shapes: B frames (of all clips, time fastest), H W map at 1/8 of the image.

Source: Harley et al., "AllTracker: Efficient Dense Point Tracking at High Resolution", ICCV 2025, arXiv:2506.07310;
the encoder is ConvNeXt-Tiny (Liu et al., arXiv:2201.03545) without its last stage.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.inference_linear import Linear
from kinema.models.tracks.cotracker3.layers import SelfBlock, by_rows

CHANNELS = 128
"""Channels of the state, of the context and of the motion code."""


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Depthwise 7x7 convolution and a two-layer network per pixel, scaled per channel and added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Numbered as in the checkpoints, where steps without weights have numbers too.
        self.block = nn.ModuleDict(
            {
                "0": nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
                "2": nn.LayerNorm(channels, eps=1e-6),
                "3": Linear(channels, 4 * channels),
                "5": Linear(4 * channels, channels),
            }
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-6))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        y = self.block["2"](self.block["0"](x).permute(0, 2, 3, 1))  # [B, H, W, C]
        y = self.block["5"](F.gelu(self.block["3"](y)))
        return x + self.layer_scale * y.permute(0, 3, 1, 2)


class ConvNextEncoder(nn.Module):
    """Normalised images to a map of 384 channels at 1/8 of their size."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 96, 4, stride=4), MapNorm(96)),
            _stage(96, 3),
            nn.Sequential(MapNorm(96), nn.Conv2d(96, 192, 2, stride=2)),
            _stage(192, 3),
            # Where ConvNeXt goes on to 1/16, this network stays and spreads its kernel instead.
            nn.Sequential(MapNorm(192), nn.Conv2d(192, 384, 3, padding=2, dilation=2)),
            _stage(384, 9),
        )

    def forward(self, images: Float[Tensor, "B 3 Hi Wi"]) -> Float[Tensor, "B 384 H W"]:
        return self.features(images)


def _stage(channels: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(ConvNextBlock(channels) for _ in range(depth)))


class MotionEncoder(nn.Module):
    """Looked-up correlations and the current flow to a motion code; the flow is appended as it is."""

    def __init__(self, lookup_channels: int) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(lookup_channels, 4 * CHANNELS, 1)
        self.convc2 = nn.Conv2d(4 * CHANNELS, CHANNELS + CHANNELS // 2, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 2 * CHANNELS, 5, padding=2)
        self.convf2 = nn.Conv2d(2 * CHANNELS, CHANNELS // 2, 3, padding=1)
        self.conv = nn.Conv2d(2 * CHANNELS, CHANNELS - 2, 3, padding=1)

    def forward(
        self, flow: Float[Tensor, "B 2 H W"], correlation: Float[Tensor, "B P H W"]
    ) -> Float[Tensor, "B 128 H W"]:
        correlation = F.relu(self.convc2(F.relu(self.convc1(correlation))))
        motion = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([correlation, motion], 1))), flow], 1)


class TemporalBlock(nn.Module):
    """Each pixel attends over the frames of its window; the block's output is scaled and added to the input."""

    def __init__(self, channels: int, num_heads: int = 8) -> None:
        super().__init__()
        self.block = SelfBlock(channels, num_heads)
        self.layer_scale = nn.Parameter(torch.full((channels, 1), 1e-6))

    def forward(self, x: Float[Tensor, "B C H W"], num_frames: int) -> Float[Tensor, "B C H W"]:
        """x: `num_frames` frames of each clip, one after another."""
        rows = rearrange(x, "(b s) c h w -> (b h w) s c", s=num_frames)
        # The block has skips of its own inside, so the input counts twice.
        rows = rows + self.layer_scale[:, 0] * by_rows(self.block, [rows])
        return rearrange(rows, "(b h w) s c -> (b s) c h w", h=x.shape[-2], w=x.shape[-1])


class UpdateBlock(nn.Module):
    """One refinement: the state, told of context, motion and what is seen, mixed over time and space in turns."""

    def __init__(self, lookup_channels: int, num_blocks: int = 3) -> None:
        super().__init__()
        self.motion_encoder = MotionEncoder(lookup_channels)
        self.compressor = nn.Conv2d(3 * CHANNELS + 2, CHANNELS, 1)
        self.refine = nn.ModuleList(
            block(CHANNELS) for _ in range(num_blocks) for block in (TemporalBlock, ConvNextBlock)
        )
        self.final_conv = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(
        self,
        state: Float[Tensor, "B C H W"],
        context: Float[Tensor, "B C H W"],
        motion: Float[Tensor, "B C H W"],
        logits: Float[Tensor, "B 2 H W"],
        num_frames: int,
    ) -> Float[Tensor, "B C H W"]:
        """The next state. Args: motion, what `motion_encoder` gives; logits, of visible and of confident."""
        x = self.compressor(torch.cat([state, context, motion, logits], dim=1))
        for block in self.refine:
            x = block(x, num_frames) if isinstance(block, TemporalBlock) else frame_by_frame(block, x)
        return self.final_conv(x)


def frame_by_frame(block: nn.Module, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
    """`block(x)`; without gradient one frame at a time, so that inner layers are held for one frame only."""
    if torch.is_grad_enabled():
        return block(x)
    return torch.cat([block(frame) for frame in x.split(1)])
