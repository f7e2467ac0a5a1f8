"""Motion embeddings: videos in, one embedding per frame out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .inputs import given, images_to_input

INPUTS = {"video": "uint8 0..255 or float 0..1, [B, T, H, W, 3] or one video [T, H, W, 3]; T of 5 or more"}
OUTPUTS = {"motion": (-1, -1, -1)}
PARAMS: dict[str, Any] = {}


def answer(
    model: nn.Module, inputs: Any, params: Mapping[str, Any], config: Mapping[str, Any], device: torch.device
) -> dict[str, np.ndarray]:
    """motion [B, T - 4, d], float32: windows slide over the video; frames as many a second as the model trained on."""
    video = np.asarray(given(inputs, tuple(INPUTS))["video"])
    if video.ndim == 4:
        video = video[None]
    if video.ndim != 5 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"the video has shape {video.shape}; give [B, T, H, W, 3], or one video [T, H, W, 3]")
    images = images_to_input(video.reshape(-1, *video.shape[2:]), config["inputs"])
    frames = images.permute(0, 2, 3, 1).unflatten(0, video.shape[:2])
    network: Any = model
    return {"motion": network.to(device).forward_sliding(frames).float().cpu().numpy()}


def example() -> dict[str, np.ndarray]:
    """A call that works: nine grey frames."""
    return {"video": np.full((1, 9, 32, 48, 3), 127, np.uint8)}
