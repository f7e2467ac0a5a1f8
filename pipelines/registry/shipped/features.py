"""Dense features: images in, maps out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .compact import chosen_names, packed, thinned
from .inputs import IMAGES, given, images_to_input

INPUTS = {"images": IMAGES}
OUTPUTS = {"y_enc": (-1, -1, -1, -1), "y_dec": (-1, -1, -1, -1)}
PARAMS: dict[str, Any] = {"outputs": "y_enc,y_dec", "pooled": False, "stride": 1, "dtype": "float32"}
PARAMS_MEAN = {
    "outputs": "which of y_enc (the encoder's patches) and y_dec (features of every pixel)",
    "pooled": "means over the image, [B, C], instead of maps",
    "stride": "every how many rows and columns of y_dec are given",
    "dtype": "float32, float16, or int8 with NAME_scale [C]: values are the bytes times the scale",
}
IMAGES_PER_CALL = 8


def answer(
    model: nn.Module, inputs: Any, params: Mapping[str, Any], config: Mapping[str, Any], device: torch.device
) -> dict[str, np.ndarray]:
    """y_enc [B, C, h, w] and y_dec [B, D, H, W], float32; `PARAMS_MEAN` says how they get smaller."""
    params = {**PARAMS, **params}
    images = images_to_input(given(inputs, tuple(INPUTS))["images"], config["inputs"])
    names = chosen_names(str(params["outputs"]), OUTPUTS)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for part in images.split(IMAGES_PER_CALL):
        for name, maps in zip(OUTPUTS, model(part.to(device)), strict=True):
            if name in names:
                small = maps.float().mean(dim=(2, 3)) if params["pooled"] else maps.float()
                if name == "y_dec" and not params["pooled"]:
                    small = thinned(small, int(params["stride"]))
                parts[name].append(small.cpu())
    found: dict[str, np.ndarray] = {}
    for name, maps in parts.items():
        for suffix, value in packed(torch.cat(maps), str(params["dtype"])).items():
            found[f"{name}_{suffix}" if suffix else name] = value
    return found


def example() -> dict[str, np.ndarray]:
    """A call that works: one grey image."""
    return {"images": np.full((1, 32, 48, 3), 127, np.uint8)}
