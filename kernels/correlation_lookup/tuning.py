"""Blocks and launch options of the lookup kernels, and the types that they multiply in."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from kinema.kernels import tuning
from kinema.kernels.dispatch import INTERPRETING
from kinema.kernels.launch import capability_of
from kinema.kernels.tuning import Config, Key

OP = "correlation_lookup"
TILE = 8
"""Side of a tile of queries, or of targets."""
SCAN = 32
"""Boxes looked at at once."""
SMALLEST_BLOCK_C = 16
"""Matrix instructions take no fewer channels."""
SPLIT_PIXELS = 16
"""Pixels of a program that splits float32 features."""
ELEMENTS = 8192 if INTERPRETING else 512

# Targets and channels of a block, by kernel and whether maps are 16 bits wide. float32 takes more matrix products and
# their operands' parts, hence smaller blocks; gradients hold the weights of a block beside the sums.
DEFAULTS = {
    ("lookup", True): Config((128, 64), 8, 3),
    ("lookup", False): Config((64, 64), 8, 2),
    ("query_grad", True): Config((64, 128), 8, 2),
    ("query_grad", False): Config((32, 64), 8, 2),
    ("target_grad", True): Config((TILE * TILE, 128), 8, 2),
    ("target_grad", False): Config((TILE * TILE, 32), 4, 2),
}
# Without the warp-group instructions of 9.0, operands take registers too.
EARLIER = {("lookup", False): Config((64, 32), 8, 2)}


def choose_config(kernel: str, dtype: torch.dtype, level: int | None, device: torch.device) -> Config:
    """What a kernel runs with at a pyramid level, None for all, on a device: blocks are (targets, channels)."""
    bucket = "levels" if level is None else f"level {min(level, 2)}"
    key = Key(OP, kernel, str(dtype).removeprefix("torch."), bucket)
    size = kernel, dtype != torch.float32
    default = DEFAULTS[size]
    if capability_of(device)[0] not in (9, 10):
        default = EARLIER.get(size, default)
    return tuning.choose_config(key, default, device)


def block_of(targets: int, level: int | None) -> tuple[int, int]:
    """Rows and columns of a block: coarse levels see a tile of queries closer together, so that blocks get narrower.

    Where motion is smooth, windows of a tile span 17, 14, 12 and 11 pixels at the levels: for all of them, 16 columns.
    """
    columns = 32 if level is not None and level < 2 else 16
    return targets // columns, columns


def block_channels(channels: int, config: Config) -> int:
    """The largest block of channels, up to the configured one, that divides them."""
    return min(config.blocks[1], channels & -channels)


def query_grad_warps(block_c: int, config: Config) -> int:
    """Of a block of few channels, fewer: 8 warps would spill what they share."""
    return min(config.num_warps, 4) if block_c <= SMALLEST_BLOCK_C else config.num_warps


def forward_types(dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """Type in which products are formed; float32 comes as two float16, exact enough for 1e-5, or as one for TF32."""
    if dtype == torch.bfloat16 and INTERPRETING:
        return {"SCALED": False, "SPLIT": False, "COMPUTE": tl.float32}  # numpy has no bfloat16
    scaled = dtype == torch.float32
    compute = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    return {"SCALED": scaled, "SPLIT": scaled and precision == "float32", "COMPUTE": compute}


def backward_types(dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """float16 is multiplied as TF32: as many mantissa bits, and small gradients stay; float32 in three products."""
    if dtype == torch.float16:
        return {"COMPUTE": tl.float32, "PRECISION": "tf32"}
    if dtype == torch.bfloat16 and not INTERPRETING:
        return {"COMPUTE": tl.bfloat16, "PRECISION": "tf32"}
    return {"COMPUTE": tl.float32, "PRECISION": "tf32x3" if precision == "float32" else "tf32"}
