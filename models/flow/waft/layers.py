"""Parts of WAFT: the frozen depth network, the convolutional feature network, and the refinement transformer.

Attribute names are those of the published checkpoints. Some tensors of the checkpoints have no influence on the
flow (`unused_parameters` of the network names them); they are kept so that files load strictly.

Source: Wang and Deng, "WAFT: Warping-Alone Field Transforms for Optical Flow", arXiv:2506.21526; the depth network
is Depth Anything V2 (Yang et al., arXiv:2406.09414), its decoder DPT (Ranftl et al., arXiv:2103.13413).

Shape legend: B batch, H W image pixels, h w patch grid, F decoder width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.dpt import Fusion, tokens_to_map
from kinema.models.backbones.vision_transformer import Block, PatchEmbed, VisionTransformer, ViTConfig

DEPTH_PATCH, REFINE_PATCH = 14, 8
REFINE_TABLE_SIDE = 8


@dataclass(frozen=True)
class TransformerSize:
    """A vision transformer and the decoder behind it."""

    width: int
    """Channels of a token."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """Attention heads."""
    taps: tuple[int, int, int, int]
    """Blocks (0-based) whose tokens the decoder reads."""
    decoder: int
    """Channels of the decoder; what it gives has half as many."""
    levels: tuple[int, int, int, int]
    """Channels of the reassembled maps, finest first."""


SIZES: dict[str, TransformerSize] = {
    "vitt": TransformerSize(192, 12, 3, (2, 5, 8, 11), 32, (24, 48, 96, 192)),
    "vits": TransformerSize(384, 12, 6, (2, 5, 8, 11), 64, (48, 96, 192, 384)),
    "vitb": TransformerSize(768, 12, 12, (2, 5, 8, 11), 128, (96, 192, 384, 768)),
    "vitl": TransformerSize(1024, 24, 16, (4, 11, 17, 23), 256, (256, 512, 1024, 1024)),
}


def _depth_config(size: TransformerSize) -> ViTConfig:
    """DINOv2 as Depth Anything V2 fine-tuned it."""
    return ViTConfig(
        patch_size=DEPTH_PATCH,
        width=size.width,
        depth=size.depth,
        num_heads=size.num_heads,
        positions="offset_table",
        table_side=37,
        layer_scale=True,
        mask_token=True,
        floor_grid=False,
    )


class _Scratch(nn.Module):
    """The part of the decoder behind the reassembled maps; a class of its own for its state-dict names."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        width = size.decoder
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(level, width, 3, padding=1, bias=False) for level in size.levels
        )
        self.refinenet1, self.refinenet2, self.refinenet3, self.refinenet4 = (
            Fusion(width, rectified_skip=False, out_conv=True) for _ in range(4)
        )
        self.output_conv1 = nn.Conv2d(width, width // 2, 3, padding=1)
        # Depth Anything's last convolutions, to one channel of depth: stored, never run.
        self.output_conv2 = nn.Sequential(nn.Conv2d(width // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1))


class DepthDecoder(nn.Module):
    """DPT as Depth Anything V2 has it: four token maps to one map at half the decoder's width."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.projects = nn.ModuleList(nn.Conv2d(size.width, level, 1) for level in size.levels)
        first, second, _, last = size.levels
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(last, last, 3, stride=2, padding=1),
            ]
        )
        self.scratch = _Scratch(size)

    def forward(self, tokens: Sequence[Float[Tensor, "B N D"]], grid: tuple[int, int]) -> Float[Tensor, "B F H W"]:
        """The map at 14 pixels a patch, whatever the patch size: the decoder knows Depth Anything's only."""
        fused = self.fused(tokens, grid)
        size = (DEPTH_PATCH * grid[0], DEPTH_PATCH * grid[1])
        return F.interpolate(self.scratch.output_conv1(fused), size=size, mode="bilinear", align_corners=True)

    def fused(self, tokens: Sequence[Float[Tensor, "B N D"]], grid: tuple[int, int]) -> Float[Tensor, "B F h8 w8"]:
        """All levels fused, at 8 pixels a patch."""
        scratch = self.scratch
        levels = []
        for number, part in enumerate(tokens):
            level = self.resize_layers[number](self.projects[number](tokens_to_map(part, grid)))
            levels.append(getattr(scratch, f"layer{number + 1}_rn")(level))
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        x = scratch.refinenet4(levels[3], None, sizes[2])
        x = scratch.refinenet3(x, levels[2], sizes[1])
        x = scratch.refinenet2(x, levels[1], sizes[0])
        return scratch.refinenet1(x, levels[0], (2 * sizes[0][0], 2 * sizes[0][1]))


class DepthNetwork(nn.Module):
    """Depth Anything V2 up to the map before depth itself; frozen, and never recorded for gradients."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.size = size
        self.pretrained = VisionTransformer(_depth_config(size))
        self.depth_head = DepthDecoder(size)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F H W"]:
        """Features at the size of the images, whose sides are multiples of 14."""
        grid = self.pretrained.grid(images.shape[-2], images.shape[-1])
        tokens = self.pretrained.tokens(images, self.size.taps)
        return self.depth_head([self.pretrained.norm(part) for part in tokens], grid)


class DepthFeatures(nn.Module):
    """Holds the depth network under its published name."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.depth_anything = DepthNetwork(size)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F H W"]:
        return self.depth_anything(images)


class PreActivatedBlock(nn.Module):
    """GELU before each of two convolutions, added to the (strided, widened) input."""

    def __init__(self, in_channels: int, channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.GELU(),
            nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        changes = in_channels != channels or stride != 1
        self.skip_conv = nn.Conv2d(in_channels, channels, 1, stride) if changes else nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.conv(x) + self.skip_conv(x)


class ResNetBlock(nn.Module):
    """Basic block of ResNet-18: convolutions without bias, batch norms."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        skip = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn2(self.conv2(y)) + skip, inplace=True)


class FeatureNetwork(nn.Module):
    """ResNet-18 down to 1/16 and back up to half of the image, with the stages added on the way."""

    channels = 64

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.ds1 = PreActivatedBlock(in_channels, 64, kernel=7, stride=2)
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Sequential(ResNetBlock(before, width, 1 if before == width else 2), ResNetBlock(width, width, 1))
            for before, width in ((64, 64), (64, 128), (128, 256), (256, 512))
        )
        self.up_4 = nn.ConvTranspose2d(512, 256, 2, stride=2)
        self.proj_3 = PreActivatedBlock(256, 256)
        self.up_3 = nn.ConvTranspose2d(256, 128, 2, stride=2)
        self.proj_2 = PreActivatedBlock(128, 128)
        self.up_2 = nn.ConvTranspose2d(128, 64, 2, stride=2)
        self.proj_1 = PreActivatedBlock(64, self.channels)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 64 h w"]:
        stage1 = self.conv1(self.ds1(x))
        stage2 = self.conv2(stage1)
        stage3 = self.conv3(stage2)
        x = self.proj_3(stage3 + self.up_4(self.conv4(stage3)))
        x = self.proj_2(stage2 + self.up_3(x))
        return self.proj_1(stage1 + self.up_2(x))


class RefinementNetwork(nn.Module):
    """The vision transformer that is run in every iteration, on patches of 8x8 cells of the half-size map.

    Unlike our backbones it has no class token, no final norm, and patches of features rather than of colours.
    """

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.size = size
        config = ViTConfig(REFINE_PATCH, size.width, size.depth, size.num_heads, "offset_table", REFINE_TABLE_SIDE)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, REFINE_TABLE_SIDE**2, size.width))
        self.blks = nn.ModuleList(Block(config) for _ in range(size.depth))
        self.patch_embed = PatchEmbed(REFINE_PATCH, size.width, in_channels=size.decoder)
        self.dpt_head = DepthDecoder(size)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        """Half as many channels at the same size."""
        grid = (x.shape[-2] // REFINE_PATCH, x.shape[-1] // REFINE_PATCH)
        tokens = self.patch_embed(x) + self.position_table(grid)
        taps = []
        for index, block in enumerate(self.blks):
            tokens = block(tokens)
            if index in self.size.taps:
                taps.append(tokens)
        # As published: the decoder's map is at 14 pixels a patch and brought back, which changes its values.
        return F.interpolate(self.dpt_head(taps, grid), size=x.shape[-2:], mode="bilinear", align_corners=True)

    def position_table(self, grid: tuple[int, int]) -> Float[Tensor, "1 N D"]:
        """Positions of a grid (rows, columns): the learnt table resized bicubically."""
        side = REFINE_TABLE_SIDE
        if grid == (side, side):
            return self.pos_embed
        table = self.pos_embed.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        table = F.interpolate(table, scale_factor=(grid[0] / side, grid[1] / side), mode="bicubic")
        return table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
