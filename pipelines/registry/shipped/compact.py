"""Small answers: feature maps pooled, thinned and in few bytes, as params of `predict` and settings of `embed` ask."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

DTYPES = ("float32", "float16", "int8")


def chosen_names(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The names in `a,b` (empty: all). Raises: ValueError for one that is not known."""
    known = tuple(known)
    names = tuple(name.strip() for name in text.split(",") if name.strip()) or known
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"outputs={text}: {wrong[0]} is not known; use some of {', '.join(known)}")
    return names


def thinned(maps: Tensor, stride: int) -> Tensor:
    """Every `stride`-th row and column of maps [..., h, w], from stride // 2 on: still the features of single pixels.

    Raises: ValueError for a stride that is not 1 or more.
    """
    if stride < 1:
        raise ValueError(f"stride={stride} is out of range; use 1 or more")
    first = [min(stride // 2, side - 1) for side in maps.shape[-2:]]
    return maps[..., first[0] :: stride, first[1] :: stride]


def packed(values: Tensor, dtype: str, channel_axis: int = 1) -> dict[str, np.ndarray]:
    """{"": values in that type}, and for int8 {"scale": float32 [C]}: values are about the bytes times their scale.

    The largest magnitude of a channel becomes 127, so that the error is at most half a scale.
    Raises: ValueError for another type.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not known; use one of {', '.join(DTYPES)}")
    if dtype != "int8":
        return {"": values.to(getattr(torch, dtype)).numpy()}
    axes = [axis for axis in range(values.ndim) if axis != channel_axis]
    scale = values.float().abs().amax(dim=axes).clamp_min(torch.finfo(torch.float32).tiny) / 127
    shape = [-1 if axis == channel_axis else 1 for axis in range(values.ndim)]
    quantised = (values.float() / scale.view(shape)).round().clamp(-127, 127).to(torch.int8)
    return {"": quantised.numpy(), "scale": scale.numpy()}
