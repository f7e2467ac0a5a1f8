"""Flow of frames that are too large for the teacher's memory: in overlapping tiles, blended.

Every tile is a window at the same place of both frames, so motion longer than a tile's margin is not found near its
border; there the neighbouring tile, for which the pixel lies further inside, has most of the weight. Where the
motion is as long as the overlap, reduce the frames instead (`too_large=downscale`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinema.pipelines.teach.protocol import FlowEstimate, Teacher

OVERLAP_SHARE = 0.25
"""Share of a tile's side that it has in common with its neighbour."""
SMALLEST_TILE_PX = 128


@dataclass(frozen=True)
class Tile:
    """A window of a frame."""

    top: int
    left: int
    height: int
    width: int

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def tile_grid(height: int, width: int, max_pixels: int) -> list[Tile]:
    """Tiles of equal size and at most `max_pixels` that cover a frame; one tile where it fits.

    Raises: ValueError for a limit below 128 x 128 pixels.
    """
    if max_pixels < SMALLEST_TILE_PX**2:
        raise ValueError(
            f"tiles of {max_pixels} pixels are too small for a flow network; use max_megapixels of "
            f"{SMALLEST_TILE_PX**2 / 1e6:.3f} or more"
        )
    rows = columns = 1
    while _side(height, rows) * _side(width, columns) > max_pixels:
        # The longer side of the tile is cut next, which keeps tiles close to squares.
        if _side(height, rows) > _side(width, columns):
            rows += 1
        else:
            columns += 1
    tile_height, tile_width = _side(height, rows), _side(width, columns)
    tops, lefts = _starts(height, tile_height, rows), _starts(width, tile_width, columns)
    return [Tile(top, left, tile_height, tile_width) for top in tops for left in lefts]


def _side(length: int, count: int) -> int:
    """Side of `count` tiles with the overlap over `length` pixels."""
    return math.ceil(length / (count - (count - 1) * OVERLAP_SHARE))


def _starts(length: int, side: int, count: int) -> list[int]:
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


class TiledTeacher:
    """A teacher that sees one tile at a time.

    Args: teacher, for frames of at most `max_pixels`; flow_size, from the size of a frame (height, width) to the one
        at which it is cut into tiles.
    """

    def __init__(self, teacher: Teacher, max_pixels: int, flow_size: Callable[[int, int], tuple[int, int]]):
        self.teacher, self.max_pixels, self.flow_size = teacher, max_pixels, flow_size

    def features(self, frame: UInt8[np.ndarray, "H W 3"]) -> tuple[tuple[int, int], list[Any]]:
        """Size of the frame and features of its tiles."""
        height, width = self.flow_size(*frame.shape[:2])
        if (height, width) != frame.shape[:2]:
            frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        tiles = tile_grid(height, width, self.max_pixels)
        return (height, width), [self.teacher.features(frame[tile.window]) for tile in tiles]

    def flow(self, pairs: Sequence[tuple[Any, Any]]) -> FlowEstimate:
        """Flow of each pair, tile by tile. All frames have one size."""
        (height, width), _ = pairs[0][0]
        tiles = tile_grid(height, width, self.max_pixels)
        parts = [
            self.teacher.flow([(first[1][number], second[1][number]) for first, second in pairs])
            for number in range(len(tiles))
        ]
        flow = _blend([part.flow_px for part in parts], tiles, height, width)
        uncertain = [part.uncertainty_px for part in parts if part.uncertainty_px is not None]
        return FlowEstimate(flow, _blend(uncertain, tiles, height, width) if uncertain else None)


def _blend(
    parts: Sequence[Float[Tensor, "*B h w"]], tiles: Sequence[Tile], height: int, width: int
) -> Float[Tensor, "*B H W"]:
    total = parts[0].new_zeros(*parts[0].shape[:-2], height, width)
    weights = parts[0].new_zeros(height, width)
    for part, tile in zip(parts, tiles, strict=True):
        weight = _weight(tile, height, width).to(part)
        total[(..., *tile.window)] += part * weight
        weights[tile.window] += weight
    return total / weights


def _weight(tile: Tile, height: int, width: int) -> Float[Tensor, "h w"]:
    """Falls to nearly 0 over the overlap at the borders that are inside the frame."""

    def ramp(start: int, side: int, length: int) -> Tensor:
        position = torch.arange(side) + 0.5
        margin = max(1.0, side * OVERLAP_SHARE)
        before = position if start > 0 else torch.full_like(position, margin)
        after = side - position if start + side < length else torch.full_like(position, margin)
        return (torch.minimum(before, after) / margin).clamp(max=1.0)

    return ramp(tile.top, tile.height, height)[:, None] * ramp(tile.left, tile.width, width)
