"""Optical flow: two batches of images in, flow out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .compact import packed, thinned
from .inputs import IMAGES, given, images_to_input

INPUTS = {"image1": IMAGES, "image2": IMAGES}
OUTPUTS = {"flow": (-1, 2, -1, -1)}
PARAMS: dict[str, Any] = {"iters": 0, "stride": 1, "dtype": "float32"}
PARAMS_MEAN = {
    "iters": "refinements; 0: the usual number",
    "stride": "every how many rows and columns of the flow are given",
    "dtype": "float32, float16, or int8 with flow_scale [2]: flow is the bytes times the scale",
}
PAIRS_PER_CALL = 2


def answer(
    model: nn.Module, inputs: Any, params: Mapping[str, Any], config: Mapping[str, Any], device: torch.device
) -> dict[str, np.ndarray]:
    """flow [B, 2, H, W], float32, (x, y) in pixels, from image1 to image2; see `PARAMS_MEAN`."""
    params = {**PARAMS, **params}
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    first, second = (images_to_input(images, plain) for images in given(inputs, tuple(INPUTS)).values())
    if first.shape != second.shape:
        raise ValueError(f"image1 is {tuple(first.shape)} and image2 {tuple(second.shape)}; give two of one size")
    iters = int(params["iters"]) or None
    pairs = zip(first.split(PAIRS_PER_CALL), second.split(PAIRS_PER_CALL), strict=True)
    parts = [model(a.to(device), b.to(device), iters=iters).float().cpu() for a, b in pairs]
    small = packed(thinned(torch.cat(parts), int(params["stride"])), str(params["dtype"]))
    return {f"flow_{suffix}" if suffix else "flow": value for suffix, value in small.items()}


def example() -> dict[str, np.ndarray]:
    """A call that works: a pair of grey images."""
    images = np.full((1, 128, 136, 3), 127, np.uint8)
    return {"image1": images, "image2": images.copy()}
