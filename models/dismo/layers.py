"""Building blocks of DisMo: frame encoder, 3D rotary positions, layers, mapping network, embeddings of time.

Source: Ressler-Antal et al., "DisMo: Disentangled Motion Representations for Open-World Motion Transfer", NeurIPS 2025,
arXiv:2511.23428, section 3, and its published code. State-dict keys equal the published files'.

Precision: weights may be of any floating dtype and autocast may be on. Norms, positions and the residual stream are
computed in float32 (float64 in a float64 model), matrix products in the dtype asked for.

Shape legend: B batch, L tokens, D width, C conditioning width, E channels of an image encoder, h w its grid, H heads,
e head size, R rotary angles, M tokens of a source frame.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinema.kernels.cosine_attention import cosine_attention
from kinema.models.backbones.convolutional import CellConfig, CellEncoder
from kinema.models.backbones.rotary_layers import (
    AdaptiveRMSNorm,
    ExactConstants,
    RMSNorm,
    at_least_float32,
    spatial_angles,
    spatial_frequencies,
    spread_over_heads,
)
from kinema.models.backbones.vision_transformer import ENCODERS, VisionTransformer, ViTConfig
from kinema.models.fpt.data_rules import central_square

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EXPANSION = 3
"""Hidden width of a feed-forward block over its input's."""
TEMPORAL_BASE = 100.0
INITIAL_SCALE = 10.0


FRAME_ENCODERS: dict[str, ViTConfig | CellConfig] = {**ENCODERS, "micro_conv4": CellConfig(width=32, depth=1)}
"""What frames may be encoded by: vision transformers, or convolutions that see edges before anything is learned."""


class FrameEncoder(nn.Module):
    """A vision transformer over the central square of frames in -1..1: its normed patch tokens as a map.

    Args:
        model_version: a key of `FRAME_ENCODERS`.
        image_size: side in pixels of the square that the transformer sees.
        gradient_last_blocks: how many of its last blocks are trained, and nothing else of it; None trains all of it.
    """

    def __init__(self, model_version: str, image_size: int = 224, gradient_last_blocks: int | None = 2):
        super().__init__()
        if model_version not in FRAME_ENCODERS:
            raise ValueError(f"model_version={model_version!r} is not known; use one of {', '.join(FRAME_ENCODERS)}")
        config = FRAME_ENCODERS[model_version]
        if image_size % config.patch_size:
            raise ValueError(
                f"image_size={image_size} is not a multiple of the encoder's patch, {config.patch_size}; "
                f"use {max(1, round(image_size / config.patch_size)) * config.patch_size}"
            )
        if gradient_last_blocks is not None and not 0 <= gradient_last_blocks <= config.depth:
            raise ValueError(f"gradient_last_blocks={gradient_last_blocks}: {model_version} has {config.depth} blocks")
        size = (image_size, image_size)
        self.model: CellEncoder | VisionTransformer = (
            CellEncoder(config, size) if isinstance(config, CellConfig) else VisionTransformer(config, size)
        )
        self.image_size = image_size
        if config.mask_token:
            self.model.mask_token.requires_grad_(False)  # of the encoder's own pre-training; never used
        if gradient_last_blocks is not None:
            self.model.requires_grad_(False)
            self.model.blocks[config.depth - gradient_last_blocks :].requires_grad_(True)

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.model.width

    @property
    def grid(self) -> int:
        """Side of the feature map."""
        return self.image_size // self.model.patch_size

    def forward(self, frames: Float[Tensor, "B height width 3"]) -> Float[Tensor, "B h w E"]:
        """Features of frames of any size; what lies outside the central square is not seen."""
        frames = at_least_float32(rearrange(frames, "b h w c -> b c h w"))
        top, left, side = central_square(*frames.shape[-2:])
        square = frames[..., top : top + side, left : left + side]
        if side >= 2 * self.image_size:
            square = F.avg_pool2d(square, side // self.image_size)
        square = F.interpolate(square, (self.image_size, self.image_size), mode="bilinear", align_corners=False)
        mean, std = (square.new_tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        tokens = self.model((((square + 1) / 2 - mean) / std).to(self.model.norm.weight.dtype))
        patches = tokens[:, self.model.num_prefix_tokens :]
        return rearrange(patches, "b (h w) e -> b h w e", h=self.grid)


class SpaceTimeRotary(ExactConstants):
    """Rotary angles of tokens at frame t and point (x, y): those of time first, then of the row, then of the column.

    Each axis turns 2 e / 8 dims of a head, so a quarter of the head stays. Spatial frequencies run from pi to 10 pi,
    temporal ones from 1 down to 1/100 per frame, both evenly in the logarithm over all heads.
    """

    constant_names = ("spatial_freqs", "temporal_freqs")

    def __init__(self, head_dim: int, num_heads: int):
        super().__init__()
        slots = head_dim // 8
        exponents = torch.arange(num_heads * slots, dtype=torch.float32) / (num_heads * slots)
        temporal = spread_over_heads(TEMPORAL_BASE**-exponents, num_heads)
        self.spatial_freqs = nn.Parameter(spatial_frequencies(num_heads, slots), requires_grad=False)
        self.temporal_freqs = nn.Parameter(temporal, requires_grad=False)

    def forward(self, time: Float[Tensor, "B L"], pos: Float[Tensor, "B L 2"]) -> Float[Tensor, "B H L R"]:
        """Angles in radians for frame numbers and positions in 0..1."""
        temporal = time.to(self.temporal_freqs.dtype)[:, None, :, None] * self.temporal_freqs[:, None]
        return torch.cat([temporal, spatial_angles(pos, self.spatial_freqs)], dim=-1)


class GatedFeedForward(nn.Module):
    """Norm, two layers with a gate between them, and an identity (or a projection, where the width changes) beside.

    Args:
        cond_width: width of a conditioning that sets the norm's gain; None for a learnt gain.
        out_width: width of the result, if it differs.
    """

    def __init__(self, width: int, cond_width: int | None = None, out_width: int | None = None):
        super().__init__()
        self.norm = _norm(width, cond_width)
        self.up_proj = nn.Linear(width, 2 * EXPANSION * width, bias=False)
        self.down_proj = nn.Linear(EXPANSION * width, out_width or width, bias=False)
        nn.init.zeros_(self.down_proj.weight)
        if out_width is not None and out_width != width:
            self.skip_proj = nn.Linear(width, out_width, bias=False)

    def forward(self, x: Float[Tensor, "*B D"], cond: Float[Tensor, "b C"] | None = None) -> Float[Tensor, "*B O"]:
        normed = self.norm(x) if cond is None else self.norm(x, cond)
        up, gate = self.up_proj(normed).chunk(2, dim=-1)
        skip = self.skip_proj(x.to(self.skip_proj.weight.dtype)) if hasattr(self, "skip_proj") else x
        return skip + self.down_proj(up * F.silu(gate))


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention if there is a context, and a gated feed-forward block; norms in front of each.

    Args:
        cond_width: width of the conditioning that sets the gains of the norms; None for learnt gains.
        context_width: width of the tokens that cross-attention looks at; None for no cross-attention.
    """

    def __init__(self, width: int, head_dim: int, cond_width: int | None = None, context_width: int | None = None):
        super().__init__()
        self.head_dim = head_dim
        self.num_heads = width // head_dim
        self.self_scale = nn.Parameter(torch.full((self.num_heads,), INITIAL_SCALE))
        self.self_norm = _norm(width, cond_width)
        self.self_qkv = nn.Linear(width, 3 * width, bias=False)
        self.self_out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.self_out.weight)
        if context_width is not None:
            self.cross_scale = nn.Parameter(torch.full((self.num_heads,), INITIAL_SCALE))
            self.cross_norm_q = _norm(width, cond_width)
            self.cross_norm_kv = RMSNorm(context_width, gain="scale")
            self.cross_q = nn.Linear(width, width, bias=False)
            self.cross_kv = nn.Linear(context_width, 2 * width, bias=False)
            self.cross_out = nn.Linear(width, width, bias=False)
            nn.init.zeros_(self.cross_out.weight)
        self.ff = GatedFeedForward(width, cond_width)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        theta: Float[Tensor, "_ H L R"],
        cond: Float[Tensor, "B C"] | None = None,
        context: Float[Tensor, "B M E"] | None = None,
        context_theta: Float[Tensor, "_ H M R"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Tokens after the layer; theta are rotary angles in radians."""
        conditioned = () if cond is None else (cond,)
        q, k, v = self._heads(self.self_qkv(self.self_norm(x, *conditioned)))
        x = x + self._merge(self.self_out, cosine_attention(q, k, v, theta, theta, self.self_scale, "full"))
        if context is not None:
            q = self._heads(self.cross_q(self.cross_norm_q(x, *conditioned)))[0]
            k, v = self._heads(self.cross_kv(self.cross_norm_kv(context)))
            attended = cosine_attention(q, k, v, theta, context_theta, self.cross_scale, "full")
            x = x + self._merge(self.cross_out, attended)
        return self.ff(x, *conditioned)

    def _heads(self, x: Float[Tensor, "B L _"]) -> Float[Tensor, "n B H L e"]:
        return rearrange(x, "b l (n h e) -> n b h l e", h=self.num_heads, e=self.head_dim)

    def _merge(self, out: nn.Linear, x: Float[Tensor, "B H L e"]) -> Float[Tensor, "B L D"]:
        return out(rearrange(x, "b h l e -> b l (h e)"))


class MappingNetwork(nn.Module):
    """Norm, gated feed-forward blocks, norm."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.in_norm = RMSNorm(width, gain="scale")
        self.blocks = nn.ModuleList(GatedFeedForward(width) for _ in range(depth))
        self.out_norm = RMSNorm(width, gain="scale")

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


class FourierFeatures(ExactConstants):
    """Cosines, then sines, of 2 pi times a number times fixed random frequencies."""

    constant_names = ("weight",)
    weight: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(width // 2, 1))

    def forward(self, x: Float[Tensor, "B"]) -> Float[Tensor, "B C"]:
        phase = 2 * math.pi * at_least_float32(x).to(self.weight.dtype)[:, None] * self.weight[:, 0]
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


def sinusoidal_features(x: Float[Tensor, "B"], width: int) -> Float[Tensor, "B C"]:
    """Sines, then cosines, of a number times frequencies from 1 down to 1/10000."""
    exponents = torch.arange(width // 2, device=x.device, dtype=torch.float32) / (width // 2 - 1)
    phase = at_least_float32(x)[:, None] * 10000.0**-exponents
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def check_head_size(width: int, d_head: int) -> None:
    """Raises: ValueError if heads of this size do not fill the width, or cannot be rotated along their axes."""
    if d_head % 8 or width % d_head:
        raise ValueError(f"width={width}, d_head={d_head}: d_head must be a multiple of 8 and divide width")


def _norm(width: int, cond_width: int | None) -> nn.Module:
    return RMSNorm(width, gain="scale") if cond_width is None else AdaptiveRMSNorm(width, cond_width)
