"""How kernels are started: on the tensors' device, or, to compile them where there is none, only noted down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One start of a kernel, as an operation asked for it."""

    kernel: Any
    """The function under `triton.jit`."""
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Compile-time arguments, `num_warps` and `num_stages`."""


_noted: list[Launch] | None = None
_capability = (9, 0)


def launch(kernel: Any, grid: tuple[Any, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the current device."""
    if _noted is not None:
        _noted.append(Launch(kernel, arguments, options))
        return
    kernel[grid](*arguments, **options)


@contextlib.contextmanager
def noted_launches(capability: tuple[int, int] = (9, 0)) -> Iterator[list[Launch]]:
    """Inside, launches are noted instead of started, as such a GPU would get them: tensors may be on "meta"."""
    global _noted, _capability
    outer, _noted, _capability = (_noted, _capability), [], capability
    try:
        yield _noted
    finally:
        _noted, _capability = outer


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; away from GPUs that of the noted launches."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _capability


def on_device(x: Tensor) -> Any:
    """Kernels start on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
