"""What CoTracker3 sees of a clip: unit-length feature pyramids, windows around points, their correlations.

Positions are (x, y) in cells of the finest map, centres at integers; at level k they are divided by 2^k without
a half-cell shift, as published. Windows are 7x7 cells, flattened with x moving in the OUTER axis and y in the inner.
Source: Karaev et al., arXiv:2410.11831, section 3.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from kinema.models.backbones.inference_linear import linear

NUM_LEVELS = 4
RADIUS = 3
WINDOW = 2 * RADIUS + 1
STRIDE = 4
MIN_SIDE_PX = STRIDE * 2 ** (NUM_LEVELS - 1)
"""Below this many pixels the coarsest map would be empty."""


@dataclass(frozen=True)
class ClipFeatures:
    """Feature maps of the frames of one or more clips, at every level."""

    levels: tuple[Float[Tensor, "B T _ _ C"], ...]
    """Finest first; channels last, so that the window of a point is read in whole rows."""
    backwards: bool = False
    """Whether the clip is to be seen from its last stored frame to its first."""

    @property
    def num_clips(self) -> int:
        """Clips."""
        return self.levels[0].shape[0]

    @property
    def num_frames(self) -> int:
        """Frames of each clip."""
        return self.levels[0].shape[1]

    def rows(self) -> Int[Tensor, "B T"]:
        """Where each frame of each clip is among all stored maps, `level.flatten(0, 1)`."""
        B, T = self.num_clips, self.num_frames
        rows = torch.arange(B * T, device=self.levels[0].device).view(B, T)
        return rows.flip(1) if self.backwards else rows

    def reversed(self) -> "ClipFeatures":
        """The frames in the opposite order: every frame is encoded on its own, so nothing else changes."""
        return ClipFeatures(self.levels, not self.backwards)

    def last(self, num: int) -> "ClipFeatures":
        """The last frames."""
        part = slice(None, num) if self.backwards else slice(self.num_frames - num, None)
        return ClipFeatures(tuple(level[:, part] for level in self.levels), self.backwards)

    def followed_by(self, other: "ClipFeatures") -> "ClipFeatures":
        """These frames, then those of features seen in the same direction."""
        assert self.backwards == other.backwards
        pairs = zip(self.levels, other.levels, strict=True)
        return ClipFeatures(
            tuple(torch.cat(pair[:: -1 if self.backwards else 1], dim=1) for pair in pairs), self.backwards
        )


def gather(parts: Iterable[ClipFeatures], num_frames: int) -> ClipFeatures:
    """One after the other, into memory that is taken once."""
    levels: list[Tensor] = []
    start = 0
    for part in parts:
        if part.num_frames == num_frames:
            return part
        if not levels:
            levels = [x.new_empty(x.shape[0], num_frames, *x.shape[2:]) for x in part.levels]
        for level, x in zip(levels, part.levels, strict=True):
            level[:, start : start + part.num_frames] = x
        start += part.num_frames
    return ClipFeatures(tuple(levels))


def feature_pyramid(raw: Float[Tensor, "B T C h w"]) -> ClipFeatures:
    """Encoder output to maps of unit length over the channels, and their 2x2 averages (not unit length again)."""
    level = F.normalize(rearrange(raw, "b t c h w -> (b t) c h w"), dim=1, eps=1e-6)
    levels = [level]
    for _ in range(NUM_LEVELS - 1):
        level = F.avg_pool2d(level, 2)
        levels.append(level)
    return ClipFeatures(
        tuple(rearrange(level, "(b t) c h w -> b t h w c", b=len(raw)).contiguous() for level in levels)
    )


def windows(
    level: Float[Tensor, "F h w C"], frames: Int[Tensor, "*P"], xy: Float[Tensor, "*P 2"]
) -> Float[Tensor, "*P 7 7 C"]:
    """7x7 windows around positions, bilinear; positions beyond the map take the value at its border.

    Args: level, maps of all frames; frames, which map each position belongs to; xy, in cells of this level.
    """
    patches, fraction = _patches(level, frames, xy)
    return _interpolate(patches, fraction)


def window_correlation(
    level: Float[Tensor, "F h w C"],
    templates: Float[Tensor, "P 49 C"],
    frames: Int[Tensor, "P T"],
    xy: Float[Tensor, "P T 2"],
) -> Float[Tensor, "P T 2401"]:
    """Products of every cell of the target window with every cell of the template, target cells first.

    The products with whole cells are formed first and interpolated afterwards, which is the same sum and
    moves 49 numbers for each cell instead of C. On a CPU without gradient one track at a time: it stays in the cache.
    """
    P, T = frames.shape
    if xy.device.type == "cpu" and not torch.is_grad_enabled():
        rows, fraction = _cells(level, frames, xy)
        cells = level.reshape(-1, level.shape[-1])
        found = templates.new_empty(P, T, WINDOW**2, templates.shape[1])
        for p in range(P):
            products = linear(cells.index_select(0, rows[p].flatten()), templates[p], None).float()
            found[p] = _interpolate(products.view(T, WINDOW + 1, WINDOW + 1, -1), fraction[p]).flatten(1, 2)
        return found.flatten(2)
    patches, fraction = _patches(level, frames, xy)
    products = patches.reshape(P, -1, patches.shape[-1]) @ templates.transpose(1, 2)  # [P, T * 64, 49]
    products = products.view(P, T, WINDOW + 1, WINDOW + 1, -1)
    return _interpolate(products, fraction.to(products.dtype)).reshape(P, T, -1)


def _patches(level: Tensor, frames: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """The 8x8 cells that a window touches, [*P, 8 (x), 8 (y), C], and the fraction of a cell to go, [*P, 2]."""
    rows, fraction = _cells(level, frames, xy)
    channels = level.shape[-1]
    return level.reshape(-1, channels).index_select(0, rows.flatten()).view(*rows.shape, channels), fraction


def _cells(level: Tensor, frames: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Where those cells are among all of the level, [*P, 8 (x), 8 (y)], and the fraction."""
    _, height, width, _ = level.shape
    size = xy.new_tensor([width, height])
    xy = xy.clamp(size.new_full((2,), -(RADIUS + 1)), size + RADIUS)  # past this, every cell is the border's
    corner = xy.floor()
    cells = torch.arange(-RADIUS, RADIUS + 2, device=xy.device)
    x = (corner[..., 0, None].long() + cells).clamp(0, width - 1)  # [*P, 8]
    y = (corner[..., 1, None].long() + cells).clamp(0, height - 1)
    rows = frames[..., None, None] * (height * width) + y[..., None, :] * width + x[..., :, None]
    return rows, xy - corner


def _interpolate(cells: Tensor, fraction: Tensor) -> Tensor:
    """[*P, 8, 8, K] at whole cells to [*P, 7, 7, K] at the fraction [*P, 2] between them."""
    x, y = fraction[..., 0, None, None, None], fraction[..., 1, None, None, None]
    cells = torch.lerp(cells[..., :-1, :, :], cells[..., 1:, :, :], x)
    return torch.lerp(cells[..., :, :-1, :], cells[..., :, 1:, :], y)
