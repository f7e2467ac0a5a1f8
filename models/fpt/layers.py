"""Building blocks of the Flow Poke Transformer: image encoder, token input, transformer with two attentions, head.

Source: Baumann et al., "What If: Understanding Motion Through Sparse Interactions", ICCV 2025, arXiv:2510.12777,
section 3, and its published code. State-dict keys equal the published file's.

Precision: weights may be of any floating dtype and autocast may be on. Positions, flow embedding, norms, the residual
stream and the head are computed in float32 (float64 in a float64 model), matrix products in the dtype asked for.

Shape legend: B batch, I images (1 that all share, or B), L tokens, D width, E channels of the image encoder, h w its
grid, M = h w, H heads, e head size, R rotary angles, C tokens in a cache.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kinema.kernels.cosine_attention import AttentionPattern, cosine_attention
from kinema.kernels.dispatch import without_autocast
from kinema.kernels.recompute import made_again
from kinema.models.backbones.inference_linear import Linear
from kinema.models.backbones.rotary_layers import (
    NORM_EPS,
    AdaptiveRMSNorm,
    AxialRotary,
    ExactConstants,
    RMSNorm,
    at_least_float32,
)
from kinema.models.backbones.vision_transformer import VisionTransformer, ViTConfig
from kinema.models.fpt.data_rules import central_square

COSINE_EPS = 1e-6
INPUT_NORM_EPS = torch.finfo(torch.float32).eps
"""The published input norm names no epsilon, and torch then takes that of the input's dtype; float32's is meant."""
FLOW_PRESCALE = 0.5
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageEncoder(nn.Module):
    """A vision transformer over the central square of an image: its normed patch tokens as a map."""

    def __init__(self, config: ViTConfig, image_size: int):
        super().__init__()
        if image_size % config.patch_size:
            raise ValueError(
                f"image_size={image_size} is not a multiple of the encoder's patch, {config.patch_size}; "
                f"use {max(1, round(image_size / config.patch_size)) * config.patch_size}"
            )
        self.model = VisionTransformer(config, image_size=(image_size, image_size))
        self.image_size = image_size

    @property
    def grid(self) -> int:
        """Side of the feature map."""
        return self.image_size // self.model.patch_size

    def forward(self, image: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E h w"]:
        """Features of images in -1..1 of any size; what lies outside the central square is not seen."""
        image = at_least_float32(image)
        top, left, side = central_square(*image.shape[-2:])
        square = image[..., top : top + side, left : left + side]
        square = F.interpolate(square, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        mean, std = (square.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        tokens = self.model((((square + 1) / 2 - mean) / std).to(self.model.cls_token.dtype))
        patches = tokens[:, self.model.num_prefix_tokens :]
        return rearrange(patches, "b (h w) e -> b e h w", h=self.grid)


class ResidualMlp(nn.Sequential):
    """Norm and two linear layers beside an identity."""

    def __init__(self, width: int):
        super().__init__(
            RMSNorm(width, INPUT_NORM_EPS),
            Linear(width, width, bias=False),
            nn.SiLU(),
            Linear(width, width, bias=False),
        )

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return x + super().forward(x)


class TokenInput(ExactConstants):
    """Tokens from what is known at points: the flow of pokes, a learnt vector for queries, and image features."""

    constant_names = ("coeffs",)
    coeffs: Tensor

    def __init__(self, width: int, feature_width: int, depth: int = 2):
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(2 * width + feature_width, width, bias=False), *(ResidualMlp(width) for _ in range(depth))
        )
        self.query_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, 2 * width)))
        self.register_buffer("coeffs", (2 * math.pi * torch.arange(1, width // 2 + 1)).view(1, 1, 1, -1))

    def forward(
        self,
        pos: Float[Tensor, "B L 2"],
        flow: Float[Tensor, "B L 2"],
        is_query: Bool[Tensor, "B L"],
        features: Float[Tensor, "B E h w"],
    ) -> Float[Tensor, "B L D"]:
        """Tokens of points at `pos` in 0..1 with `flow` in the same units (any value where `is_query`)."""
        embedded = torch.where(is_query[..., None], self.query_token.to(self.coeffs.dtype), self._fourier(flow))
        features = at_least_float32(features)
        grid = pos[:, :, None].to(features.dtype) * 2 - 1
        # Positions are centres of pixels, yet the published model samples as if 0 and 1 were the outer cells' centres.
        sampled = F.grid_sample(features, grid, mode="bilinear", align_corners=True, padding_mode="border")
        joint = torch.cat([embedded, rearrange(sampled, "b e l 1 -> b l e")], dim=-1)
        return self.mlp(joint.to(self.query_token.dtype))

    def _fourier(self, flow: Tensor) -> Tensor:
        """Sines and cosines of the squashed flow, x then y: [B, L, 2 D]. Narrower than float32 would be noise."""
        squashed = ((flow.to(self.coeffs.dtype) * FLOW_PRESCALE).tanh() + 1) / 2
        phase = squashed[..., None] * self.coeffs  # [B, L, 2, D / 2]
        return rearrange([phase.sin(), phase.cos()], "part b l xy d -> b l (xy part d)")


@dataclass(frozen=True)
class Rotation:
    """Scales heads to a length and turns them by angles, whose sines and cosines are computed once."""

    cos: Float[Tensor, "B H L e"]
    """Of both halves of a head."""
    sin: Float[Tensor, "B H L e"]
    """The same; that of the first half is negative."""

    @classmethod
    def by(cls, theta: Float[Tensor, "B H L R"]) -> "Rotation":
        """By these angles."""
        cos, sin = theta.cos(), theta.sin()
        return cls(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))

    def tokens(self, part: slice) -> "Rotation":
        """The rotation of some of the tokens."""
        return Rotation(self.cos[:, :, part], self.sin[:, :, part])

    def __call__(self, x: Float[Tensor, "*B H L e"], length: Float[Tensor, "H 1 1"]) -> Float[Tensor, "*B H L e"]:
        wide = at_least_float32(x)
        unit = wide * (length * torch.rsqrt(wide.square().sum(-1, keepdim=True) + COSINE_EPS))
        swapped = unit.roll(unit.shape[-1] // 2, dims=-1)
        return torch.addcmul(unit * self.cos, swapped, self.sin).to(x.dtype)


@dataclass
class LayerCache:
    """What one layer remembers between the steps of sampling. Keys are scaled to unit length and rotated.

    The condition stays the same from step to step, and so do the gains of the three norms. Lengths are what queries and
    keys of the two attentions are scaled to.
    """

    self_gain: Float[Tensor, "B 1 D"]
    cross_gain: Float[Tensor, "B 1 D"]
    ffn_gain: Float[Tensor, "B 1 D"]

    self_length: Float[Tensor, "H 1 1"]
    cross_length: Float[Tensor, "H 1 1"]

    keys: Float[Tensor, "B H C e"]
    values: Float[Tensor, "B H C e"]
    image: Float[Tensor, "2 I H M e"]


class TransformerLayer(nn.Module):
    """Self-attention among points, cross-attention to the image, gated feed-forward; each behind an adaptive norm."""

    def __init__(self, width: int, feature_width: int, head_dim: int, expansion: int = 3):
        super().__init__()
        self.head_dim = head_dim
        self.num_heads = width // head_dim
        self.self_norm, self.cross_norm, self.ffn_norm = (AdaptiveRMSNorm(width) for _ in range(3))
        self.self_qkv = Linear(width, 3 * width, bias=False)
        self.self_out = Linear(width, width, bias=False)
        self.cross_q = Linear(width, width, bias=False)
        self.cross_kv = Linear(feature_width, 2 * width, bias=False)
        # Never used: the published model adds the cross-attention as it is, but its checkpoint holds this.
        self.cross_out = Linear(width, width, bias=False)
        self.ffn_up = Linear(width, 2 * expansion * width, bias=False)
        self.ffn_down = Linear(expansion * width, width, bias=False)
        self.self_scale = nn.Parameter(torch.full((self.num_heads,), 10.0))
        self.cross_scale = nn.Parameter(torch.full((self.num_heads,), 10.0))
        for closed in (self.self_out, self.cross_out, self.ffn_down):
            nn.init.zeros_(closed.weight)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        features: Float[Tensor, "I M E"],
        keys_values: Float[Tensor, "2 I H M e"] | None,
        theta: Float[Tensor, "B H L R"],
        image_theta: Float[Tensor, "I H M R"],
        cond: Float[Tensor, "B D"],
        pattern: AttentionPattern,
    ) -> Float[Tensor, "B L D"]:
        """One layer over all tokens; `keys_values`, from `image_keys_values`, stand for the features if given."""
        q, k, v = self._heads(made_again(lambda x: self.self_qkv(self.self_norm(x, cond)), x))
        attended = cosine_attention(q, k, v, theta, theta, self.self_scale, pattern)
        x = x + self.self_out(_merge_heads(attended))
        q = self._heads(made_again(lambda x: self.cross_q(self.cross_norm(x, cond)), x))[0]
        if keys_values is None:
            k, v = (part.expand(len(x), -1, -1, -1).to(q.dtype) for part in self._heads(self.cross_kv(features)))
            attended = cosine_attention(q, k, v, theta, image_theta, self.cross_scale, "full")
        else:
            attended = _look(prepare(q, theta, self.cross_scale), keys_values)
        x = x + _merge_heads(attended)
        up = made_again(lambda x: self.ffn_up(self.ffn_norm(x, cond)), x)
        return x + made_again(self._gated, up)

    def image_keys_values(
        self, features: Float[Tensor, "I M E"], image_theta: Float[Tensor, "I H M R"]
    ) -> Float[Tensor, "2 I H M e"]:
        """Keys of the image, ready for inner products (`prepare`), and values, to be computed once per image."""
        k, v = self._heads(self.cross_kv(features))
        return torch.stack([prepare(k, image_theta, self.cross_scale), v])

    def new_cache(
        self,
        keys_values: Float[Tensor, "2 I H M e"],
        cond: Float[Tensor, "B D"],
        length: int,
    ) -> LayerCache:
        """An empty cache for `length` tokens, in the dtype of the image's keys."""
        shape = (len(cond), self.num_heads, length, self.head_dim)
        return LayerCache(
            self_gain=self.self_norm.gain(cond),
            cross_gain=self.cross_norm.gain(cond),
            ffn_gain=self.ffn_norm.gain(cond),
            self_length=length_of(self.self_scale),
            cross_length=length_of(self.cross_scale),
            keys=keys_values.new_empty(shape),
            values=keys_values.new_empty(shape),
            image=keys_values,
        )

    def step(
        self,
        x: Float[Tensor, "B L D"],
        cache: LayerCache,
        start: int,
        rotation: Rotation,
        visible: Bool[Tensor, "L C"] | None,
        only_last: bool = False,
    ) -> Float[Tensor, "B _ D"]:
        """The layer over new tokens that continue a cached sequence at index `start`; writes them to the cache.

        Args:
            visible: which of the start + L cached tokens each new one sees; None is causal from an empty cache.
            only_last: return no more than the last token, which sees all; for the last layer.
        """
        qkv = self._heads(self.self_qkv(self.self_norm.scale(x, cache.self_gain)))
        end = start + x.shape[1]
        q, k = rotation(qkv[:2], cache.self_length)
        cache.keys[:, :, start:end] = k
        cache.values[:, :, start:end] = qkv[2]
        keys, values = cache.keys[:, :, :end], cache.values[:, :, :end]
        is_causal = visible is None
        if only_last:
            last = slice(-1, None)
            x, q, rotation, visible, is_causal = x[:, last], q[:, :, last], rotation.tokens(last), None, False
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, is_causal=is_causal, scale=1.0)
        x = x + self.self_out(_merge_heads(attended))
        q = self._heads(self.cross_q(self.cross_norm.scale(x, cache.cross_gain)))[0]
        x = x + _merge_heads(_look(rotation(q, cache.cross_length), cache.image))
        return x + self._gated(self.ffn_up(self.ffn_norm.scale(x, cache.ffn_gain)))

    def _heads(self, x: Float[Tensor, "B L _"]) -> Float[Tensor, "n B H L e"]:
        # A view: einops looks its pattern up again at every call, a tenth of the time of sampling token by token.
        return x.unflatten(-1, (-1, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)

    def _gated(self, up_and_gate: Float[Tensor, "B L _"]) -> Float[Tensor, "B L D"]:
        up, gate = up_and_gate.chunk(2, dim=-1)
        return self.ffn_down(up * F.silu(gate))


def _merge_heads(x: Float[Tensor, "B H L e"]) -> Float[Tensor, "B L D"]:
    return x.transpose(1, 2).flatten(2)


def _look(q: Float[Tensor, "B H L e"], keys_values: Float[Tensor, "2 I H M e"]) -> Float[Tensor, "B H L e"]:
    """Cross-attention of prepared queries to an image whose keys are ready."""
    keys, values = keys_values.to(q.dtype)
    if len(keys) == len(q):
        return F.scaled_dot_product_attention(q, keys, values, scale=1.0)
    # One image for all: its keys are read once, for the tokens of the whole batch.
    tokens = q.transpose(0, 1).flatten(1, 2)[None]
    attended = F.scaled_dot_product_attention(tokens, keys, values, scale=1.0)[0]
    return attended.unflatten(1, (len(q), q.shape[2])).transpose(0, 1)


def length_of(scale: Float[Tensor, "H"]) -> Float[Tensor, "H 1 1"]:
    """What queries and keys are scaled to for logits of `cosine_attention`, in float32 or better."""
    return (at_least_float32(scale).abs() + COSINE_EPS).sqrt()[:, None, None]


def prepare(
    x: Float[Tensor, "*B H L e"], theta: Float[Tensor, "_ H L R"], scale: Float[Tensor, "H"]
) -> Float[Tensor, "*B H L e"]:
    """Queries or keys whose plain inner products are the logits of `cosine_attention`; for caches."""
    return Rotation.by(theta)(x, length_of(scale))


class Transformer(nn.Module):
    """The layers and the rotary positions they share."""

    def __init__(self, width: int, depth: int, feature_width: int, head_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(width, feature_width, head_dim) for _ in range(depth))
        self.pos_emb = AxialRotary(head_dim, width // head_dim)

    def image_weights(self) -> list[Tensor]:
        """Parameters that what is attended to in an image depends on."""
        layers = self.layer_list()
        projections = [weight for layer in layers for weight in layer.cross_kv.parameters()]
        return [*projections, *(layer.cross_scale for layer in layers), self.pos_emb.freqs]

    def layer_list(self) -> list[TransformerLayer]:
        """The layers, first to last."""
        return list(self.layers)  # type: ignore[arg-type]  # a ModuleList forgets what it holds

    def image_keys_values(
        self, features: Float[Tensor, "I E h w"], feature_pos: Float[Tensor, "I h w 2"]
    ) -> Float[Tensor, "layers 2 I H M e"]:
        """What every layer attends to in the image: keys ready for inner products, and values."""
        flat, theta = features.flatten(2).mT, self.pos_emb(feature_pos.flatten(1, 2))
        return torch.stack([layer.image_keys_values(flat, theta) for layer in self.layer_list()])

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        pos: Float[Tensor, "B L 2"],
        features: Float[Tensor, "I E h w"],
        feature_pos: Float[Tensor, "I h w 2"],
        keys_values: Float[Tensor, "layers 2 I H M e"] | None,
        cond: Float[Tensor, "B D"],
        pattern: AttentionPattern,
    ) -> Float[Tensor, "B L D"]:
        """Tokens after all layers. `keys_values`, if there are any, save projecting the image."""
        theta, image_theta = self.pos_emb(pos), self.pos_emb(rearrange(feature_pos, "i h w xy -> i (h w) xy"))
        flat = rearrange(features, "i e h w -> i (h w) e")
        x = at_least_float32(x)
        for index, layer in enumerate(self.layer_list()):
            image = None if keys_values is None else keys_values[index]
            x = layer(x, flat, image, theta, image_theta, cond, pattern)
        return x


class HeadMlp(nn.Sequential):
    """Norm and perceptron to the raw parameters of the mixture, in float32 or better also under autocast."""

    def __init__(self, width: int, num_outputs: int, depth: int = 2):
        hidden = [layer for _ in range(depth) for layer in (Linear(width, width), nn.SiLU())]
        super().__init__(RMSNorm(width, NORM_EPS), *hidden, Linear(width, num_outputs))

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L outputs"]:
        with without_autocast(x):
            return super().forward(x)
