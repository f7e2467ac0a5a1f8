"""Motion from pokes: an image, the motion of a few points, and the points asked for; mixtures of normals out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .inputs import IMAGES, given, images_to_input, numbers

INPUTS = {
    "image": f"{IMAGES}; its central square is seen",
    "poke_pos": "[P, 2] or [B, P, 2], (x, y) in 0..1 of that square, P may be 0",
    "poke_flow": "as poke_pos, their motion in the same units",
    "query_pos": "[Q, 2] or [B, Q, 2], (x, y) in 0..1",
}
OUTPUTS = {
    "weights": (-1, -1, -1),
    "means": (-1, -1, -1, 2),
    "scales": (-1, -1, -1, 2, 2),
    "mean": (-1, -1, 2),
}
PARAMS: dict[str, Any] = {"camera_static": True}
PARAMS_MEAN = {"camera_static": "whether the camera is taken to stand still"}


def answer(
    model: nn.Module, inputs: Any, params: Mapping[str, Any], config: Mapping[str, Any], device: torch.device
) -> dict[str, np.ndarray]:
    """The distribution of the motion at every query, float32.

    Returns: weights [B, Q, K] of the mixture's components, their means [B, Q, K, 2] and lower Cholesky factors of their
        covariances, scales [B, Q, K, 2, 2]; mean [B, Q, 2] of the whole. Units: sides of the square.
    """
    values = given(inputs, tuple(INPUTS))
    images = images_to_input(values["image"], config["inputs"])
    poke_pos, poke_flow, query_pos = (
        numbers(name, values[name], 2, len(images)).to(device) for name in ("poke_pos", "poke_flow", "query_pos")
    )
    if poke_pos.shape != poke_flow.shape:
        raise ValueError(f"poke_pos is {tuple(poke_pos.shape)} and poke_flow {tuple(poke_flow.shape)}; give one each")
    network: Any = model
    seen = network.embed_image(images.to(device))
    static = bool(params.get("camera_static", True))
    mixture = network.predict_parallel(poke_pos, poke_flow, query_pos, static, seen)
    found = {"weights": mixture.weights, "means": mixture.loc, "scales": mixture.scale_tril, "mean": mixture.mean}
    return {name: value.float().cpu().numpy() for name, value in found.items()}


def example() -> dict[str, np.ndarray]:
    """A call that works: one poke, two queries."""
    return {
        "image": np.full((1, 64, 64, 3), 127, np.uint8),
        "poke_pos": np.array([[0.5, 0.5]], np.float32),
        "poke_flow": np.array([[0.1, 0.0]], np.float32),
        "query_pos": np.array([[0.5, 0.6], [0.1, 0.1]], np.float32),
    }
