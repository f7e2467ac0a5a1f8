"""Probes that read a segmentation out of frozen FlowFeat features.

Source: Araslanov, Sonnweber, Cremers, FlowFeat, NeurIPS 2025, evaluation. Deviations: none.

Shape legend: B batch, C feature channels, Q classes, H W feature map.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a set of features."""

    def __init__(self, width: int, num_heads: int = 8):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not divisible by num_heads={num_heads}; change one of them")
        self.num_heads = num_heads
        self.projq = nn.Linear(width, width, bias=False)
        self.projk = nn.Linear(width, width, bias=False)
        self.projv = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Float[Tensor, "B Q C"], features: Float[Tensor, "B N C"]) -> Tensor:
        """Attended features of every query, [B, Q, C]."""
        q, k, v = (
            rearrange(layer(x), "b n (heads e) -> b heads n e", heads=self.num_heads)
            for layer, x in ((self.projq, queries), (self.projk, features), (self.projv, features))
        )
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n e -> b n (heads e)"))


class CrossAttentionProbe(nn.Module):
    """One learnt query per class looks at the whole map and becomes that class's linear filter.

    Args:
        dim: channels of the feature map.
        num_queries: number of classes.
        with_norm: LayerNorms on features, on queries, and on attended queries.
        downscale: the map that queries look at is this many times smaller.
    """

    def __init__(self, dim: int, num_queries: int, with_norm: bool = False, downscale: int = 1):
        super().__init__()
        self.downscale = downscale
        self.queries = nn.Parameter(0.1 * torch.randn(1, num_queries, dim) / dim)
        self.cross_attn = CrossAttention(dim)
        self.norm = nn.LayerNorm(dim) if with_norm else nn.Identity()
        self.norm1 = nn.LayerNorm(dim) if with_norm else nn.Identity()
        self.norm2 = nn.LayerNorm(dim) if with_norm else nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B Q H W"]:
        """Class logits: features . attended queries / C.

        Raises: ValueError if the map is smaller than `downscale`.
        """
        height, width = x.shape[-2:]
        small = (height // self.downscale, width // self.downscale)
        if 0 in small:
            raise ValueError(
                f"feature map {height}x{width} is smaller than downscale={self.downscale}; use a smaller one"
            )
        seen = F.interpolate(x, size=small, mode="bilinear", align_corners=False)
        queries = self.norm1(self.queries).expand(x.shape[0], -1, -1)
        filters = self.norm2(self.cross_attn(queries, self.norm(_pixels(seen))))  # [B, Q, C]
        logits = filters @ self.norm(_pixels(x)).transpose(1, 2) / x.shape[1]
        return rearrange(logits, "b q (h w) -> b q h w", h=height)


class AttentionProbe(nn.Module):
    """FlowFeat's probe: a linear layer on y_enc plus a cross-attention probe on y_dec.

    Args:
        dim_enc, dim_dec: channels of the two maps.
        num_classes: number of classes Q.
        with_norm, downscale: as in `CrossAttentionProbe`.
    """

    def __init__(self, dim_enc: int, dim_dec: int, num_classes: int, with_norm: bool = False, downscale: int = 1):
        super().__init__()
        linear = nn.Conv2d(dim_enc, num_classes, 1)
        self.probe = nn.ModuleList(
            [linear, CrossAttentionProbe(dim_dec, num_classes, with_norm=with_norm, downscale=downscale)]
        )

    def forward(self, y_enc: Float[Tensor, "B D h w"], y_dec: Float[Tensor, "B C H W"]) -> Tensor:
        """Class logits at y_dec's size, [B, Q, H, W]."""
        coarse = F.interpolate(self.probe[0](y_enc), y_dec.shape[-2:], mode="bilinear", align_corners=False)
        return coarse + self.probe[1](y_dec)


def _pixels(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N C"]:
    return rearrange(x, "b c h w -> b (h w) c")
