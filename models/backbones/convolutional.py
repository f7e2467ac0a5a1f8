"""Small convolutional encoders that learn from scratch in minutes on a CPU: residual blocks, as a pyramid, or at a
quarter of the image behind the vision transformers' interface.

Source: He et al., Deep Residual Learning, CVPR 2016, with group normalisation (Wu and He, ECCV 2018), which knows no
difference between training and use and does not depend on the batch.

Shape legend: B batch, H W image pixels, N tokens (one of the whole image, then cells row-major), D width; map i of a
pyramid has ceil(H / 2^(i+2)) rows and widths[i] channels, i = 0..3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.training_conv import Conv2d

_GROUPS = 8


@dataclass(frozen=True)
class PyramidConfig:
    """Size of a pyramid encoder."""

    widths: tuple[int, int, int, int]
    """Channels of the maps at 1/4, 1/8, 1/16 and 1/32 of the image."""
    decoder_width: int
    """Channels of the decoder, and of the features."""
    patch_size: int = 4
    """Sides of images are best multiples of this: that of the finest map's cells."""
    positions: str = "none"
    """It knows no positions, so that any size will do."""


PYRAMIDS = {"conv_small": PyramidConfig((32, 64, 96, 128), 64)}


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3 around a skip; the first one may halve the map."""

    def __init__(self, width_in: int, width_out: int, stride: int = 1):
        super().__init__()
        self.conv1 = Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(_GROUPS, width_out)
        self.conv2 = Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, width_out)
        same = width_in == width_out and stride == 1
        self.skip = nn.Identity() if same else Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h2 w2"]:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.skip(x) + y)


class PyramidEncoder(nn.Module):
    """`encoder(x)` gives four maps, finest first. Input: RGB, normalised with ImageNet's mean and deviation.

    Args: image_size, (height, width), kept for those who ask; any size works.
    """

    def __init__(self, config: PyramidConfig, image_size: tuple[int, int] = (224, 224)):
        super().__init__()
        self.config, self.image_size, self.patch_size = config, image_size, config.patch_size
        half = config.widths[0] // 2
        self.stem = nn.Sequential(
            Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.GroupNorm(_GROUPS, half), nn.ReLU()
        )
        widths = (half, *config.widths)
        self.stages = nn.ModuleList(ResidualBlock(a, b, 2) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


@dataclass(frozen=True)
class CellConfig:
    """Size of a `CellEncoder`."""

    width: int
    """Token width D, a multiple of 16."""
    depth: int = 4
    """Residual blocks."""
    patch_size: int = 4
    """Side in pixels of what a token stands for."""
    mask_token: bool = False
    """It has none."""


class CellEncoder(nn.Module):
    """Tokens of cells of 4 x 4 pixels, each of which sees its surroundings from the first block on.

    A transformer's patches see themselves alone until attention has learned where to look, so that patches of 4 pixels
    of an untrained one cannot be told apart; cells can. Takes the place of a `VisionTransformer` in DinoFlow.

    Args: image_size, (height, width), kept for those who ask; any multiple of 4 works.
    """

    num_prefix_tokens = 1

    def __init__(self, config: CellConfig, image_size: tuple[int, int] = (224, 224)):
        super().__init__()
        self.config, self.image_size = config, image_size
        self.width, self.patch_size = config.width, config.patch_size
        half = config.width // 2
        self.stem = nn.Sequential(
            Conv2d(3, half, 5, stride=2, padding=2, bias=False), nn.GroupNorm(_GROUPS, half), nn.ReLU()
        )
        self.blocks = nn.ModuleList(
            ResidualBlock(half if i == 0 else config.width, config.width, 2 if i == 0 else 1)
            for i in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Cells of an image. Raises: ValueError for sides that are no multiples of 4."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image size {height}x{width}: both sides must be multiples of {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def tokens(self, x: Float[Tensor, "B 3 H W"], blocks: Sequence[int]) -> list[Float[Tensor, "B N D"]]:
        """Un-normed tokens after each of `blocks` (0-based); the first token is the mean of the others."""
        self.grid(*x.shape[-2:])
        taps, x = {}, self.stem(x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            cells = rearrange(x, "b d h w -> b (h w) d")
            taps[index] = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)
        return [taps[index] for index in blocks]

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Tokens of the last block through the layer norm."""
        return self.norm(self.tokens(x, [len(self.blocks) - 1])[0])
