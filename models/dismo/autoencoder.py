"""Image autoencoders between frames and the latents that the frame generator makes.

`pixels` needs no weights: a latent is the frame itself, averaged over squares. Every other name is a tiny autoencoder
(TAESD) by diffusers, from a folder or from the hub; the optional extra `transfer` brings it.
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

EXTRA = "pip install 'kinema[transfer]'"


@runtime_checkable
class Autoencoder(Protocol):
    """Both ways between frames in -1..1 and latents; neither way keeps a gradient."""

    pixels_per_latent: int
    """Side of the square of pixels that a latent stands for."""
    channels: int
    """Of the latents."""

    def encode(self, frames: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B h w c"]:
        """Latents of frames whose sides are multiples of `pixels_per_latent`."""

    def decode(self, latents: Float[Tensor, "B h w c"]) -> Float[Tensor, "B H W 3"]:
        """Frames of latents, clamped to -1..1."""


class PixelAutoencoder:
    """Frames averaged over squares, and enlarged again.

    Args: gain, factor of the latents: frames in -1..1 vary less than the noise that is added to latents.
    """

    channels = 3

    def __init__(self, pixels_per_latent: int, gain: float = 1.0):
        self.pixels_per_latent = pixels_per_latent
        self.gain = gain

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B h w c"]:
        """See `Autoencoder`."""
        _check_tiles(frames, self.pixels_per_latent)
        planes = F.avg_pool2d(rearrange(frames, "b h w c -> b c h w"), self.pixels_per_latent)
        return rearrange(planes, "b c h w -> b h w c") * self.gain

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B h w c"]) -> Float[Tensor, "B H W 3"]:
        """See `Autoencoder`."""
        planes = rearrange(latents / self.gain, "b h w c -> b c h w")
        large = F.interpolate(planes, scale_factor=self.pixels_per_latent, mode="bilinear", align_corners=False)
        return rearrange(large, "b c h w -> b h w c").clamp(-1, 1)


class TinyAutoencoder:
    """A tiny autoencoder of diffusers' form (4 latent channels, an eighth of the side), frozen.

    Args: network, diffusers' AutoencoderTiny.
    """

    def __init__(self, network: Any):
        self.network = network.eval().requires_grad_(False)
        self.pixels_per_latent = 2 ** (len(network.config.encoder_block_out_channels) - 1)
        self.channels = network.config.latent_channels

    @torch.no_grad()
    def encode(self, frames: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B h w c"]:
        """See `Autoencoder`; the latents are neither scaled nor clamped."""
        _check_tiles(frames, self.pixels_per_latent)
        return rearrange(self.network.encode(self._planes(frames)).latents, "b c h w -> b h w c")

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B h w c"]) -> Float[Tensor, "B H W 3"]:
        """See `Autoencoder`."""
        return rearrange(self.network.decode(self._planes(latents)).sample, "b c h w -> b h w c").clamp(-1, 1)

    def _planes(self, x: Float[Tensor, "B h w c"]) -> Float[Tensor, "B c h w"]:
        weight = next(self.network.parameters())
        return rearrange(x, "b h w c -> b c h w").to(weight.device, weight.dtype)


def load_autoencoder(
    name: str, pixels_per_latent: int = 8, device: torch.device | str = "cpu", pixel_gain: float = 1.0
) -> Autoencoder:
    """An autoencoder by name.

    Args: name, `pixels`, a folder in diffusers' form, or a name on the hub such as `madebyollin/taesd`;
        pixels_per_latent and pixel_gain, for `pixels`.
    Raises: ValueError if the extra is not installed, or if there is no autoencoder of that name.
    """
    if name == "pixels":
        return PixelAutoencoder(pixels_per_latent, pixel_gain)
    try:
        from diffusers import AutoencoderTiny  # an optional dependency
    except ImportError as error:
        raise ValueError(f"autoencoder={name} needs diffusers, which is not installed ({error}): {EXTRA}") from None
    try:
        network = AutoencoderTiny.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"autoencoder={name} cannot be loaded ({reason}); give a folder that diffusers' AutoencoderTiny wrote, a "
            "name on the hub, or pixels"
        ) from None
    return TinyAutoencoder(network.to(device))


def _check_tiles(frames: Tensor, side: int) -> None:
    height, width = frames.shape[1:3]
    if height % side or width % side:
        raise ValueError(f"frames of {height}x{width} are not tiled by latents of {side}x{side} pixels")
