"""Training objective of the video transformer under the adapter: velocity prediction, loss on the clean latent.

Source: Ressler-Antal et al., arXiv:2511.23428, appendix; Salimans and Ho, arXiv:2202.00512 (velocity); Lin et al.,
arXiv:2305.08891 (zero terminal signal-to-noise ratio).

Shape legend: B batch, S diffusion steps.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

NUM_STEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012


def signal_shares(num_steps: int = NUM_STEPS) -> Float[Tensor, "S"]:
    """Share a of the signal's power in the noisy latent at every step; 0 at the last.

    Betas are linear in their square roots; sqrt(a) is then shifted and scaled so that it ends at 0.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, num_steps, dtype=torch.float64).square()
    root = (1 - betas).cumprod(0).sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square().float()


def add_noise(latent: Tensor, noise: Tensor, steps: Int[Tensor, "B"], shares: Float[Tensor, "S"]) -> Tensor:
    """sqrt(a) latent + sqrt(1 - a) noise."""
    a = _at(shares, steps, latent)
    return a.sqrt() * latent + (1 - a).sqrt() * noise


def clean_latent(noisy: Tensor, velocity: Tensor, steps: Int[Tensor, "B"], shares: Float[Tensor, "S"]) -> Tensor:
    """The latent that a predicted velocity means: sqrt(a) noisy - sqrt(1 - a) velocity."""
    a = _at(shares, steps, noisy)
    return a.sqrt() * noisy - (1 - a).sqrt() * velocity


def latent_loss(
    velocity: Tensor, latent: Tensor, noisy: Tensor, steps: Int[Tensor, "B"], shares: Float[Tensor, "S"]
) -> Float[Tensor, "B"]:
    """Squared error of the clean latent, weighted 1 / (1 - a), mean over a sample."""
    error = (clean_latent(noisy, velocity, steps, shares) - latent).square()
    return (error / (1 - _at(shares, steps, latent))).flatten(1).mean(dim=1)


def image_noise(picture: Tensor) -> Tensor:
    """The condition picture, in -1..1, under noise of a random size, exp(N(-3, 0.5)), as in training."""
    shape = (len(picture), *[1] * (picture.ndim - 1))
    size = (torch.randn(shape, device=picture.device, dtype=picture.dtype) * 0.5 - 3).exp()
    return picture + size * torch.randn_like(picture)


def _at(shares: Tensor, steps: Tensor, like: Tensor) -> Tensor:
    return shares.to(like.device, like.dtype)[steps].view(-1, *[1] * (like.ndim - 1))
