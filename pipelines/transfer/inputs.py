"""What a transfer starts from: frames of the motion video by time, and the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from kinema.configs import TransferConfig
from kinema.models.dismo.target_offset import nearest_frames
from kinema.pipelines.video.at_rate import read_stretch
from kinema.pipelines.video.errors import SourceError

MOTION_SHORT_SIDE = 480
"""Frames are kept no larger than this before the extractor's own resize."""
MOST_FRAMES = 49
"""Frames that CogVideoX was trained on."""
FRAMES_PER_LATENT = 4


def read_motion(config: TransferConfig) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames of the motion video, `config.fps` of them a second, nearest in time; 4 n + 1 of them.

    Raises: ValueError for a file that is no video, is too short, or has fewer frames a second.
    """
    wanted = config.num_frames or MOST_FRAMES
    span_s = (wanted - 1) / config.fps
    try:
        # A frame more than the span, so that the nearest one to its end is there.
        frames, times_s = read_stretch(Path(config.motion), MOTION_SHORT_SIDE, span_s + 1 / config.fps, config.start_s)
    except (SourceError, OSError) as error:
        raise ValueError(f"motion={config.motion} cannot be read as a video ({error}); give a video file") from None
    step_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else 1 / config.fps
    # The last frame is shown for as long as the others.
    available = int((times_s[-1] - times_s[0] + step_s) * config.fps + 1e-6) if len(times_s) > 1 else 1
    count = min(config.num_frames or (available - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1, MOST_FRAMES)
    if available < max(count, 1 + FRAMES_PER_LATENT):
        raise ValueError(f"motion={config.motion} {_too_short(config, available)}")
    chosen = nearest_frames(times_s, times_s[0] + np.arange(count) / config.fps)
    if (np.diff(chosen) <= 0).any():
        raise ValueError(
            f"motion={config.motion} has {1 / step_s:.3g} frames a second, fewer than fps={config.fps:g}; use "
            f"fps={1 / step_s:.3g} or less"
        )
    return frames[chosen]


def _too_short(config: TransferConfig, available: int) -> str:
    fits = (available - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1
    found = f"has {available} frames at {config.fps:g} a second"
    if fits < 1 + FRAMES_PER_LATENT:
        return f"{found}, motion needs at least {1 + FRAMES_PER_LATENT}; give a longer video, or raise fps"
    return f"{found}; use num_frames={fits}, or a longer video"
