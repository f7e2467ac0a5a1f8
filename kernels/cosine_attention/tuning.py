"""Tiles and launch options of the attention kernels."""

from __future__ import annotations

import torch
import triton

from kinema.kernels import tuning
from kinema.kernels.launch import capability_of
from kinema.kernels.tuning import Config, Key

OP = "cosine_attention"
PREPARE_BLOCK = 32
"""Rows of a program that prepares keys: half of them where operands are 32 bits wide."""
CHUNK_BYTES = 4096
"""Of the rows or keys that the backward kernels prepare, and take back, at a time."""
LARGEST_BLOCK_KEYS = 128
"""Scratch of shared keys is a whole number of these, so that no block reads behind it."""

# By kernel, whether operands are 16 bits wide, and whether a head is padded to more than 64 columns: (rows, keys) of
# the largest tiles that keep everything in registers on compute capability 9.0.
DEFAULTS = {
    ("forward", True, False): Config((128, 64), 8, 3),
    ("forward", True, True): Config((128, 64), 8, 2),
    ("forward", False, False): Config((32, 32), 4, 2),
    ("forward", False, True): Config((32, 64), 8, 1),
    ("rows", True, False): Config((128, 64), 8, 2),
    ("rows", True, True): Config((128, 64), 8, 2),
    ("rows", False, False): Config((32, 16), 4, 1),
    ("rows", False, True): Config((16, 16), 8, 1),
    ("keys", True, False): Config((64, 64), 4, 2),
    ("keys", True, True): Config((64, 128), 8, 2),
    ("keys full", True, False): Config((64, 128), 8, 2),
    ("keys causal", True, False): Config((64, 128), 8, 2),
    ("keys", False, False): Config((32, 16), 4, 1),
    ("keys", False, True): Config((32, 16), 8, 1),
}
# Without the warp-group instructions of 9.0, operands take registers too, and most cards have 99 KiB of shared memory.
EARLIER = {
    ("rows", True, True): Config((128, 32), 8, 2),
    ("keys", True, True): Config((64, 64), 8, 2),
}
# 12.0 spills where the others just fit.
LATER = {
    ("forward", False, False): Config((32, 32), 4, 1),
    ("rows", False, True): Config((32, 16), 8, 1),
    ("keys", False, True): Config((16, 16), 8, 1),
    ("keys causal", True, False): Config((64, 64), 4, 2),
}


def half_width(D: int) -> int:
    """Columns that half a head takes in a tile: a power of two, at least a matrix instruction's 16."""
    return max(16, triton.next_power_of_2(D // 2))


def bucket_of(D: int) -> str:
    """Heads that share a configuration."""
    return f"D{2 * half_width(D)}"


def choose_config(kernel: str, dtype: torch.dtype, kind: str, D: int, device: torch.device) -> Config:
    """What a kernel runs with on a device: blocks are (rows, keys)."""
    size = (dtype != torch.float32, half_width(D) > 32)
    # Where keys are few, blocks of them stay small.
    default = DEFAULTS.get((f"{kernel} {kind}", *size)) or DEFAULTS[kernel, *size]
    generation = capability_of(device)[0]
    if generation not in (9, 10):
        default = EARLIER.get((kernel, *size), default)
    if generation >= 12:
        default = LATER.get((f"{kernel} {kind}", *size)) or LATER.get((kernel, *size), default)
    key = Key(OP, kernel, str(dtype).removeprefix("torch."), bucket_of(D), kind)
    return tuning.choose_config(key, default, device)
