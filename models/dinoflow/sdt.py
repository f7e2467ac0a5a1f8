"""Simple Depth Transformer head: four token maps of a frozen transformer to a dense map, in one light pass.

Source: AnyDepth, arXiv:2601.02760, section on the decoder: fuse the taps first, upsample once. Same numbers and
state-dict keys as the published head. Deviation: for patches other than 16 pixels a stage may upsample by 2.

Shape legend: B batch, C token width, F fusion width, O outputs, h w patch grid, N = h w, H W output.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.inference_linear import Linear
from kinema.models.backbones.training_conv import Conv2d
from kinema.models.dinoflow.dysample import DySample

HIDDEN_OUTPUT_CHANNELS = 32
_READOUT_GAIN, _PROJECTION_GAIN = 0.1, 4.0  # of `keep_angles`, for tokens of unit variance


class WeightedFusion(nn.Module):
    """Projects every tap to one width and sums them with softmax weights.

    Args:
        in_channels: token width of each tap.
        out_channels: F.
        use_cls_token: have the layers that mix each patch with the class token; they act where one is given.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, use_cls_token: bool = True):
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(len(in_channels)))
        self.projections = nn.ModuleList(
            nn.Sequential(Linear(width, out_channels, bias=False), nn.GELU()) for width in in_channels
        )
        if use_cls_token:
            self.readout_projects = nn.ModuleList(
                nn.Sequential(Linear(2 * width, width), nn.GELU()) for width in in_channels
            )

    @torch.no_grad()
    def keep_angles(self) -> None:
        """Begin as one orthogonal projection of every tap's patches, so small that the rectifiers are almost linear.

        Tokens that are alike then give fused features that are alike, which correlations show; drawn as usual, biases
        and norms outweigh what tells patches apart.
        """
        projections: list[Any] = list(self.projections)
        first = projections[0][0].weight
        nn.init.orthogonal_(first, gain=_PROJECTION_GAIN)
        for projection in projections:
            projection[0].weight.copy_(first)
        for readout in getattr(self, "readout_projects", ()):
            width = readout[0].weight.shape[0]
            readout[0].weight.zero_()
            readout[0].weight[:, :width].copy_(_READOUT_GAIN * torch.eye(width))
            readout[0].bias.zero_()

    def forward(
        self, features: Sequence[Float[Tensor, "B _ h w"]], cls: Sequence[Float[Tensor, "B _"]] | None = None
    ) -> Float[Tensor, "B N F"]:
        """Fused patches, row-major.

        Args: features, one map a tap, shallowest first; cls, the class token of each tap, or None.
        Raises: ValueError for another number of maps or class tokens than the layers are for.
        """
        num_taps = len(self.projections)
        if len(features) != num_taps or (cls is not None and len(cls) != num_taps):
            given = f"{len(features)} maps" + ("" if cls is None else f" and {len(cls)} class tokens")
            raise ValueError(f"the fusion was built for {num_taps} taps and got {given}")
        if cls is not None and not hasattr(self, "readout_projects"):
            raise ValueError("class tokens were given to a fusion without readout; build it with use_cls_token=True")
        fused: Tensor | None = None
        for i, (weight, maps) in enumerate(zip(self.layer_weights.softmax(0), features, strict=True)):
            patches = rearrange(maps, "b c h w -> b (h w) c")
            if cls is not None:
                token = cls[i][:, None].expand_as(patches)
                patches = self.readout_projects[i](torch.cat([patches, token], dim=-1))
            projected = weight * self.projections[i](patches)
            fused = projected if fused is None else fused + projected
        assert fused is not None
        return fused


class SpatialDetailEnhancer(nn.Module):
    """A depthwise convolution beside a skip; the input is added behind the norm, then rectified."""

    def __init__(self, width: int):
        super().__init__()
        self.dwconv = Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Float[Tensor, "B F h w"]) -> Float[Tensor, "B F h w"]:
        return F.relu(self.norm(self.dwconv(x)) + x)


class Upsampler(nn.Module):
    """Upsampling by 4 (or 2): DySample by 2 and a convolution, twice (or once)."""

    def __init__(self, width: int, factor: int = 4):
        super().__init__()
        if factor not in (2, 4):
            raise ValueError(f"factor={factor} is not one of 2, 4")
        for number in range(1, 3 if factor == 4 else 2):
            self.add_module(
                f"dysample{number}",
                nn.Sequential(DySample(width, 2, "lp", 4, dyscope=True), *conv_norm_relu(width, width, bias=False)),
            )

    def forward(self, x: Float[Tensor, "B F h w"]) -> Float[Tensor, "B F H W"]:
        for part in self.children():
            x = part(x)
        return x


class SDTHead(nn.Module):
    """Four token maps to `n_output_channels` maps at `scale` times the patch grid.

    Args:
        in_channels: token width of each tap.
        fusion_channels: F, a multiple of 4.
        n_output_channels: O.
        use_cls_token: as in `WeightedFusion`.
        factors: of the two upsampling stages, each 2 or 4; published (4, 4), which suits patches of 16 pixels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        fusion_channels: int = 256,
        n_output_channels: int = 1,
        use_cls_token: bool = True,
        factors: tuple[int, int] = (4, 4),
    ):
        super().__init__()
        width = fusion_channels
        self.scale = factors[0] * factors[1]
        self.weighted_fusion = WeightedFusion(in_channels, width, use_cls_token)
        self.detail_enhancer = SpatialDetailEnhancer(width)
        self.upsample_1 = Upsampler(width, factors[0])
        self.refinement_1 = nn.Sequential(*conv_norm_relu(width, width))
        self.upsample_2 = Upsampler(width, factors[1])
        self.refinement_2 = nn.Sequential(*conv_norm_relu(width, width))
        self.output_conv = nn.Sequential(
            Conv2d(width, width // 2, 3, padding=1),
            nn.ReLU(),
            Conv2d(width // 2, HIDDEN_OUTPUT_CHANNELS, 3, padding=1),
            nn.ReLU(),
            Conv2d(HIDDEN_OUTPUT_CHANNELS, n_output_channels, 1),
        )

    def forward(
        self, features: Sequence[Float[Tensor, "B _ h w"]], cls: Sequence[Float[Tensor, "B _"]] | None = None
    ) -> Float[Tensor, "B O H W"]:
        """Dense output from the taps' maps and, if given, their class tokens."""
        return self.decode(self.fuse(features, cls))

    def fuse(
        self, features: Sequence[Float[Tensor, "B _ h w"]], cls: Sequence[Float[Tensor, "B _"]] | None = None
    ) -> Float[Tensor, "B F h w"]:
        """The taps as one map, with the channels last in memory, which suits the convolutions that follow."""
        height, width = features[0].shape[-2:]
        fused = rearrange(self.weighted_fusion(features, cls), "b (h w) c -> b c h w", h=height, w=width)
        return fused.contiguous(memory_format=torch.channels_last)

    def decode(self, x: Float[Tensor, "B F h w"]) -> Float[Tensor, "B O H W"]:
        """All behind the fusion: detail, two upsampling stages, output."""
        x = self.detail_enhancer(x)
        x = self.refinement_1(self.upsample_1(x))
        x = self.refinement_2(self.upsample_2(x))
        return self.output_conv(x)


def conv_norm_relu(width_in: int, width_out: int, bias: bool = True) -> list[nn.Module]:
    """A 3x3 convolution, a batch norm and a rectifier."""
    return [Conv2d(width_in, width_out, 3, padding=1, bias=bias), nn.BatchNorm2d(width_out), nn.ReLU()]
