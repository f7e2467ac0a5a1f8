"""Motion embeddings of clips: one for every frame at the rate the model was trained on, but for the last few."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kinema.configs import EmbedConfig
from kinema.models.dismo.target_offset import frame_times, frames_at_rate
from kinema.pipelines.loader.clip import Clip
from kinema.pipelines.video.errors import TooShort

COLUMNS = pa.schema(
    [("source", pa.string()), ("frames", pa.list_(pa.int32())), ("motion_mean", pa.list_(pa.float32()))]
)
IDENTITY = ("fps",)


@torch.inference_mode()
def embed_clip(
    model: Any, clip: Clip, config: EmbedConfig, device: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Members and row of one clip: `motion` float32 [Q, d], the frames that they belong to, and their mean.

    Raises: TooShort at this rate.
    """
    times = frame_times(clip.meta["pts"], clip.meta["time_base"])
    chosen = frames_at_rate(times, config.fps)
    least = model.max_delta_time + 1
    if len(chosen) < least:
        raise TooShort(
            f"clip {clip.key} has {len(chosen)} frames at {config.fps:g} a second; motion embeddings need {least}"
        )
    video = torch.from_numpy(clip.frames(chosen.tolist()))[None]
    motion = model.forward_sliding(video.to(device)).float().cpu()[0]
    row = {"frames": chosen[: len(motion)].tolist(), "motion_mean": motion.mean(dim=0).tolist()}
    return {"motion": motion.numpy()}, row
