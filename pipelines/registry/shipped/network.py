"""The registered network and its input, for the predictor and for `load_registered`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .weights_file import read_weights


def build_model(config: dict[str, Any], weights: str | Path, package: str) -> nn.Module:
    """The network that config.json describes, from the modules of `package`, in eval mode."""
    module = importlib.import_module(f"{package}.{config['module']}")
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in config["arguments"].items()}
    model = getattr(module, config["class"])(**arguments)
    model.load_state_dict(read_weights(weights), strict=True)
    return model.eval()


def images_to_input(images: Any, inputs: dict[str, Any]) -> Tensor:
    """RGB images as the network takes them: float32 [B, 3, H, W], normalised.

    Args: images, one array (or tensor), [B, H, W, 3] or [B, 3, H, W] or a single image without B; uint8 in 0..255 or
        float in 0..1. If both the second and the last axis have length 3 the last one is colour.
    Raises: ValueError for another shape, type or range.
    """
    values = np.require(images, requirements=["C", "W"])  # copies only what torch could not share
    if values.dtype.kind not in "uifb":
        raise ValueError(f"images are {values.dtype.type.__name__}; give uint8 in 0..255 or float in 0..1")
    array = torch.as_tensor(values)
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or not array.numel() or 3 not in (array.shape[-1], array.shape[1]):
        raise ValueError(
            f"images have shape {tuple(array.shape)}; give [B, H, W, 3] or [B, 3, H, W] (a single image without B)"
        )
    if array.shape[-1] == 3:
        array = array.permute(0, 3, 1, 2)
    if array.dtype == torch.uint8:
        array = array.float() / 255
    elif array.is_floating_point():
        low, high = float(array.min()), float(array.max())
        if not (0 <= low and high <= 1):
            raise ValueError(f"float images are in {low:g}..{high:g}; give 0..1, or uint8 in 0..255")
        array = array.float()
    else:
        raise ValueError(f"images are {array.dtype}; give uint8 in 0..255 or float in 0..1")
    mean, std = (torch.tensor(inputs[name], dtype=torch.float32).view(3, 1, 1) for name in ("mean", "std"))
    return ((array - mean) / std).contiguous()
