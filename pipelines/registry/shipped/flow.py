"""Optical flow: two batches of images in, flow out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .inputs import given, images_to_input

_IMAGES = "uint8 0..255 or float 0..1, [B, H, W, 3] or [B, 3, H, W] or one image"
INPUTS = {"image1": _IMAGES, "image2": _IMAGES}
OUTPUTS = {"flow": (-1, 2, -1, -1)}
PARAMS = {"iters": 0}
PAIRS_PER_CALL = 2


def answer(
    model: nn.Module, inputs: Any, params: Mapping[str, Any], config: Mapping[str, Any], device: torch.device
) -> dict[str, np.ndarray]:
    """flow [B, 2, H, W], float32, (x, y) in pixels, from image1 to image2; `iters` refinements, 0: the usual number."""
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    first, second = (images_to_input(images, plain) for images in given(inputs, tuple(INPUTS)).values())
    if first.shape != second.shape:
        raise ValueError(f"image1 is {tuple(first.shape)} and image2 {tuple(second.shape)}; give two of one size")
    iters = int(params.get("iters", 0)) or None
    pairs = zip(first.split(PAIRS_PER_CALL), second.split(PAIRS_PER_CALL), strict=True)
    parts = [model(a.to(device), b.to(device), iters=iters).float().cpu() for a, b in pairs]
    return {"flow": torch.cat(parts).numpy()}


def example() -> dict[str, np.ndarray]:
    """A call that works: a pair of grey images."""
    images = np.full((1, 128, 136, 3), 127, np.uint8)
    return {"image1": images, "image2": images.copy()}
