"""Which frames of a video make a training clip, and how far a target frame lies behind its source.

Frames are chosen by time: a clip has a fixed number of frames a second whatever the video's own rate. A target's
distance follows a Gamma density over seconds, cut off at the lookahead.

Source: Ressler-Antal et al., arXiv:2511.23428, appendix: 6 frames a second, Gamma(3, 12) up to 4 frames of the clip.
Deviation: the published loader takes every n-th frame, n the rounded ratio of the rates.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CONCENTRATION = 3.0
RATE_PER_S = 12.0
_TOLERANCE_S = 1e-6


def offset_probabilities(seconds: Float[Tensor, "K"], rate_per_s: float = RATE_PER_S) -> Float[Tensor, "K"]:
    """Probabilities of targets this many seconds behind their source: a Gamma density, normalised."""
    density = seconds ** (CONCENTRATION - 1) * (-rate_per_s * seconds).exp()
    return density / density.sum()


def frame_times(pts: Sequence[int], time_base: Sequence[int]) -> Float[np.ndarray, "N"]:
    """When each frame is shown, in seconds; time_base is (numerator, denominator)."""
    return np.asarray(pts, np.float64) * (time_base[0] / time_base[1])


def clip_frames(
    times_s: Float[np.ndarray, "N"], fps: float, num_frames: int, rng: np.random.Generator
) -> Int[np.ndarray, "T"] | None:
    """Frames nearest to `num_frames` evenly spaced moments from a random frame on.

    Args: times_s, when each frame of the video is shown, increasing; fps, frames of the clip a second.
    Returns: None if the video is too short, or has fewer frames a second than the clip.
    """
    last = times_s[-1] - (num_frames - 1) / fps
    starts = np.flatnonzero(times_s <= last + _TOLERANCE_S)
    if not len(starts):
        return None
    chosen = nearest_frames(times_s, times_s[rng.choice(starts)] + np.arange(num_frames) / fps)
    return chosen if (np.diff(chosen) > 0).all() else None


def nearest_frames(times_s: Float[np.ndarray, "N"], moments_s: Float[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
    """The frame shown closest to each moment."""
    if len(times_s) == 1:
        return np.zeros(len(moments_s), np.int64)
    after = np.searchsorted(times_s, moments_s).clip(1, len(times_s) - 1)
    return after - (moments_s - times_s[after - 1] <= times_s[after] - moments_s)


def frames_at_rate(times_s: Float[np.ndarray, "N"], fps: float) -> Int[np.ndarray, "n"]:
    """Frames nearest to evenly spaced moments from the first frame to the last; none twice."""
    count = int(np.floor((times_s[-1] - times_s[0]) * fps + _TOLERANCE_S)) + 1
    return np.unique(nearest_frames(times_s, times_s[0] + np.arange(count) / fps))


def draw_target(
    times_s: Float[np.ndarray, "N"],
    source: int,
    reach_s: float,
    generator: torch.Generator,
    rate_per_s: float = RATE_PER_S,
) -> int:
    """A frame of the video, at most `reach_s` behind the source frame."""
    last = int(np.searchsorted(times_s, times_s[source] + reach_s + _TOLERANCE_S))
    seconds = torch.from_numpy(times_s[source:last] - times_s[source]).float()
    if len(seconds) < 2:
        return source
    return source + int(torch.multinomial(offset_probabilities(seconds, rate_per_s), 1, generator=generator))
