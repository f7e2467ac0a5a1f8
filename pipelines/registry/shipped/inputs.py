"""What callers hand over, as the networks take it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


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


def numbers(name: str, value: Any, last: int, batch: int) -> Tensor:
    """Numbers as float32 [batch, N, last]; without a batch axis they serve every image.

    Raises: ValueError for another shape, or values that are not finite.
    """
    array = torch.as_tensor(np.asarray(value, dtype=np.float32))
    if array.numel() == 0:
        array = array.reshape(1, 0, last)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[-1] != last or array.shape[0] not in (1, batch):
        raise ValueError(f"{name} has shape {tuple(np.shape(value))}; give [N, {last}], or [{batch}, N, {last}]")
    if not bool(array.isfinite().all()):
        raise ValueError(f"{name} holds values that are not finite")
    return array.expand(batch, -1, -1)


def given(inputs: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The named inputs of a call; one that has a single input may be called with its bare value.

    Raises: ValueError naming those that are missing.
    """
    if len(names) == 1 and not isinstance(inputs, dict):
        return {names[0]: inputs}
    missing = [name for name in names if not isinstance(inputs, dict) or name not in inputs]
    if missing:
        raise ValueError(f"inputs lack {', '.join(missing)}; give a mapping with {', '.join(names)}")
    return {name: inputs[name] for name in names}
