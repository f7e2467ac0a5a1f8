"""Vision transformers: DINO, DINOv2 (with and without registers), DINOv3 and MAE in one architecture.

The families share the block and differ in how tokens learn their position and in small conventions;
`ViTConfig` names every difference. State-dict keys, shapes and dtypes equal the published files'.

Sources: Dosovitskiy et al., arXiv:2010.11929 (architecture); Caron et al., arXiv:2104.14294 (DINO);
Oquab et al., arXiv:2304.07193 (DINOv2); Darcet et al., arXiv:2309.16588 (registers);
Simeoni et al., arXiv:2508.10104 (DINOv3); He et al., arXiv:2111.06377 (MAE).

Shape legend: B batch, H W image pixels, h w patch grid, N tokens (prefix tokens, then patches
row-major), D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.inference_linear import Linear, linear
from kinema.models.weights import resolve_weights


@dataclass(frozen=True)
class ViTConfig:
    """What distinguishes one published vision transformer from another."""

    patch_size: int
    """Side of a patch in pixels."""
    width: int
    """Token width D."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """Attention heads; the head width is width / num_heads."""
    positions: Literal["offset_table", "antialias_table", "fixed_table", "rotary"]
    """How patches learn where they are.

    offset_table: learnt table, resized bicubically with a scale factor of (n + 0.1) / table side.
    antialias_table: learnt table, resized bicubically to the exact grid with antialiasing.
    fixed_table: table of exactly one grid; another grid is refused.
    rotary: no table, queries and keys are rotated by the patch coordinates.
    """
    table_side: int = 0
    """Side of the (square) position table in patches; 0 for rotary positions."""
    register_name: str | None = None
    """State-dict name of the 4 register tokens between class token and patches, or None."""
    layer_scale: bool = False
    """Whether both branches of a block are scaled per channel."""
    mask_token: bool = False
    """Whether the checkpoint holds a mask token (used in pre-training only)."""
    masked_key_bias: bool = False
    """Whether a persistent 0/1 mask silences the bias of the keys."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    floor_grid: bool = True
    """Whether sides that are no multiple of the patch lose their remainder; otherwise they are refused."""


def _dinov2(width: int, depth: int, num_heads: int, registers: bool) -> ViTConfig:
    return ViTConfig(
        patch_size=14,
        width=width,
        depth=depth,
        num_heads=num_heads,
        positions="antialias_table" if registers else "offset_table",
        table_side=37,
        register_name="register_tokens" if registers else None,
        layer_scale=True,
        mask_token=True,
        floor_grid=False,
    )


CONFIGS: dict[str, ViTConfig] = {
    "dino_vits16": ViTConfig(16, 384, 12, 6, "offset_table", table_side=14),
    "dino_vitb16": ViTConfig(16, 768, 12, 12, "offset_table", table_side=14),
    "dinov2_vits14": _dinov2(384, 12, 6, registers=False),
    "dinov2_vitb14": _dinov2(768, 12, 12, registers=False),
    "dinov2_vitl14": _dinov2(1024, 24, 16, registers=False),
    "dinov2_vits14_reg": _dinov2(384, 12, 6, registers=True),
    "dinov2_vitb14_reg": _dinov2(768, 12, 12, registers=True),
    "dinov2_vitl14_reg": _dinov2(1024, 24, 16, registers=True),
    "dinov3_vits16": ViTConfig(
        16,
        384,
        12,
        6,
        "rotary",
        register_name="storage_tokens",
        layer_scale=True,
        mask_token=True,
        masked_key_bias=True,
        norm_eps=1e-5,
    ),
    "mae_vitb16": ViTConfig(16, 768, 12, 12, "fixed_table", table_side=14),
}

ENCODERS: dict[str, ViTConfig] = {
    **CONFIGS,
    "tiny_vit8": ViTConfig(
        patch_size=8, width=128, depth=4, num_heads=4, positions="antialias_table", table_side=12, floor_grid=False
    ),
    "micro_vit8": ViTConfig(
        patch_size=8, width=64, depth=1, num_heads=2, positions="antialias_table", table_side=12, floor_grid=False
    ),
}
"""What a model may be built on: the published ones, and two that train from scratch on a CPU within minutes."""

NUM_REGISTERS = 4
ROTARY_BASE = 100.0


class PatchEmbed(nn.Module):
    """Linear projection of non-overlapping patches; a remainder at the right and bottom is dropped."""

    def __init__(self, patch_size: int, width: int, in_channels: int = 3):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class RotaryPositions(nn.Module):
    """Axial rotary embedding of patch coordinates (DINOv3, section on positional encoding).

    Coordinates run from -1 to 1 over each axis with patch centres at (i + 0.5) / n * 2 - 1. The angle is
    2 pi coord / period; the first half of the angles belongs to rows, the second to columns.
    """

    periods: Tensor

    def __init__(self, head_width: int):
        super().__init__()
        num_periods = head_width // 4
        exponents = 2 * torch.arange(num_periods, dtype=torch.float32) / (head_width // 2)
        self.register_buffer("periods", ROTARY_BASE**exponents)

    def forward(self, grid: tuple[int, int]) -> tuple[Float[Tensor, "P E"], Float[Tensor, "P E"]]:
        """Sines and cosines of every patch, row-major, for all dimensions E of a head."""
        rows, cols = (
            (torch.arange(n, device=self.periods.device, dtype=torch.float32) + 0.5) / n * 2 - 1 for n in grid
        )
        coords = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).flatten(0, 1)  # [P, 2]
        angles = 2 * math.pi * coords[:, :, None] / self.periods.float()  # [P, 2, E/4]
        angles = angles.flatten(1).tile(2)  # [P, E]
        return angles.sin(), angles.cos()


def _rotate_patches(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the last P of the N tokens of x [B, heads, N, E]; prefix tokens have no position."""
    prefix, patches = x.split([x.shape[-2] - sin.shape[0], sin.shape[0]], dim=-2)
    first, second = patches.chunk(2, dim=-1)
    rotated = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([prefix, rotated.to(x.dtype)], dim=-2)


class MaskedKeyBiasLinear(Linear):
    """Projection to queries, keys and values whose key bias is held at zero by a persistent mask."""

    bias_mask: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        mask = torch.ones(3, out_features // 3)
        mask[1] = 0.0
        self.register_buffer("bias_mask", mask.flatten())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class Attention(nn.Module):
    """Multi-head self-attention through torch's fused kernel."""

    def __init__(self, width: int, num_heads: int, masked_key_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = (MaskedKeyBiasLinear if masked_key_bias else Linear)(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"], rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three heads e) -> three b heads n e", three=3, heads=self.num_heads)
        if rotary is not None:
            q, k = _rotate_patches(q, *rotary), _rotate_patches(k, *rotary)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "b heads n e -> b n (heads e)"))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Per-channel gain of a residual branch."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, config.num_heads, config.masked_key_bias)
        self.ls1 = LayerScale(width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width) if config.layer_scale else nn.Identity()

    def forward(self, x: Float[Tensor, "B N D"], rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rotary))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """A ViT encoder. Input: RGB images, normalised with the ImageNet mean and standard deviation.

    `backbone(x)` gives the normed final tokens, `backbone.tokens(x, blocks)` un-normed tokens of inner
    blocks. Any image size is accepted unless the family forbids it: DINOv2 wants multiples of its patch,
    MAE the one size it was built for (`image_size`).
    """

    def __init__(self, config: ViTConfig, image_size: tuple[int, int] = (224, 224)):
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        if config.positions != "rotary":
            num_positions = 1 + math.prod(self._table_grid())
            self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, config.width))
        if config.register_name:
            registers = nn.Parameter(torch.zeros(1, NUM_REGISTERS, config.width))
            self.register_parameter(config.register_name, registers)
        if config.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, config.width))
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        if config.positions == "rotary":
            self.rope_embed = RotaryPositions(config.width // config.num_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self._init_weights()
        self.register_load_state_dict_pre_hook(_adapt_before_loading)

    @property
    def width(self) -> int:
        """Token width D."""
        return self.config.width

    @property
    def only_size(self) -> tuple[int, int] | None:
        """(height, width) of the images it takes, if it takes no others."""
        return (self.image_size[0], self.image_size[1]) if self.config.positions == "fixed_table" else None

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: the class token and the registers."""
        return 1 + (NUM_REGISTERS if self.config.register_name else 0)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patch grid (rows, columns) of an image of height x width pixels.

        Raises: ValueError for a size that this family does not take.
        """
        p = self.config.patch_size
        if self.config.positions == "fixed_table" and (height, width) != tuple(self.image_size):
            raise ValueError(
                f"image size {height}x{width}: this backbone takes only the size it was built for, "
                f"{self.image_size[0]}x{self.image_size[1]}; resize the image or pass image_size="
            )
        if not self.config.floor_grid and (height % p or width % p):
            fits = f"{round(height / p) * p or p}x{round(width / p) * p or p}"
            raise ValueError(f"image size {height}x{width}: both sides must be multiples of {p}; use {fits}")
        if height < p or width < p:
            raise ValueError(f"image size {height}x{width}: both sides must be at least one patch, {p} pixels")
        return height // p, width // p

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Final tokens through the last LayerNorm: class token, registers if any, patches row-major."""
        (last,) = self.tokens(x, [self.config.depth - 1])
        return self.norm(last)

    def tokens(self, x: Float[Tensor, "B 3 H W"], blocks: Sequence[int]) -> list[Float[Tensor, "B N D"]]:
        """Un-normed tokens after each of `blocks` (0-based), in the order asked for.

        No block behind the last requested one is run.
        Raises: ValueError if a block does not exist, or for an image size the family does not take.
        """
        depth = self.config.depth
        if not blocks or any(not 0 <= b < depth for b in blocks):
            raise ValueError(f"blocks={list(blocks)}: name at least one block, each from 0 to {depth - 1}")
        grid = self.grid(*x.shape[-2:])
        rotary = self.rope_embed(grid) if self.config.positions == "rotary" else None
        tokens = self._embed(x, grid)
        taps = {}
        for index, block in enumerate(self.blocks[: max(blocks) + 1]):
            tokens = block(tokens, rotary)
            if index in blocks:
                taps[index] = tokens
        return [taps[b] for b in blocks]

    def position_table(self, height: int, width: int) -> Float[Tensor, "1 N D"]:
        """The table added to class token and patches of an image of height x width pixels."""
        grid, side, table = self.grid(height, width), self.config.table_side, self.pos_embed
        matches = grid[0] * grid[1] == side * side and height == width
        if matches or self.config.positions == "fixed_table":
            return table
        patches = rearrange(table[:, 1:].float(), "one (h w) d -> one d h w", h=side)
        if self.config.positions == "offset_table":
            # The published networks sample with this factor, not with grid / side: 0.1 was added against
            # rounding and became part of what the weights mean.
            factor = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
            patches = F.interpolate(patches, scale_factor=factor, mode="bicubic")
        else:
            patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True)
        assert patches.shape[-2:] == grid
        patches = rearrange(patches, "one d h w -> one (h w) d").to(table.dtype)
        return torch.cat([table[:, :1], patches], dim=1)

    def adapt_state_dict(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Resample a fixed position table of another grid, in place, before it is loaded.

        Patch rows are resized bicubically with antialiasing; the class row is kept.
        """
        key = prefix + "pos_embed"
        table = state.get(key)
        if self.config.positions != "fixed_table" or table is None or table.shape == self.pos_embed.shape:
            return
        side = math.isqrt(table.shape[1] - 1) if table.ndim == 3 else 0
        if table.ndim != 3 or side * side != table.shape[1] - 1 or table.shape[2] != self.width:
            return  # loading will report the mismatch
        patches = rearrange(table[:, 1:].float(), "one (h w) d -> one d h w", h=side)
        patches = F.interpolate(patches, size=self._table_grid(), mode="bicubic", antialias=True)
        patches = rearrange(patches, "one d h w -> one (h w) d").to(table.dtype)
        state[key] = torch.cat([table[:, :1], patches], dim=1)

    def _embed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches with positions, behind the prefix tokens: [B, N, D]."""
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)], dim=1)
        if self.config.positions != "rotary":
            tokens = tokens + self.position_table(*x.shape[-2:])
        if self.config.register_name:
            registers = getattr(self, self.config.register_name).expand(x.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        return tokens

    def _table_grid(self) -> tuple[int, int]:
        if self.config.positions == "fixed_table":
            p = self.config.patch_size
            return self.image_size[0] // p, self.image_size[1] // p
        return self.config.table_side, self.config.table_side

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.config.register_name:
            nn.init.trunc_normal_(getattr(self, self.config.register_name), std=0.02)
        if self.config.positions == "fixed_table":
            # MAE's positions are constants of its grid, never trained.
            self.pos_embed.requires_grad_(False)
            self.pos_embed.data.copy_(sincos_table(self._table_grid(), self.width))
        elif self.config.positions != "rotary":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)


def _adapt_before_loading(module: VisionTransformer, state: dict, prefix: str, *_) -> None:
    module.adapt_state_dict(state, prefix)


def sincos_table(grid: tuple[int, int], width: int) -> Float[Tensor, "1 N D"]:
    """Fixed positions of MAE: zeros for the class token, then sines and cosines of column and row.

    Source: He et al., arXiv:2111.06377, appendix A.1. The first half of the width encodes the column.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, cols = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    angles = [axis.flatten()[:, None] * frequencies for axis in (cols, rows)]
    patches = torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)
    return torch.cat([torch.zeros(1, width), patches.float()])[None]


def vision_transformer(
    name: str,
    pretrained: bool = False,
    weights: str | None = None,
    image_size: tuple[int, int] = (224, 224),
) -> VisionTransformer:
    """A published backbone by its hub name, in eval mode.

    Args:
        name: a key of `CONFIGS`, such as "dinov2_vits14".
        pretrained: download the published weights (once) and load them.
        weights: path or URL of a checkpoint to load instead.
        image_size: (height, width) in pixels; matters only to MAE, whose size is fixed.
    Raises: ValueError for an unknown name or weights that do not fit.
    """
    if name not in CONFIGS:
        raise ValueError(f"backbone {name!r} is not known; use one of {', '.join(CONFIGS)}")
    model = VisionTransformer(CONFIGS[name], image_size=image_size)
    return resolve_weights(model, name, pretrained, weights).eval()
