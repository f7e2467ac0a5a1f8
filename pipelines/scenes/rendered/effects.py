"""Photometric effects of a rendered shot: what changes between frames without motion.

Motion blur follows each layer. The rest falls on the finished picture: light and shadow that move on their own, fog
that thickens with depth, the camera's colours and noise, and compression. The same seed, index and frame give the same
picture; effects do not touch flow or occlusion.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Int8, UInt8

from kinema.configs.rendered import EffectsConfig
from kinema.pipelines.scenes.rendered.layers import Layer
from kinema.pipelines.scenes.rendered.motion import apply

_NOISE_SIDE = 1024
_FIELD_WIDTH = 64
LONGEST_BLUR_PX = 12.0
_LONGEST_KERNEL_PX = 8.0
_ORIGIN = np.zeros(2)


class Streak(NamedTuple):
    """How far a layer moves while the shutter is open, in pixels."""

    x: float
    y: float


class ShotEffects:
    """The effects of one shot, drawn once; `apply` puts them on a frame."""

    def __init__(self, chances: EffectsConfig, seed: int, index: int, size: tuple[int, int], num_layers: int):
        self._seed = (seed, 2, index)
        self._size = size
        rng = np.random.default_rng(self._seed)
        drawn = rng.random(7)
        self.shutter = rng.uniform(0.2, 0.7) if drawn[0] < chances.motion_blur else 0.0
        self.light = rng.uniform(0.05, 0.25) if drawn[1] < chances.lighting else 0.0
        self.shadow = rng.uniform(0.2, 0.6) if drawn[2] < chances.shadow else 0.0
        self.fog = rng.uniform(0.2, 0.9) if drawn[3] < chances.fog else 0.0
        self.colour = rng.uniform(0.02, 0.12) if drawn[4] < chances.colour else 0.0
        self.noise = int(rng.integers(1, 9)) if drawn[5] < chances.noise else 0
        self.quality = int(rng.integers(35, 90)) if drawn[6] < chances.compression else 0
        self._light_fields = rng.standard_normal((2, 5, 6), dtype=np.float32)
        self._shadow_shape = rng.standard_normal((7, 9), dtype=np.float32)
        self._shadow_speed = rng.normal(0, 0.15, 2)
        self._fog_shape = rng.uniform(0.7, 1.3, (4, 5)).astype(np.float32)
        self._fog_grey = rng.uniform(150, 235)
        depths = np.sort(rng.uniform(0.2, 1.0, num_layers))[::-1]
        self._depths = np.concatenate([[1.0], depths[1:]]).astype(np.float32)

    def streak(self, layer: Layer, t: float) -> Streak | None:
        """A line along the layer's motion while the shutter is open; None when it is shorter than a pixel."""
        if not self.shutter:
            return None
        middle = np.array([(self._size[1] - 1) / 2, (self._size[0] - 1) / 2])
        poses = [layer.pose(t), layer.pose(t + self.shutter)]
        place = apply(np.linalg.inv(poses[0]), middle) if layer.mask is None else _ORIGIN
        start, stop = (apply(pose, place) for pose in poses)
        x, y = stop - start
        length = math.hypot(x, y)
        if length < 1.0:
            return None
        factor = min(1.0, LONGEST_BLUR_PX / length)
        return Streak(round(float(x * factor), 1), round(float(y * factor), 1))

    def apply(self, t: int, image: UInt8[np.ndarray, "H W 3"], labels: UInt8[np.ndarray, "H W"]) -> np.ndarray:
        """The picture with every effect but motion blur."""
        rng = np.random.default_rng([*self._seed, t])
        gain = self._gain(t)
        if gain is not None:
            image = cv2.multiply(image, cv2.merge([gain, gain, gain]), dtype=cv2.CV_8U)  # type: ignore[call-overload]
        if self.fog:
            image = self._fogged(image, labels)
        if self.noise:
            top, left = (int(v) for v in rng.integers(0, _NOISE_SIDE - np.array(self._size) + 1))
            grain = _noise_tile(self.noise)[top : top + self._size[0], left : left + self._size[1]]
            image = cv2.add(image, grain, dtype=cv2.CV_8U)  # type: ignore[call-overload]  # clipped to 0..255
        if self.colour:
            image = cv2.LUT(image, self._curves(rng))
        if self.quality:
            quality = int(np.clip(self.quality + rng.integers(-8, 9), 20, 95))
            _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
            decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
            assert decoded is not None  # it was encoded just now
            image = decoded
        return np.ascontiguousarray(image, dtype=np.uint8)

    def _gain(self, t: int) -> Float32[np.ndarray, "H W"] | None:
        """Light and shadow as a factor of every pixel; None where there is neither."""
        if not self.light and not self.shadow:
            return None
        small = (_FIELD_WIDTH * self._size[0] // self._size[1], _FIELD_WIDTH)
        total = np.ones(small, np.float32)
        if self.light:
            phase = 0.9 * t
            field = math.cos(phase) * self._light_fields[0] + math.sin(phase) * self._light_fields[1]
            total = np.exp(np.float32(self.light) * _resized(field, small))
        if self.shadow:
            x, y = self._shadow_speed * t * _FIELD_WIDTH / 25
            moved = cv2.warpAffine(_resized(self._shadow_shape, small), np.array([[1.0, 0, x], [0, 1, y]]), small[::-1],
                                   borderMode=cv2.BORDER_REFLECT_101)  # fmt: skip
            total *= 1 - np.float32(self.shadow) * np.clip(3 * moved, 0, 1)
        return cv2.resize(total, self._size[::-1], interpolation=cv2.INTER_LINEAR)

    def _fogged(self, image: UInt8[np.ndarray, "H W 3"], labels: UInt8[np.ndarray, "H W"]) -> np.ndarray:
        small = (_FIELD_WIDTH * self._size[0] // self._size[1], _FIELD_WIDTH)
        density = cv2.resize(_resized(self._fog_shape, small), self._size[::-1], interpolation=cv2.INTER_LINEAR)
        table = np.zeros(256, np.float32)
        table[: len(self._depths)] = self._depths
        clear = np.exp(-np.float32(self.fog) * density * table[labels])
        veil = np.full_like(image, round(self._fog_grey))
        return cv2.blendLinear(image, veil, clear, 1 - clear)

    def _curves(self, rng: np.random.Generator) -> UInt8[np.ndarray, "1 256 3"]:
        """Gain, gamma and offset of the camera, a little different in every channel."""
        level = np.linspace(0, 1, 256)[:, None]
        common, channel = rng.normal(0, self.colour, 3), rng.normal(0, 0.3 * self.colour, (3, 3))
        gamma, gain = np.exp(common[0] + channel[0]), np.exp(common[1] + channel[1])
        curves = gain * level**gamma + 0.3 * (common[2] + channel[2])
        return np.rint(255 * np.clip(curves, 0, 1)).astype(np.uint8)[None]


def _resized(field: Float32[np.ndarray, "h w"], size: tuple[int, int]) -> Float32[np.ndarray, "H W"]:
    return cv2.resize(field.astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)


@lru_cache(8)
def _noise_tile(sigma: int) -> Int8[np.ndarray, "S S 3"]:
    """Grain of this standard deviation in grey levels, half of it the same in all channels."""
    return np.clip(np.rint(_unit_grain() * np.float32(sigma)), -127, 127).astype(np.int8)


@lru_cache(1)
def _unit_grain() -> Float32[np.ndarray, "S S 3"]:
    rng = np.random.default_rng(20250)
    own = rng.standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3), dtype=np.float32)
    shared = rng.standard_normal((_NOISE_SIDE, _NOISE_SIDE, 1), dtype=np.float32)
    return (own + shared) / np.float32(math.sqrt(2))


def smeared(image: UInt8[np.ndarray, "H W *C"], streak: Streak, border: int) -> UInt8[np.ndarray, "H W *C"]:
    """The image averaged along a segment.

    A long segment is two halves: averaged along one half, then over that at its two places. Kernels stay below 130
    weights, from where on OpenCV filters by a Fourier transform, ten times as slowly.
    """
    x, y = streak
    if max(abs(x), abs(y)) <= _LONGEST_KERNEL_PX:
        return cv2.filter2D(image, -1, _line(x, y), borderType=border)
    half = cv2.filter2D(image, -1, _line(x / 2, y / 2), borderType=border)
    return cv2.filter2D(half, -1, _ends(x / 2, y / 2), borderType=border)


@lru_cache(4096)
def _line(x: float, y: float) -> Float32[np.ndarray, "k k"]:
    """Weights along a segment of this extent about the middle, anti-aliased."""
    half = math.ceil(max(abs(x), abs(y)) / 2) + 1
    count = 4 * (2 * half + 1)
    return _drawn_at((np.arange(count) + 0.5) / count - 0.5, x, y, half)


@lru_cache(4096)
def _ends(x: float, y: float) -> Float32[np.ndarray, "k k"]:
    """Equal weights at the two ends of a segment of this extent about the middle."""
    return _drawn_at(np.array([-0.5, 0.5]), x, y, math.ceil(max(abs(x), abs(y)) / 2) + 1)


def _drawn_at(shares: np.ndarray, x: float, y: float, half: int) -> Float32[np.ndarray, "k k"]:
    """A kernel of side 2 half + 1 with equal weights, bilinear between its pixels, at `shares` of (x, y)."""
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    columns, rows = half + x * shares, half + y * shares
    left, top = columns.astype(int), rows.astype(int)
    fx, fy = columns - left, rows - top
    for i, j, weight in ((0, 0, (1 - fy) * (1 - fx)), (0, 1, (1 - fy) * fx), (1, 0, fy * (1 - fx)), (1, 1, fy * fx)):
        np.add.at(kernel, (top + i, left + j), weight)
    return kernel / kernel.sum()
