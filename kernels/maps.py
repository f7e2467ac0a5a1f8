"""Maps as kernels take them: a pointer and its strides as one argument."""

from typing import Any, NamedTuple

from torch import Tensor


class Map(NamedTuple):
    """A map [B, channels, H, W] with any strides, in elements."""

    ptr: Any
    b: Any
    c: Any
    y: Any
    x: Any


def map_of(tensor: Tensor) -> Map:
    """A tensor [B, channels, H, W] as an argument of a kernel."""
    return Map(tensor, *tensor.stride())
