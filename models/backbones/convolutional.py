"""A small convolutional encoder that learns from scratch in minutes on a CPU: a pyramid of residual blocks.

Source: He et al., Deep Residual Learning, CVPR 2016, with group normalisation (Wu and He, ECCV 2018), which knows no
difference between training and use and does not depend on the batch.

Shape legend: B batch, H W image pixels; map i has ceil(H / 2^(i+2)) rows and widths[i] channels, i = 0..3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(_GROUPS, width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, width_out)
        same = width_in == width_out and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1, stride, bias=False)

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
            nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.GroupNorm(_GROUPS, half), nn.ReLU()
        )
        widths = (half, *config.widths)
        self.stages = nn.ModuleList(ResidualBlock(a, b, 2) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
