"""Outlines of objects as masks: polygons, smooth blobs, and regions cut out of an image.

A mask has a texel for each pixel of its object at rest, the object's origin in its middle, and is 0 at its rim.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import UInt8

from kinema.pipelines.scenes.rendered.textures import TEXELS_PER_PX, texture

MARGIN = 3
_SHIFT = 4  # OpenCV draws at 1/16 px
_CUT_OUT_SIDE = 96


def polygon(rng: np.random.Generator, radius: float) -> UInt8[np.ndarray, "s s"]:
    """Three to nine corners around the middle."""
    count = int(rng.integers(3, 10))
    angles = 2 * np.pi * (np.arange(count) + rng.uniform(-0.35, 0.35, count)) / count
    return _filled(angles, rng.uniform(0.45, 1.0, count) * radius, radius)


def blob(rng: np.random.Generator, radius: float) -> UInt8[np.ndarray, "s s"]:
    """A smooth closed curve."""
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    waves = sum(rng.uniform(0, 0.5 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in range(1, 7))
    lengths = np.clip(0.7 + 0.5 * waves, 0.15, 1.0)
    return _filled(angles, lengths * radius, radius)


def cut_out(folder: str, seed: int, number: int, radius: float) -> UInt8[np.ndarray, "s s"]:
    """The region of a texture around its middle whose colours are alike, as an image shows an object."""
    small = _region(folder, seed, number)
    inner = 2 * int(np.ceil(radius)) - 1
    mask = cv2.resize(small, (inner, inner), interpolation=cv2.INTER_LINEAR)
    # The threshold puts the outline back to the width of a pixel.
    sharp = np.clip((mask.astype(np.float32) - 128) * (inner / _CUT_OUT_SIDE) + 128, 0, 255).astype(np.uint8)
    return cv2.copyMakeBorder(sharp, MARGIN, MARGIN, MARGIN, MARGIN, cv2.BORDER_CONSTANT, value=0)


@lru_cache(128)
def _region(folder: str, seed: int, number: int) -> UInt8[np.ndarray, "96 96"]:
    """Pixels near the colours of the middle, connected, smoothed; a disc where that is too little or too much."""
    image = texture(folder, seed, number)[..., :3]
    side = int(min(image.shape[:2]) / TEXELS_PER_PX)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    small = cv2.resize(image[top : top + side, left : left + side], (_CUT_OUT_SIDE, _CUT_OUT_SIDE),
                       interpolation=cv2.INTER_AREA)  # fmt: skip
    lab = cv2.cvtColor(cv2.GaussianBlur(small, (0, 0), 2), cv2.COLOR_RGB2LAB).astype(np.float32)
    middle = slice(_CUT_OUT_SIDE * 2 // 5, _CUT_OUT_SIDE * 3 // 5)
    distance = np.linalg.norm(lab - np.median(lab[middle, middle].reshape(-1, 3), axis=0), axis=-1)
    y, x = np.mgrid[:_CUT_OUT_SIDE, :_CUT_OUT_SIDE] - (_CUT_OUT_SIDE - 1) / 2
    disc = np.hypot(x, y) < 0.47 * _CUT_OUT_SIDE
    alike = (distance < np.quantile(distance[disc], 0.6)) & disc
    count, parts = cv2.connectedComponents(alike.astype(np.uint8))
    mask = parts == 1 + int(np.argmax([np.count_nonzero(parts == k) for k in range(1, count)])) if count > 1 else disc
    if not 0.1 < mask.mean() < 0.68:
        mask = disc
    return cv2.GaussianBlur(255 * mask.astype(np.uint8), (0, 0), 1.5)


def _filled(angles: np.ndarray, lengths: np.ndarray, radius: float) -> UInt8[np.ndarray, "s s"]:
    half = int(np.ceil(radius)) + MARGIN
    corners = half - 1 + np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1)
    mask = np.zeros((2 * half - 1, 2 * half - 1), np.uint8)
    points = np.rint(corners * 2**_SHIFT).astype(np.int32)
    cv2.fillPoly(mask, [points], 255, lineType=cv2.LINE_AA, shift=_SHIFT)
    return mask
