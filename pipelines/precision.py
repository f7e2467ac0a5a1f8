"""In which precision networks multiply matrices: float32, or bfloat16 through autocast (weights stay float32)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def choose(precision: str, device: torch.device, recipe: Any) -> str:
    """What a setting of `precision` comes to, fp32 or bf16, on a device, for a model of which this recipe is known.

    `auto` is bf16 on a GPU that multiplies it (compute capability 8.0 and later; others emulate it); on a CPU where it
    has instructions for bf16 and the recipe has `learns_in_bf16`: the model's learning curves in both were compared.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if gpu_multiplies_bf16() else "fp32"
    if device.type != "cpu":
        return "bf16"
    return "bf16" if getattr(recipe, "learns_in_bf16", False) and cpu_multiplies_bf16() else "fp32"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 (AVX512-BF16 or AMX): others emulate them."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def gpu_multiplies_bf16() -> bool:
    """Whether this CUDA device has instructions for products of bf16."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def check_bf16(precision: str, device: str, name: str, is_network: bool) -> None:
    """Raises: ValueError, if bf16 is asked of what is no network, or of a device that has no instructions for it."""
    if precision != "bf16":
        return
    if not is_network:
        raise ValueError(f"precision=bf16: {name} is no network; use precision=fp32")
    if device == "cpu" and not cpu_multiplies_bf16():
        raise ValueError(
            "precision=bf16: this CPU only emulates products of bf16; use precision=fp32, a GPU, or a CPU with "
            "AVX512-BF16 or AMX"
        )
    if torch.device(device).type == "cuda" and not gpu_multiplies_bf16():
        raise ValueError(
            "precision=bf16: this GPU only emulates products of bf16; use precision=fp32, or a GPU of compute "
            "capability 8.0 or later"
        )


def autocast(precision: str, device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
    """A context whose matrix products are in this precision."""
    return (
        torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    )


@contextlib.contextmanager
def tf32_for_the_rest(precision: str, device: torch.device) -> Iterator[None]:
    """In bf16 on a GPU, products left in float32 (FPT's mixture head) may take TF32, which keeps more."""
    before = torch.get_float32_matmul_precision()
    if precision == "bf16" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
