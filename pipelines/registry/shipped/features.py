"""Dense features: images in, maps out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .inputs import given, images_to_input

INPUTS = {"images": "uint8 0..255 or float 0..1, [B, H, W, 3] or [B, 3, H, W] or one image"}
OUTPUTS = {"y_enc": (-1, -1, -1, -1), "y_dec": (-1, -1, -1, -1)}
PARAMS: dict[str, Any] = {}
IMAGES_PER_CALL = 8


def answer(
    model: nn.Module, inputs: Any, params: Mapping[str, Any], config: Mapping[str, Any], device: torch.device
) -> dict[str, np.ndarray]:
    """y_enc [B, C, h, w] and y_dec [B, D, H, W], float32."""
    images = images_to_input(given(inputs, tuple(INPUTS))["images"], config["inputs"])
    parts = []
    for part in images.split(IMAGES_PER_CALL):
        parts.append([output.float().cpu() for output in model(part.to(device))])
    joined = [torch.cat(outputs).numpy() for outputs in zip(*parts, strict=True)]
    return dict(zip(OUTPUTS, joined, strict=True))


def example() -> dict[str, np.ndarray]:
    """A call that works: one grey image."""
    return {"images": np.full((1, 32, 48, 3), 127, np.uint8)}
