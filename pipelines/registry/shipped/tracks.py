"""Point tracks: a clip and query points in, their positions in every frame out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .inputs import IMAGES, given, images_to_input, numbers

INPUTS = {
    "video": f"the clip's frames as images: {IMAGES.replace('B', 'T')}",
    "queries": "[N, 3], frame number, x and y in pixels, centres at integers",
}
OUTPUTS = {"tracks": (-1, -1, 2), "visible": (-1, -1), "confidence": (-1, -1)}
PARAMS: dict[str, Any] = {"backward": True}
PARAMS_MEAN = {"backward": "also track to the frames before a query"}
ALSO = ("kinema.models.tracks.cotracker3.predictor",)


def answer(
    model: nn.Module, inputs: Any, params: Mapping[str, Any], config: Mapping[str, Any], device: torch.device
) -> dict[str, np.ndarray]:
    """tracks [T, N, 2], (x, y) in pixels of the video; visible [T, N], 1 or 0; confidence [T, N]; float32."""
    values = given(inputs, tuple(INPUTS))
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    frames = images_to_input(values["video"], plain)
    queries = numbers("queries", values["queries"], 3, 1)[0]
    module = importlib.import_module(".models.tracks.cotracker3.predictor", __package__)
    found = module.CoTracker3Predictor(model)(
        frames.to(device), queries.to(device), backward=bool({**PARAMS, **params}["backward"])
    )
    return {name: getattr(found, name).float().cpu().numpy() for name in OUTPUTS}


def example() -> dict[str, np.ndarray]:
    """A call that works: two grey frames, one point."""
    return {
        "video": np.full((2, 64, 64, 3), 127, np.uint8),
        "queries": np.array([[0, 31.5, 31.5]], np.float32),
    }
