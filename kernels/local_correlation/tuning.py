"""Blocks and launch options of the local correlation's kernels, by type, channels, radius and GPU generation.

Issue cycles and spills decided (`python -m kinema.kernels.ahead_of_time --op local_correlation`): the multiplied
operands lie in shared memory on 9.0 and in registers elsewhere, hence smaller blocks there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from kinema.kernels.dispatch import INTERPRETING

SIDE = 8
"""Pixels along each side of a block: 64 rows, the height of a Hopper matrix instruction."""
SMALLEST_BLOCK_C = 16
"""Matrix instructions take no fewer channels."""

Options = dict[str, Any]


@dataclass(frozen=True)
class Strip:
    """How the rectangle around a block is cut: `rows` of `width` pixels, `count` strips."""

    width: int
    rows: int
    count: int

    @classmethod
    def of(cls, radius: int, pixels: int) -> Strip:
        """Of `pixels`, or one row if that is more; the width is a power of two that holds the block and its reach."""
        width = triton.next_power_of_2(SIDE + 2 * radius)
        rows = max(1, pixels // width)
        return cls(width, rows, -(-(SIDE + 2 * radius) // rows))

    @property
    def pixels(self) -> int:
        return self.width * self.rows


def correlate_options(dtype: torch.dtype, channels: int, radius: int, capability: tuple[int, int]) -> Options:
    """What `correlate_kernel` is compiled and launched with: all channels at once where they fit."""
    whole = max(SMALLEST_BLOCK_C, triton.next_power_of_2(channels))
    hopper = capability[0] == 9
    single = dtype == torch.float32
    # On 12.0 the parts of 32 pixels leave no registers for maps that are read one element at a time.
    strip = Strip.of(radius, 64 if not single else 32 if capability[0] < 12 else 16)
    fits = whole <= (256 if hopper else 128) and not (single and strip.pixels > 32)
    if fits:
        # The next strip of 16-bit features is on its way while one is multiplied.
        block, warps, stages = whole, 4, 1 if single else 2
    elif single:
        strip, block, warps, stages = Strip.of(radius, 64), min(whole, 32), 8, 1
    else:
        block, warps, stages = 64 if hopper else 32, 4, 2
    return {
        "CHANNELS": channels,
        "RADIUS": radius,
        **_strips(strip),
        "BLOCK_C": block,
        "NUM_BLOCKS_C": -(-channels // block),
        "SPLIT": single,
        "UPCAST": INTERPRETING and dtype == torch.bfloat16,  # numpy has no bfloat16
        "num_warps": warps,
        "num_stages": stages,
    }


def window_sum_options(dtype: torch.dtype, channels: int, radius: int, capability: tuple[int, int]) -> Options:
    """What `window_sum_kernel` is compiled and launched with; `channels` are those of the map that is read."""
    hopper = capability[0] == 9
    single = dtype == torch.float32
    strip = Strip.of(radius, 32 if single else 64)
    if single:
        # Three products keep both operands twice in registers; a wide strip then leaves room for fewer channels.
        widest = 128 if strip.pixels <= 32 else (64 if hopper else 32)
        warps = 4 if hopper else 8
    else:
        widest = 256
        warps = 4 if channels <= 128 else 8
    block = min(widest, max(SMALLEST_BLOCK_C, triton.next_power_of_2(channels)))
    return {
        "CHANNELS": channels,
        "RADIUS": radius,
        **_strips(strip),
        "BLOCK_C": block,
        "NUM_BLOCKS_C": -(-channels // block),
        "PRECISION": "tf32x3" if single else "tf32",
        "num_warps": warps,
        # Programs that share a multiprocessor hide each other's loads; copies ahead would take more instructions.
        "num_stages": 1,
    }


def _strips(strip: Strip) -> Options:
    return {"SIDE": SIDE, "STRIP_WIDTH": strip.width, "STRIP_ROWS": strip.rows, "NUM_STRIPS": strip.count}
