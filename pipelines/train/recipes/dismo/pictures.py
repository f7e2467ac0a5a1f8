"""What DisMo makes of a source frame: source, target and generated frame side by side."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kinema.models.dismo import DisMo
from kinema.models.dismo.autoencoder import Autoencoder
from kinema.pipelines.pictures.images import panel

PICTURE_SAMPLES = 6


def generated_pictures(
    model: DisMo, autoencoder: Autoencoder, motion: Tensor, source: Tensor, target: Tensor, delta: Tensor, steps: int
) -> np.ndarray:
    """Rows of source, target, target through the autoencoder, and the frame generated in its place.

    Args: motion [B, T, S, S, 3] and source, target [B, P, S, S, 3] in -1..1; delta [B, P]. Each clip gives its last
        pair.
    """
    count = min(PICTURE_SAMPLES, len(source))
    sources, targets, deltas = source[:count, -1], target[:count, -1], delta[:count, -1]
    embeddings = model.motion_extractor(motion[:count])[:, -1]
    latents = autoencoder.encode(targets)
    generator = torch.Generator(sources.device).manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator, device=sources.device)
    made = model.frame_generator.sample(sources, embeddings, deltas, steps, noise=noise)
    columns = (sources, targets, autoencoder.decode(latents), autoencoder.decode(made))
    return panel([_pixels(column[row]) for row in range(count) for column in columns], columns=len(columns))


def _pixels(frame: Tensor) -> np.ndarray:
    """A frame in -1..1 as uint8."""
    return rearrange((frame.float().clamp(-1, 1) * 127.5 + 127.5).round().byte(), "h w c -> h w c").cpu().numpy()
