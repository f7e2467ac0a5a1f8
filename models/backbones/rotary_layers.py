"""What transformers with cosine attention and conditioned norms share: exact constants, norms, rotary angles.

The Flow Poke Transformer and DisMo are built of these.

Source: Crowson et al., "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers",
arXiv:2401.11605 (norms, axial rotary embedding).

Shape legend: B batch, L tokens, D width, H heads, R rotary angles.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

NORM_EPS = 1e-6


def at_least_float32(x: Tensor) -> Tensor:
    """x, or x in float32 if its dtype is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ExactConstants(nn.Module):
    """A module whose constants stay float32 when its weights are cast to a narrower dtype."""

    constant_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExactConstants":
        exact = {name: getattr(self, name).detach() for name in self.constant_names}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype.itemsize < torch.float32.itemsize:
                moved.data = value.to(moved.device, torch.float32)
        return self


class RMSNorm(nn.Module):
    """Root-mean-square norm with gain, computed in float32 or better; the result has the gain's dtype.

    Args: gain is the gain's name in the state dict.
    """

    def __init__(self, width: int, eps: float = NORM_EPS, gain: str = "weight"):
        super().__init__()
        self.gain_name = gain
        self.register_parameter(gain, nn.Parameter(torch.ones(width)))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        gain = getattr(self, self.gain_name)
        x = at_least_float32(x)
        return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), self.eps).to(gain.dtype)


class AdaptiveRMSNorm(nn.Module):
    """Root-mean-square norm whose gain is 1 + a linear function of the conditioning."""

    def __init__(self, width: int, cond_width: int | None = None):
        super().__init__()
        self.linear = nn.Linear(cond_width or width, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Float[Tensor, "B L D"], cond: Float[Tensor, "B C"]) -> Float[Tensor, "B L D"]:
        return self.scale(x, self.gain(cond))

    def gain(self, cond: Float[Tensor, "B C"]) -> Float[Tensor, "B 1 D"]:
        """What the norm multiplies by, in float32 or better; the same for as long as `cond` is."""
        return (1 + at_least_float32(self.linear(cond)))[:, None]

    def scale(self, x: Float[Tensor, "B L D"], gain: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B L D"]:
        """The norm of x times a gain from `gain`, in the dtype of the weights."""
        x = at_least_float32(x)
        return (F.rms_norm(x, x.shape[-1:], None, NORM_EPS) * gain.to(x.dtype)).to(self.linear.weight.dtype)


def spread_over_heads(values: Float[Tensor, "n"], num_heads: int) -> Float[Tensor, "H slots"]:
    """Consecutive values go to different heads: value i to head i mod H, slot i // H."""
    return values.view(-1, num_heads).T.contiguous()


class AxialRotary(ExactConstants):
    """Rotary angles of points (x, y) in 0..1: the row's frequencies first, then the column's.

    Frequencies run from pi to 10 pi, evenly in the logarithm, over all heads; consecutive ones go to different heads.

    Args: slots is the number of angles per axis; by default the angles turn the whole head.
    """

    constant_names = ("freqs",)

    def __init__(self, head_dim: int, num_heads: int, slots: int | None = None):
        super().__init__()
        self.freqs = nn.Parameter(spatial_frequencies(num_heads, slots or head_dim // 4), requires_grad=False)

    def forward(self, pos: Float[Tensor, "B L 2"]) -> Float[Tensor, "B H L R"]:
        """Angles in radians, R = 2 slots."""
        return spatial_angles(pos, self.freqs)


def spatial_frequencies(num_heads: int, slots: int) -> Float[Tensor, "2 H slots"]:
    """Frequencies of rows and columns, alike: pi to 10 pi."""
    exponents = torch.linspace(math.log(math.pi), math.log(10 * math.pi), num_heads * slots + 1)[:-1]
    return spread_over_heads(exponents.exp(), num_heads).expand(2, -1, -1).contiguous()


def spatial_angles(pos: Float[Tensor, "B L 2"], freqs: Float[Tensor, "2 H slots"]) -> Float[Tensor, "B H L R"]:
    """Angles of points (x, y) in 0..1; those of the row come first."""
    x, y = (at_least_float32(pos) * 2 - 1).to(freqs.dtype)[:, None, :, :, None].unbind(3)
    return torch.cat([y * freqs[1][:, None], x * freqs[0][:, None]], dim=-1)


def cell_centres(height: int, width: int, *, device: torch.device | None = None) -> Float[Tensor, "h w 2"]:
    """(x, y) of the cells of a feature map, 0..1 over its longer side and centred over the other."""
    longer = max(height, width)
    y, x = (
        ((torch.arange(n, device=device, dtype=torch.float32) + 0.5) * 2 - n) / longer * 0.5 + 0.5
        for n in (height, width)
    )
    return torch.stack([x[None, :].expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
