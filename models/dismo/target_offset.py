"""How far a target frame lies behind its source: a Gamma density over seconds, cut off at the lookahead.

Source: Ressler-Antal et al., arXiv:2511.23428, appendix: Gamma(3, 12), truncated at 4 frames of the clip.
"""

import torch
from jaxtyping import Float
from torch import Tensor

CONCENTRATION = 3.0
RATE_PER_S = 12.0
MAX_OFFSET = 4
"""Frames of the clip."""


def offset_probabilities(fps: float, stride: int, max_offset: int = MAX_OFFSET) -> Float[Tensor, "K"]:
    """Probability that the target is k frames of the video behind its source, k = 0 .. max_offset * stride.

    Args:
        fps: of the video.
        stride: frames of the video per frame of the clip.
        max_offset: farthest target in frames of the clip.
    """
    seconds = torch.arange(max_offset * stride + 1, dtype=torch.float32) / fps
    density = seconds ** (CONCENTRATION - 1) * (-RATE_PER_S * seconds).exp()
    return density / density.sum()


def draw_offsets(probabilities: Float[Tensor, "K"], num_sources: int, generator: torch.Generator) -> list[int]:
    """Offsets of the sources of a clip, in frames of the video, drawn independently."""
    return torch.multinomial(probabilities, num_sources, replacement=True, generator=generator).tolist()
