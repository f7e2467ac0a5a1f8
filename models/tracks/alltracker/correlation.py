"""Correlation of the anchor frame with the frames of a window, looked up around the current targets.

Unlike RAFT's (`kernels.correlation_lookup`): positions beyond the map read its border, maps with odd sides are
halved by averages that count every column, and maps of one cell are allowed.

Source: Harley et al., arXiv:2506.07310, section 3.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NUM_LEVELS, RADIUS = 5, 4
LOOKUP_CHANNELS = NUM_LEVELS * (2 * RADIUS + 1) ** 2
MAX_KEPT_BYTES = 2**30
"""Products of a window that are kept from one refinement to the next; more are formed anew, a part at a time."""
MAX_PART_BYTES = 2**27
"""Products that are formed at a time when they are not kept."""


class AnchorCorrelation:
    """Looks up how well the anchor's cells match the frames of a window.

    Args:
        anchor: features of the anchor of each clip [B, C, H, W].
        targets: features of the window's frames [B, S, C, H, W].
    """

    def __init__(self, anchor: Float[Tensor, "B C H W"], targets: Float[Tensor, "B S C H W"]) -> None:
        self.size = (anchor.shape[-2], anchor.shape[-1])
        self.num_frames = targets.shape[1]
        self.anchor = anchor.float().flatten(2).transpose(1, 2) / math.sqrt(anchor.shape[1])  # [B, H W, C]
        levels = [targets.float().flatten(0, 1)]  # [B S, C, h, w]
        for _ in range(NUM_LEVELS - 1):
            levels.append(F.interpolate(levels[-1], scale_factor=0.5, mode="area"))
        self.levels = levels
        cells = self.anchor.shape[1]
        per_cell = 4 * sum(level.shape[-2] * level.shape[-1] for level in levels)
        self.part = max(1, MAX_PART_BYTES // per_cell)
        kept = torch.is_grad_enabled() or levels[0].shape[0] * cells * per_cell <= MAX_KEPT_BYTES
        self.kept = [self._products(row, slice(None)) for row in range(levels[0].shape[0])] if kept else None

    def lookup(self, row: int, target: Float[Tensor, "2 H W"]) -> Float[Tensor, "P H W"]:
        """Windows around `target`, (x, y) in cells, in frame `row` of all clips' frames.

        Channels: level by level, in each the horizontal offset first.
        """
        centres = target.flatten(1).T  # [H W, 2]
        if self.kept is not None:
            windows = _read(self.kept[row], centres)
        else:
            starts = range(0, centres.shape[0], self.part)
            parts = (slice(start, start + self.part) for start in starts)
            windows = torch.cat([_read(self._products(row, part), centres[part]) for part in parts])
        return windows.T.unflatten(1, self.size)

    def _products(self, row: int, cells: slice) -> list[Float[Tensor, "N 1 _ _"]]:
        """Of some of the anchor's cells with all cells of a frame, at every level."""
        anchor = self.anchor[row // self.num_frames, cells]
        return [(anchor @ level[row].flatten(1)).view(-1, 1, *level.shape[-2:]) for level in self.levels]


def _read(products: Sequence[Float[Tensor, "N 1 _ _"]], centres: Float[Tensor, "N 2"]) -> Float[Tensor, "N P"]:
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=centres.dtype, device=centres.device)
    dx, dy = torch.meshgrid(offsets, offsets, indexing="ij")
    window = torch.stack([dx, dy], dim=-1)  # [2r + 1, 2r + 1, 2]
    read = []
    for number, level in enumerate(products):
        size = centres.new_tensor([max(side - 1, 1) for side in (level.shape[-1], level.shape[-2])])
        grid = (centres[:, None, None] / 2**number + window) * (2 / size) - 1
        read.append(F.grid_sample(level, grid, padding_mode="border", align_corners=True).flatten(1))
    return torch.cat(read, dim=1)
