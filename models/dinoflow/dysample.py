"""DySample: upsampling that learns where each finer pixel looks in the coarse map.

Source: Liu, Lu, Fu, Cao, Learning to Upsample by Learning to Sample, ICCV 2023, arXiv:2308.15085. Same numbers and
state-dict keys as the published operator. Deviation: positions are computed in float32 whatever the map's dtype;
bfloat16 has 8 bits, which at a width of 256 leaves steps of a whole pixel.

Shape legend: B batch, C channels, h w coarse map, s scale, G groups, (k l) the s x s finer pixels of a coarse one.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

STYLES = ("lp", "pl")


class DySample(nn.Module):
    """Upsamples by `scale`: every group of channels is read bilinearly at learnt offsets from the regular grid.

    Args:
        in_channels: C, a multiple of `groups`; style "pl" also needs a multiple of scale^2.
        scale: s, at least 1.
        style: "lp" predicts the offsets of all s^2 finer pixels from the coarse one; "pl" shuffles the channels to the
            finer size first and predicts one offset there, with s^2 times fewer weights.
        groups: G, groups of channels with offsets of their own.
        dyscope: predict how far offsets reach (0 to 0.5 of what the offset layer says) instead of 0.25.
    Raises: ValueError for arguments that do not fit together.
    """

    init_pos: Tensor

    def __init__(self, in_channels: int, scale: int = 2, style: str = "lp", groups: int = 4, dyscope: bool = False):
        super().__init__()
        _check_arguments(in_channels, scale, style, groups)
        self.scale, self.style, self.groups = scale, style, groups
        finer = scale**2
        width_in = in_channels // finer if style == "pl" else in_channels
        width_out = 2 * groups if style == "pl" else 2 * groups * finer
        self.offset = nn.Conv2d(width_in, width_out, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.constant_(self.offset.bias, 0.0)  # type: ignore[arg-type]  # a convolution's bias may be None
        self.scope = nn.Conv2d(width_in, width_out, 1, bias=False) if dyscope else None
        if self.scope is not None:
            nn.init.zeros_(self.scope.weight)
        self.register_buffer("init_pos", _regular_positions(scale, groups))

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        """The map at `scale` times its size, in its dtype."""
        return self.sample(x, self.offsets(x))

    def offsets(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B O h w"]:
        """Where finer pixels look, relative to their coarse pixel's centre and in coarse pixels; float32.

        O is (xy, group, row of the finer pixel, column of the finer pixel).
        """
        source = F.pixel_shuffle(x, self.scale) if self.style == "pl" else x
        learnt = self.offset(source).float()
        if self.scope is None:
            learnt = learnt * 0.25
        else:
            learnt = learnt * self.scope(source).float().sigmoid() * 0.5
        if self.style == "pl":
            learnt = F.pixel_unshuffle(learnt, self.scale)
        return learnt + self.init_pos.float()

    def sample(self, x: Float[Tensor, "B C h w"], offsets: Float[Tensor, "B O h w"]) -> Float[Tensor, "B C H W"]:
        """`x` read at float32 `offsets` from its pixels' centres; its border is repeated outside."""
        height, width = x.shape[-2:]
        columns = torch.arange(width, device=x.device, dtype=torch.float32) + 0.5
        rows = torch.arange(height, device=x.device, dtype=torch.float32) + 0.5
        along_x, along_y = rearrange(
            offsets, "b (xy g k l) h w -> xy (b g) h k w l", xy=2, g=self.groups, k=self.scale, l=self.scale
        )
        # grid_sample's coordinates: -1 and 1 are the image's edges.
        grid_x = 2 * (along_x + columns[:, None]) / width - 1
        grid_y = 2 * (along_y + rows[:, None, None, None]) / height - 1
        grid = rearrange([grid_x, grid_y], "xy b h k w l -> b (h k) (w l) xy")
        grouped = rearrange(x, "b (g c) h w -> (b g) c h w", g=self.groups)
        # Both in float32: half precision positions would be rounded to whole pixels.
        sampled = F.grid_sample(grouped.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        return rearrange(sampled, "(b g) c h w -> b (g c) h w", g=self.groups).to(x.dtype)


def _regular_positions(scale: int, groups: int) -> Float[Tensor, "1 O 1 1"]:
    """Centres of the finer pixels relative to the coarse one's, (x, y) for every group, row-major."""
    centres = (torch.arange(scale, dtype=torch.float32) - (scale - 1) / 2) / scale
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return repeat(torch.stack([x, y]), "xy k l -> 1 (xy g k l) 1 1", g=groups).contiguous()


def _check_arguments(in_channels: int, scale: int, style: str, groups: int) -> None:
    if style not in STYLES:
        raise ValueError(f"style={style!r} is not one of {', '.join(map(repr, STYLES))}")
    if scale < 1:
        raise ValueError(f"scale={scale} must be at least 1")
    if groups < 1 or in_channels < 1 or in_channels % groups:
        raise ValueError(f"in_channels={in_channels} must be a positive multiple of groups={groups}")
    if style == "pl" and in_channels % scale**2:
        raise ValueError(f"in_channels={in_channels} must be a multiple of scale^2={scale**2} for style 'pl'")
