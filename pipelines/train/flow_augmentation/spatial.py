"""Scale, stretch, flips and crops of a pair; flow and validity follow exactly."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float32

from kinema.configs.models.flow_augmentation import FlowAugmentationConfig
from kinema.models.flow.geometry import crop_flow, flip_flow, resize_flow
from kinema.pipelines.train.flow_augmentation.pair import KnownPair

SPARSE_MARGINS = (20, 50)
"""Rows below, and columns at both sides, by which a crop of sparse flow is drawn beyond the frame and then pushed back:
the borders, where cars pass, are seen more often."""
_WHOLE = 1 - 1e-4


def rescaled(
    pair: KnownPair,
    config: FlowAugmentationConfig,
    crop: tuple[int, int],
    rng: np.random.Generator,
    sparse: bool = False,
) -> KnownPair:
    """At a drawn size, never smaller than the crop; sparse flow with one scale for both axes."""
    scales = np.full(2, 2.0 ** rng.uniform(*config.scale_log2))  # y, x
    stretch = 2.0 ** rng.uniform(-config.stretch_log2, config.stretch_log2, size=2)
    if rng.random() < config.stretch_prob and not sparse:
        scales *= stretch
    if rng.random() >= config.scale_prob:
        scales[:] = 1.0
    least = np.array(crop) / np.array(pair.size)
    scales = np.maximum(scales, least.max() if sparse else least)
    height, width = (max(round(side * s), c) for side, s, c in zip(pair.size, scales, crop, strict=True))
    return resized_sparse(pair, height, width) if sparse else resized(pair, height, width)


def resized(pair: KnownPair, height: int, width: int) -> KnownPair:
    """Bilinear between pixel centres. Flow stays known where everything that it was blended from is."""
    if pair.size == (height, width):
        return pair
    images = [cv2.resize(i, (width, height), interpolation=cv2.INTER_LINEAR) for i in (pair.image1, pair.image2)]
    flow = resize_flow(torch.from_numpy(pair.flow_px), height, width, antialias=False).numpy()
    valid = _within_centres(pair.size, height, width)
    if not pair.valid.all():
        share = cv2.resize(pair.valid.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        valid &= share >= _WHOLE
    return KnownPair(images[0], images[1], np.where(valid, flow, np.float32(0)), valid)


def resized_sparse(pair: KnownPair, height: int, width: int) -> KnownPair:
    """Every known vector goes, unblended, to the pixel nearest to its new place; of several there, the nearest."""
    if pair.size == (height, width):
        return pair
    images = [cv2.resize(i, (width, height), interpolation=cv2.INTER_LINEAR) for i in (pair.image1, pair.image2)]
    scale_y, scale_x = height / pair.size[0], width / pair.size[1]
    rows, columns = np.nonzero(pair.valid)
    y, x = (rows + 0.5) * scale_y - 0.5, (columns + 0.5) * scale_x - 0.5
    to_row, to_column = np.rint(y).astype(int), np.rint(x).astype(int)
    inside = (to_row >= 0) & (to_row < height) & (to_column >= 0) & (to_column < width)
    farthest_first = np.argsort(-np.hypot(y - to_row, x - to_column)[inside], kind="stable")
    rows, columns = rows[inside][farthest_first], columns[inside][farthest_first]
    place = to_row[inside][farthest_first], to_column[inside][farthest_first]
    scale = np.array([[scale_x], [scale_y]], np.float32)
    flow, valid = np.zeros((2, height, width), np.float32), np.zeros((height, width), bool)
    flow[:, place[0], place[1]] = pair.flow_px[:, rows, columns] * scale
    valid[place] = True
    return KnownPair(images[0], images[1], flow, valid)


def flipped(pair: KnownPair, config: FlowAugmentationConfig, rng: np.random.Generator) -> KnownPair:
    """Mirrored left-right, top-bottom, both or not at all."""
    horizontal = bool(rng.random() < config.flip_horizontal)
    vertical = bool(rng.random() < config.flip_vertical)
    return mirrored(pair, horizontal, vertical)


def mirrored(pair: KnownPair, horizontal: bool, vertical: bool) -> KnownPair:
    """The mirrored frames, and the flow between them."""
    if not (horizontal or vertical):
        return pair
    step = (slice(None, None, -1 if vertical else 1), slice(None, None, -1 if horizontal else 1))
    flow = flip_flow(torch.from_numpy(pair.flow_px), horizontal, vertical).numpy()
    return KnownPair(pair.image1[step], pair.image2[step], flow, pair.valid[step])


def randomly_cropped(
    pair: KnownPair, crop: tuple[int, int], rng: np.random.Generator, margins: tuple[int, int] = (0, 0)
) -> KnownPair:
    """A window of the pair, everywhere alike. Raises: ValueError if the pair is smaller."""
    spare = [side - wanted for side, wanted in zip(pair.size, crop, strict=True)]
    if min(spare) < 0:
        raise ValueError(f"a pair of {pair.size[0]}x{pair.size[1]} is smaller than the crop of {crop[0]}x{crop[1]}")
    top = int(np.clip(rng.integers(0, spare[0] + margins[0] + 1), 0, spare[0]))
    left = int(np.clip(rng.integers(-margins[1], spare[1] + margins[1] + 1), 0, spare[1]))
    window = (slice(top, top + crop[0]), slice(left, left + crop[1]))
    flow = crop_flow(torch.from_numpy(pair.flow_px), top, left, *crop).numpy()
    return replace(pair, image1=pair.image1[window], image2=pair.image2[window], flow_px=flow, valid=pair.valid[window])


def _within_centres(size: tuple[int, int], height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """Where a pixel of the new size lies between pixel centres of the old; outside, flow would be extrapolated."""
    return np.logical_and.outer(_between(size[0], height), _between(size[1], width))


def _between(old: int, new: int) -> Bool[np.ndarray, " n"]:
    source: Float32[np.ndarray, " n"] = (np.arange(new) + 0.5) * (old / new) - 0.5
    return (source >= -1e-6) & (source <= old - 1 + 1e-6)
