"""DisMo's frame generator: a rectified flow that makes a later frame of a source frame, given the motion between them.

Source: Ressler-Antal et al., "DisMo: Disentangled Motion Representations for Open-World Motion Transfer", NeurIPS 2025,
arXiv:2511.23428, section 3.2. Same numbers and state-dict keys as the published network. Deviation: `sample` keeps the
latent from step to step, which the published loop overwrites by tokens.

Shape legend: B batch, h w latent grid, c latent channels, H W pixels of the source frame, M its tokens, D width,
C conditioning width, E channels of the source encoder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.rotary_layers import AxialRotary, RMSNorm, at_least_float32, cell_centres
from kinema.models.dismo.layers import (
    FourierFeatures,
    FrameEncoder,
    MappingNetwork,
    TransformerLayer,
    check_head_size,
    sinusoidal_features,
)
from kinema.models.dismo.stack import run_layers
from kinema.models.weights import resolve_weights

DELTA_TIME_SCALE = 100.0
LATENT_CHANNELS = 4
PIXELS_PER_LATENT = 8


class TokenMerge(nn.Module):
    """Patches of a latent as tokens.

    Args: bias, whether tokens also have a part that does not depend on the latent. Without one, queries of the first
        layers are as random as the noise; a shallow network then has no layer left that could look at a place.
    """

    def __init__(self, channels: int, width: int, patch_size: Sequence[int], bias: bool = False):
        super().__init__()
        self.patch = tuple(patch_size)
        self.proj = nn.Linear(channels * self.patch[0] * self.patch[1], width, bias=bias)
        if bias:
            nn.init.normal_(self.proj.bias, std=0.5)

    def forward(self, x: Float[Tensor, "B h w c"]) -> Float[Tensor, "B h2 w2 D"]:
        rows, cols = self.patch
        return self.proj(rearrange(x, "b (h r) (w s) c -> b h w (r s c)", r=rows, s=cols).to(self.proj.weight.dtype))


class TokenSplit(nn.Module):
    """Tokens as patches of a latent."""

    def __init__(self, channels: int, width: int, patch_size: Sequence[int]):
        super().__init__()
        self.patch = tuple(patch_size)
        self.norm = RMSNorm(width, gain="scale")
        self.proj = nn.Linear(width, channels * self.patch[0] * self.patch[1], bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Float[Tensor, "B h2 w2 D"]) -> Float[Tensor, "B h w c"]:
        rows, cols = self.patch
        return rearrange(self.proj(self.norm(x)), "b h w (r s c) -> b (h r) (w s) c", r=rows, s=cols)


class Transformer(nn.Module):
    """The layers and the rotary positions they share: half of each head is turned."""

    def __init__(self, width: int, depth: int, d_head: int, cond_width: int, context_width: int):
        super().__init__()
        self.checkpoint_layers = False
        self.pos_emb = AxialRotary(d_head, width // d_head, slots=d_head // 8)
        self.layers = nn.ModuleList(TransformerLayer(width, d_head, cond_width, context_width) for _ in range(depth))

    def forward(
        self, x: Float[Tensor, "B h w D"], cond: Float[Tensor, "B C"], context: Float[Tensor, "B y x E"]
    ) -> Float[Tensor, "B h w D"]:
        """Tokens of a latent after looking at one another and at the context."""
        theta, context_theta = (self._angles(tokens) for tokens in (x, context))
        tokens, seen = (rearrange(t, "b h w d -> b (h w) d") for t in (at_least_float32(x), context))
        arguments = (theta, cond, seen, context_theta)
        tokens = run_layers(self.layers, tokens, *arguments, checkpoint=self.checkpoint_layers)
        return rearrange(tokens, "b (h w) d -> b h w d", h=x.shape[1])

    def _angles(self, tokens: Float[Tensor, "B h w _"]) -> Float[Tensor, "1 H n R"]:
        centres = cell_centres(tokens.shape[1], tokens.shape[2], device=tokens.device)
        return self.pos_emb(rearrange(centres, "h w c -> 1 (h w) c"))


class FrameGenerator(nn.Module):
    """Velocity of a rectified flow from noise to a target frame's latent; the defaults are the published network's.

    Args:
        width: token width, a multiple of `d_head`.
        depth: number of layers.
        d_head: width of an attention head, a multiple of 8.
        d_motion: width of a motion embedding.
        source_encoder_params: arguments of `FrameEncoder`.
        patch_size: rows and columns of the latent that make a token.
        mapping_depth, mapping_width: of the network that makes the conditioning.
        latent_channels: channels of the latent.
        token_bias: see `TokenMerge`; not in the published network.
    """

    def __init__(
        self,
        width: int = 1152,
        depth: int = 28,
        d_head: int = 72,
        d_motion: int = 128,
        source_encoder_params: Mapping[str, Any] | None = None,
        patch_size: Sequence[int] = (2, 2),
        mapping_depth: int = 2,
        mapping_width: int = 1024,
        latent_channels: int = LATENT_CHANNELS,
        token_bias: bool = False,
    ):
        super().__init__()
        check_head_size(width, d_head)
        self.mapping_width = mapping_width
        self.latent_channels = latent_channels
        self.source_encoder = FrameEncoder(**(source_encoder_params or {"model_version": "dinov2_vitl14_reg"}))
        self.transformer = Transformer(width, depth, d_head, mapping_width, self.source_encoder.width)
        self.token_merge = TokenMerge(latent_channels, width, patch_size, token_bias)
        self.token_split = TokenSplit(latent_channels, width, patch_size)
        self.mapping = MappingNetwork(mapping_width, mapping_depth)
        self.time_emb = FourierFeatures(mapping_width)
        self.time_in_proj = nn.Linear(mapping_width, mapping_width, bias=False)
        self.motion_proj = nn.Linear(d_motion + mapping_width, mapping_width, bias=False)

    def forward(
        self,
        z: Float[Tensor, "B h w c"],
        t: Float[Tensor, "B"],
        source_frames: Float[Tensor, "B H W 3"],
        motion: Float[Tensor, "B d"],
        delta_times: Float[Tensor, "B"],
    ) -> Float[Tensor, "B h w c"]:
        """Velocity at the noisy latents z.

        Args:
            z: (1 - t) target latent + t noise.
            t: share of noise, 0..1.
            source_frames: frames in -1..1.
            motion: embeddings of the motion at the source frames.
            delta_times: time from source to target in frames of the clip that the embeddings were made from.
        """
        return self._velocity(z, t, self.source_encoder(source_frames), self._motion_token(motion, delta_times))

    def loss(
        self,
        latent: Float[Tensor, "B h w c"],
        source_frames: Float[Tensor, "B H W 3"],
        motion: Float[Tensor, "B d"],
        delta_times: Float[Tensor, "B"],
        noise: Float[Tensor, "B h w c"] | None = None,
        t: Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B"]:
        """Mean squared error of the velocity per sample; noise and its share are drawn where they are not given."""
        latent = at_least_float32(latent)
        noise = torch.randn_like(latent) if noise is None else noise
        t = torch.randn(len(latent), device=latent.device).sigmoid() if t is None else t
        share = rearrange(t, "b -> b 1 1 1")
        velocity = self((1 - share) * latent + share * noise, t, source_frames, motion, delta_times)
        return (noise - latent - velocity.to(latent.dtype)).square().mean(dim=(1, 2, 3))

    @torch.no_grad()
    def sample(
        self,
        source_frames: Float[Tensor, "B H W 3"],
        motion: Float[Tensor, "B d"],
        delta_times: Float[Tensor, "B"],
        num_steps: int = 50,
        latent_size: tuple[int, int] | None = None,
        noise: Float[Tensor, "B h w c"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B h w c"]:
        """Latents of target frames: noise carried along the velocity from t = 1 to 0 in equal steps.

        Args:
            latent_size: rows and columns; by default an eighth of the source frames'.
            noise: where to start; drawn (by `generator`, on its device) if not given.
        Raises: ValueError for num_steps below 1, or a latent that patches do not tile.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: at least one step is needed")
        if noise is None:
            height, width = latent_size or tuple(side // PIXELS_PER_LATENT for side in source_frames.shape[1:3])
            shape = (len(source_frames), height, width, self.latent_channels)
            noise = torch.randn(shape, generator=generator, device=generator.device if generator else None)
        rows, cols = self.token_merge.patch
        if noise.shape[1] % rows or noise.shape[2] % cols or not noise.shape[1] * noise.shape[2]:
            raise ValueError(
                f"a latent of {noise.shape[1]}x{noise.shape[2]} is not tiled by patches of {rows}x{cols}; "
                "give latent_size=(height, width) in multiples of them"
            )
        z = at_least_float32(noise).to(source_frames.device)
        features = self.source_encoder(source_frames)
        motion_token = self._motion_token(motion, delta_times)
        for step in range(num_steps):
            t = z.new_full((len(z),), 1 - step / num_steps)
            z = z - self._velocity(z, t, features, motion_token).to(z.dtype) / num_steps
        return z

    def conditioning(
        self, t: Float[Tensor, "B"], motion: Float[Tensor, "B d"], delta_times: Float[Tensor, "B"]
    ) -> Float[Tensor, "B C"]:
        """What sets the gains of the norms: share of noise, motion and time to the target."""
        return self._condition(t, self._motion_token(motion, delta_times))

    def _motion_token(self, motion: Float[Tensor, "B d"], delta_times: Float[Tensor, "B"]) -> Float[Tensor, "B C"]:
        elapsed = sinusoidal_features(delta_times * DELTA_TIME_SCALE, self.mapping_width)
        return self.motion_proj(torch.cat([motion, elapsed], dim=-1).to(self.motion_proj.weight.dtype))

    def _condition(self, t: Float[Tensor, "B"], motion_token: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        return self.mapping(motion_token + self.time_in_proj(self.time_emb(t).to(self.time_in_proj.weight.dtype)))

    def _velocity(
        self,
        z: Float[Tensor, "B h w c"],
        t: Float[Tensor, "B"],
        features: Float[Tensor, "B y x E"],
        motion_token: Float[Tensor, "B C"],
    ) -> Float[Tensor, "B h w c"]:
        cond = self._condition(t, motion_token)
        return self.token_split(self.transformer(self.token_merge(z), cond, features))


def frame_generator_large(pretrained: bool = False, weights: str | Path | None = None) -> FrameGenerator:
    """The frame generator of the paper, in eval mode.

    Args:
        pretrained: no weights are published; asking for them is an error.
        weights: path or URL of a checkpoint to load.
    Raises: ValueError for weights that do not fit.
    """
    return resolve_weights(FrameGenerator(), "frame_generator_large", pretrained, weights).eval()
