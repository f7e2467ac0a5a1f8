"""Dense prediction decoder: four token maps of a vision transformer to one map at image size.

Source: Ranftl, Bochkovskiy, Koltun, Vision Transformers for Dense Prediction, arXiv:2103.13413, with the
details of the decoder that FlowFeat was published with. Deviation: patch grids with odd sides work.

Shape legend: B batch, C token width, F decoder width, h w patch grid, H W image pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.inference_linear import linear
from kinema.models.backbones.training_conv import Conv2d, ConvTranspose2d


class ResidualUnit(nn.Module):
    """Two convolutions around a skip.

    The unit that FlowFeat was published with rectifies its input in place, so that the skip carries relu(x), not x;
    the released weights were trained with that. Depth Anything's unit, which WAFT has, leaves x alone.
    """

    def __init__(self, width: int, rectified_skip: bool = True):
        super().__init__()
        self.rectified_skip = rectified_skip
        self.conv1 = Conv2d(width, width, 3, padding=1)
        self.conv2 = Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "B F h w"]) -> Float[Tensor, "B F h w"]:
        rectified = F.relu(x)
        skip = rectified if self.rectified_skip else x
        return skip + self.conv2(F.relu(self.conv1(rectified)))


class Fusion(nn.Module):
    """Adds a finer map to the running one, refines it and enlarges it; `out_conv` then mixes the channels."""

    def __init__(self, width: int, rectified_skip: bool = True, out_conv: bool = False):
        super().__init__()
        self.out_conv = Conv2d(width, width, 1) if out_conv else nn.Identity()
        self.resConfUnit1 = ResidualUnit(width, rectified_skip)
        self.resConfUnit2 = ResidualUnit(width, rectified_skip)

    def forward(self, running: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        """The refined map at `size`; `finer` is None at the coarsest level."""
        if finer is not None:
            running = running + self.resConfUnit1(finer)
        running = self.resConfUnit2(running)
        return self.out_conv(F.interpolate(running, size=size, mode="bilinear", align_corners=True))


class Reassemble(nn.Module):
    """Token map to a map at `scale` times the patch grid."""

    def __init__(self, width_in: int, width_out: int, scale: int | float):
        super().__init__()
        layers: list[nn.Module] = [Conv2d(width_in, width_out, 1)]
        if scale > 1:
            layers.append(ConvTranspose2d(width_out, width_out, int(scale), stride=int(scale)))
        elif scale < 1:
            layers.append(Conv2d(width_out, width_out, 3, stride=2, padding=1))
        self.post = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Tensor:
        return self.post(x)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Float[Tensor, "B F H W"]) -> Float[Tensor, "B F H W"]:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scratch(nn.Module):
    """The part of the decoder behind the reassembled maps; a class of its own for its state-dict names."""

    def __init__(self, widths: Sequence[int], width: int):
        super().__init__()
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            Conv2d(width_level, width, 3, padding=1, bias=False) for width_level in widths
        )
        self.refinenet4 = Fusion(width)
        self.refinenet3 = Fusion(width)
        self.refinenet2 = Fusion(width)
        self.refinenet1 = Fusion(width)
        self.output_conv0 = Conv2d(width, width, 3, padding=1)
        self.output_conv1 = nn.Sequential(Conv2d(width, width, 3, padding=1), nn.ReLU(), Conv2d(width, width, 1))


class DPTDecoder(nn.Module):
    """Fuses four token maps, coarse to fine, into features at image size.

    Args:
        width_in: channels of the token maps.
        widths: channels of the four reassembled maps, finest first.
        width: channels of the decoder and of its output.
    """

    def __init__(self, width_in: int, widths: Sequence[int], width: int = 128):
        super().__init__()
        self.scratch = Scratch(widths, width)
        for level, (width_level, scale) in enumerate(zip(widths, (4, 2, 1, 0.5), strict=True), start=1):
            self.add_module(f"act_postprocess{level}", Reassemble(width_in, width_level, scale))
        self.norm = ChannelNorm(width)

    def forward(self, maps: Sequence[Float[Tensor, "B _ _ _"]], size: tuple[int, int]) -> Float[Tensor, "B F H W"]:
        """Normed features at `size` = (H, W) from the token maps, shallowest block first."""
        hidden = self.hidden(maps, size)
        return self.head(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def hidden(self, maps: Sequence[Float[Tensor, "B _ _ _"]], size: tuple[int, int]) -> Float[Tensor, "B F H W"]:
        """All of the decoder that looks at neighbours; what is left, `head`, works pixel by pixel."""
        scratch = self.scratch
        levels = [
            getattr(scratch, f"layer{i}_rn")(getattr(self, f"act_postprocess{i}")(m))
            for i, m in enumerate(maps, start=1)
        ]
        sizes = [tuple(level.shape[-2:]) for level in levels]
        finest = (2 * sizes[0][0], 2 * sizes[0][1])
        # Enlarging to the next map's size is x2 for even grids; for odd ones x2 would miss it by a row.
        x = scratch.refinenet4(levels[3], None, sizes[2])
        x = scratch.refinenet3(x, levels[2], sizes[1])
        x = scratch.refinenet2(x, levels[1], sizes[0])
        x = scratch.refinenet1(x, levels[0], finest)
        x = scratch.output_conv0(x)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return scratch.output_conv1[0](x)

    def head(self, hidden: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
        """Normed features from `hidden`, with the channels last."""
        return self.norm.norm(self.unnormed_head(hidden))

    def unnormed_head(self, hidden: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
        """Features before the last norm, with the channels last."""
        mix = self.scratch.output_conv1[2]
        assert isinstance(mix, nn.Conv2d)
        return linear(F.relu(hidden), mix.weight.flatten(1), mix.bias)


class PyramidDecoder(DPTDecoder):
    """The decoder on the four maps of a pyramid, which have their sizes already: nothing is reassembled.

    Args: widths, channels of the maps, finest first; width, channels of the decoder and of its output.
    """

    def __init__(self, widths: Sequence[int], width: int):
        nn.Module.__init__(self)
        self.scratch = Scratch(widths, width)
        for level in range(1, len(widths) + 1):
            self.add_module(f"act_postprocess{level}", nn.Identity())
        self.norm = ChannelNorm(width)


def tokens_to_map(tokens: Float[Tensor, "B N C"], grid: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    """The last h * w tokens as a map; class and register tokens in front are dropped.

    The map keeps the channels last in memory, which suits the convolutions that follow.
    """
    patches = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]
    patches = rearrange(patches, "b (h w) c -> b c h w", h=grid[0])
    return patches.contiguous(memory_format=torch.channels_last)
