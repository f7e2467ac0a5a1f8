"""Label propagation: each frame takes over the labels of the most similar places in earlier frames.

No training: a cell's soft mask is the mean of the masks of its nearest cells, by cosine similarity, in
the first frame and the last few, within a window around its own position.

Source: Jabri et al., NeurIPS 2020; Caron et al., DINO, ICCV 2021, DAVIS evaluation, whose settings and
numbers are reproduced. Deviation: square frames are treated like all others (the published code gives
picture and mask transposed sizes).

Shapes: C feature channels, K labels, h w grid of cells, S earlier frames, n cells of a tile.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from kinema.pipelines.evaluate.davis.folder import VOID, DavisSequence

FRAME_SIDE, FRAME_MULTIPLE, CELL_PX = 480, 64, 8
TILE = 8

DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
"""Normalisation of DINO's DAVIS evaluation; its first standard deviation is 0.228, not ImageNet's 0.229."""


@dataclass(frozen=True)
class PropagationSettings:
    """How labels travel; the defaults are the published ones."""

    num_last_frames: int = 7
    """Frames before the current one that are looked at, besides the first."""
    radius: int = 12
    """Cells within this distance along each axis are looked at; 0 means all."""
    top_k: int = 5
    """Number of most similar cells that pass on their labels; ties with the last one count too."""
    temperature: float = 0.1
    """Cosine similarities are divided by this before the exponential."""

    def __post_init__(self) -> None:
        if self.num_last_frames < 1 or self.radius < 0 or self.top_k < 1 or self.temperature <= 0:
            raise ValueError(f"{self}: num_last_frames and top_k from 1, radius from 0, temperature above 0")


@torch.no_grad()
def segment_by_propagation(
    features: Callable[[Tensor], Float[Tensor, "C h w"]],
    sequence: DavisSequence,
    settings: PropagationSettings | None = None,
    frame_side: int = FRAME_SIDE,
) -> tuple[UInt8[np.ndarray, "T H W"], UInt8[np.ndarray, "T H W"]]:
    """Masks of every frame of a sequence, and its annotations, at the annotations' size.

    Args:
        features: gets a frame [3, H, W] in 0..1 whose sides suit the protocol (`frame_size`); its map may
            have any size, but a map finer than 1/8 of the frame is averaged down to that.
        settings: by default the published ones.
        frame_side: shorter side of the frames that `features` sees.
    """
    settings = settings or PropagationSettings()
    annotated = sequence.labels()
    height, width = annotated.shape[1:]
    seen = frame_size(height, width, frame_side)
    maps = (_cells(features(_read_frame(path, seen)), seen) for path in sequence.frames)
    first = next(maps)
    one_hot = first_mask(annotated[0], *first.shape[1:]).to(first.device)
    out = [np.where(annotated[0] == VOID, 0, annotated[0])]
    for soft in propagate(first, maps, one_hot, settings):
        out.append(final_labels(soft, seen, (height, width)))
    return np.stack(out).astype(np.uint8), annotated


def frame_size(height: int, width: int, side: int = FRAME_SIDE) -> tuple[int, int]:
    """Size at which frames are compared: shorter side `side`, the other rounded down to a multiple of 64."""
    longer = int(side * max(height, width) / min(height, width) // FRAME_MULTIPLE * FRAME_MULTIPLE)
    longer = max(longer, FRAME_MULTIPLE)
    return (longer, side) if height > width else (side, longer)


def propagate(
    first_features: Float[Tensor, "C h w"],
    later_features: Iterable[Float[Tensor, "C h w"]],
    first_soft: Float[Tensor, "K h w"],
    settings: PropagationSettings,
) -> Iterator[Float[Tensor, "K h w"]]:
    """Soft masks of the frames after the first, one by one."""
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.num_last_frames)
    reference = (F.normalize(first_features.float(), dim=0), first_soft)
    for raw in later_features:
        target = F.normalize(raw.float(), dim=0)
        sources = [reference, *recent]
        soft = propagate_step(
            target, torch.stack([s[0] for s in sources]), torch.stack([s[1] for s in sources]), settings
        )
        yield soft
        recent.append((target, soft))


def propagate_step(
    target: Float[Tensor, "C h w"],
    sources: Float[Tensor, "S C h w"],
    soft_masks: Float[Tensor, "S K h w"],
    settings: PropagationSettings,
) -> Float[Tensor, "K h w"]:
    """Soft mask of one frame from earlier frames; features have unit length over C.

    Worked off in tiles: all cells of a tile share one window of candidates, a little larger than each
    cell's own, so the affinity of every cell with every other is never formed.
    """
    _, height, width = target.shape
    out = soft_masks.new_empty(soft_masks.shape[1], height, width)
    tile = TILE if settings.radius else max(height, width)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            area = (slice(top, min(top + tile, height)), slice(left, min(left + tile, width)))
            window = (_widened(area[0], settings.radius, height), _widened(area[1], settings.radius, width))
            near = _neighbours(area, window, settings.radius).to(target.device)  # [n, m]
            queries = target[:, *area].flatten(1)  # [C, n]
            candidates = sources[:, :, *window].flatten(2)  # [S, C, m]
            affinity = (queries.T @ candidates / settings.temperature).exp() * near  # [S, n, m]
            affinity = affinity.transpose(0, 1).flatten(1)  # [n, S m]
            kth = affinity.topk(min(settings.top_k, affinity.shape[1])).values[:, -1:]
            affinity = torch.where(affinity < kth, 0.0, affinity)
            affinity = affinity / affinity.sum(1, keepdim=True)
            labels = soft_masks[:, :, *window].flatten(2).transpose(1, 2).flatten(0, 1)  # [S m, K]
            out[:, *area] = (affinity @ labels).T.reshape(-1, *(s.stop - s.start for s in area))
    return out


def first_mask(labels: UInt8[np.ndarray, "H W"], height: int, width: int) -> Float[Tensor, "K h w"]:
    """One-hot annotation on the grid, nearest; as many labels as survive the resize."""
    known = np.where(labels == VOID, 0, labels).astype(np.uint8)
    small = np.array(Image.fromarray(known).resize((width, height), Image.Resampling.NEAREST))
    return F.one_hot(torch.from_numpy(small).long()).permute(2, 0, 1).float()


def final_labels(
    soft: Float[Tensor, "K h w"], frame_hw: tuple[int, int], output_hw: tuple[int, int]
) -> UInt8[np.ndarray, "H W"]:
    """Label map of the output size from a soft mask on the grid.

    Bilinear to the frame's size, each label stretched to 0..1 over the picture, arg-max, nearest.
    """
    fine = F.interpolate(soft[None], size=frame_hw, mode="bilinear", align_corners=False)[0]
    low, high = (extreme(fine.flatten(1), 1).view(-1, 1, 1) for extreme in (torch.amin, torch.amax))
    # A constant map has nothing to stretch; it stays, so that a lone background wins everywhere.
    stretched = torch.where(high > low, (fine - low) / (high - low).clamp_min(1e-30), fine)
    labels = Image.fromarray(stretched.argmax(0).byte().cpu().numpy())
    return np.array(labels.resize(output_hw[::-1], Image.Resampling.NEAREST))


def _widened(area: slice, radius: int, size: int) -> slice:
    return slice(max(0, area.start - radius), min(size, area.stop + radius)) if radius else slice(0, size)


def _neighbours(area: tuple[slice, slice], window: tuple[slice, slice], radius: int) -> Float[Tensor, "n m"]:
    """1 where a cell of the window lies within the radius of a cell of the area, along both axes."""
    near = []
    for inner, outer in zip(area, window, strict=True):
        distance = torch.arange(inner.start, inner.stop)[:, None] - torch.arange(outer.start, outer.stop)
        near.append((distance.abs() <= radius) | (radius == 0))
    rows, columns = near
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1).float()


def _read_frame(path: Path, size: tuple[int, int]) -> Float[Tensor, "3 H W"]:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError(f"{path}: not a readable picture")
    resized = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(np.ascontiguousarray(resized[..., ::-1])).permute(2, 0, 1).float() / 255


def _cells(feature_map: Float[Tensor, "C h w"], frame_hw: tuple[int, int]) -> Float[Tensor, "C gh gw"]:
    limit = (max(1, frame_hw[0] // CELL_PX), max(1, frame_hw[1] // CELL_PX))
    if feature_map.shape[1] <= limit[0] and feature_map.shape[2] <= limit[1]:
        return feature_map.detach()
    return F.adaptive_avg_pool2d(feature_map.detach()[None], limit)[0]
