"""What callers hand over, as the networks take it."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGES = (
    "RGB, uint8 0..255 or float 0..1, [B, H, W, 3] or [B, 3, H, W] or one image without B; as JSON: lists of these "
    "numbers, or a base64 PNG or JPEG, or a list of them"
)


def images_to_input(images: Any, inputs: dict[str, Any]) -> Tensor:
    """RGB images as the network takes them: float32 [B, 3, H, W], normalised.

    Args: images, one array (or tensor, or nested lists), [B, H, W, 3] or [B, 3, H, W] or a single image without B;
        whole numbers in 0..255 or fractions in 0..1; or base64 text of a PNG or JPEG, or a list of them. If both the
        second and the last axis have length 3 the last one is colour. Images without a single fraction are taken for
        bytes.
    Raises: ValueError for another shape, type or range.
    """
    array = torch.as_tensor(_numbers_of(images))
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or not array.numel() or 3 not in (array.shape[-1], array.shape[1]):
        raise ValueError(
            f"images have shape {tuple(array.shape)}; give [B, H, W, 3] or [B, 3, H, W] (a single image without B)"
        )
    if array.shape[-1] == 3:
        array = array.permute(0, 3, 1, 2)
    if array.is_floating_point():
        low, high = float(array.min()), float(array.max())
        if not (0 <= low and high <= 1):
            raise ValueError(f"float images are in {low:g}..{high:g}; give 0..1, or uint8 in 0..255")
        array = array.float()
    else:
        low, high = int(array.min()), int(array.max())
        if not (0 <= low and high <= 255):
            raise ValueError(f"images of whole numbers are in {low}..{high}; give 0..255, or float in 0..1")
        array = array.float() / 255
    mean, std = (torch.tensor(inputs[name], dtype=torch.float32).view(3, 1, 1) for name in ("mean", "std"))
    return ((array - mean) / std).contiguous()


def _numbers_of(images: Any) -> np.ndarray:
    """Images as an array of whole numbers or fractions, decoded where they are pictures' bytes in base64."""
    if isinstance(images, str | bytes | dict):
        images = [images]
    try:
        values = np.require(images, requirements=["C", "W"])  # copies only what torch could not share
    except ValueError:
        raise ValueError("images are ragged lists; give images of one size, or one at a time") from None
    if values.dtype.kind == "U":
        values = values.astype(object)
    if values.dtype.kind == "O":  # JSON comes as objects, whatever is in it
        flat = [v.item() if isinstance(v, np.ndarray) and v.ndim == 0 else v for v in values.ravel()]
        first = flat[0] if flat else None
        if isinstance(first, str | bytes | dict):
            return _stacked([_decoded(picture) for picture in flat])
        if isinstance(first, np.ndarray | list):
            return _stacked([np.asarray(image) for image in flat])
        if not all(isinstance(value, int | float | np.number) for value in (first, flat[-1] if flat else None)):
            raise ValueError(f"images are {type(first).__name__}; give uint8 in 0..255 or float in 0..1")
        try:
            values = np.array(values.tolist())
        except (ValueError, TypeError):
            raise ValueError("images are ragged lists; give images of one size, or one at a time") from None
    if values.dtype.kind not in "uif":
        raise ValueError(f"images are {values.dtype.type.__name__}; give uint8 in 0..255 or float in 0..1")
    return values.astype(np.int64) if values.dtype.kind == "u" and values.dtype != np.uint8 else values


def _stacked(images: list[np.ndarray]) -> np.ndarray:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ValueError(f"images have different shapes, {sorted(shapes)}; give images of one size, or one at a time")
    return np.stack(images)


def _decoded(picture: Any) -> np.ndarray:
    """A PNG or JPEG in base64 (bare, as a data: address, or as {"b64": text}): uint8 [H, W, 3]."""
    from PIL import Image, UnidentifiedImageError

    text = picture.get("b64", "") if isinstance(picture, dict) else picture
    text = text.decode() if isinstance(text, bytes) else str(text)
    try:
        data = base64.b64decode(text.rpartition("base64,")[2], validate=True)
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    except (binascii.Error, UnidentifiedImageError, OSError):
        raise ValueError(f"image {text[:40]!r} is no base64 of a PNG or JPEG; a path cannot be read here") from None


def numbers(name: str, value: Any, last: int, batch: int) -> Tensor:
    """Numbers as float32 [batch, N, last]; without a batch axis they serve every image.

    Raises: ValueError for another shape, or values that are not finite.
    """
    array = torch.as_tensor(np.array(value.tolist() if isinstance(value, np.ndarray) else value, dtype=np.float32))
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
