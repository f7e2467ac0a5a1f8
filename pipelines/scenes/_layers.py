"""What a shot is made of: similarity transforms, rounded boxes, smooth motion, periodic textures.

Points are complex numbers x + iy, in pixels with centres at integers: a similarity transform (turn, scale, shift) is
then one product and one sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import scipy.fft
from jaxtyping import Complex128, Float, Float32

TEXELS_PER_PX = 2
SHORTEST_WAVE_PX = 3.5

# Drawn textures held at a time; a shot needs about a dozen, of 0.5 to 7 MB each.
TEXTURES_KEPT = 48

Points = Complex128[np.ndarray, "*shape"]


@dataclass(frozen=True)
class Similarity:
    """z -> turn * z + shift; |turn| is the scale, its angle the rotation."""

    turn: complex = 1.0 + 0.0j
    shift: complex = 0.0j

    def __call__(self, points: Points) -> Points:
        return self.turn * points + self.shift

    def inverse(self, points: Points) -> Points:
        """Points that this transform takes to `points`."""
        return (points - self.shift) / self.turn

    def after(self, first: Similarity) -> Similarity:
        """The transform that applies `first`, then this one."""
        return Similarity(self.turn * first.turn, self.turn * first.shift + self.shift)

    @staticmethod
    def about(pivot: complex, turn: complex, shift: complex = 0.0j) -> Similarity:
        """Turn and scale about `pivot`, then shift."""
        return Similarity(turn, pivot - turn * pivot + shift)


@dataclass(frozen=True)
class Swing:
    """amplitude * sin(rate * t + phase): smooth and bounded, so that what swings stays in view; t in frames."""

    amplitude: float
    rate: float
    phase: float

    def __call__(self, t: float) -> float:
        return self.amplitude * math.sin(self.rate * t + self.phase)

    @staticmethod
    def draw(rng: np.random.Generator, amplitude: float, peak: float) -> Swing:
        """A swing with `peak` as its largest change per frame, give or take a third."""
        rate = peak / amplitude * rng.uniform(0.67, 1.33) if amplitude else 0.0
        return Swing(amplitude, rate, rng.uniform(0, 2 * math.pi))


@dataclass(frozen=True)
class RoundedBox:
    """A box with round corners about the origin of its layer; half sizes and corner radius in pixels."""

    half_width: float
    half_height: float
    radius: float

    def distance(self, points: Points) -> Float[np.ndarray, "*shape"]:
        """Signed Euclidean distance to the outline, negative inside."""
        x = np.abs(points.real) - (self.half_width - self.radius)
        y = np.abs(points.imag) - (self.half_height - self.radius)
        outside = np.hypot(np.maximum(x, 0), np.maximum(y, 0))
        return outside + np.minimum(np.maximum(x, y), 0) - self.radius

    @property
    def reach(self) -> float:
        """No point of the box is farther than this from its origin."""
        return math.hypot(self.half_width, self.half_height)


class Texture:
    """A periodic colour pattern over the plane, without waves shorter than the pixel grid can carry.

    Three scales: patches of three colours with soft edges, mottling, and a fine grain on top of them. It is made
    when it is drawn, so that asking for motion alone costs nothing; only those drawn last are kept.
    """

    def __init__(self, seed: int, tile_px: int, palette: Float[np.ndarray, "3 3"]):
        self._side = tile_px * TEXELS_PER_PX
        self._arguments = (seed, self._side, tuple(map(tuple, palette.tolist())))

    def sample(self, points: Points) -> Float32[np.ndarray, "H W 3"]:
        """Colours in [0, 1] at points [H, W] of the layer."""
        x = np.mod(points.real * TEXELS_PER_PX, self._side).astype(np.float32)
        y = np.mod(points.imag * TEXELS_PER_PX, self._side).astype(np.float32)
        return cv2.remap(_texture_image(*self._arguments), x, y, cv2.INTER_LINEAR)


@lru_cache(TEXTURES_KEPT)
def _texture_image(seed: int, side: int, palette: tuple[tuple[float, ...], ...]) -> Float32[np.ndarray, "S S 3"]:
    """The texels of a texture, and one more row and column: interpolation across the seam stays inside the array."""
    rng = np.random.default_rng(seed)
    base, second_colour, third_colour = np.array(palette)
    first, second = ((np.tanh(4 * _noise(rng, side, 14, 90)) + 1) / 2 for _ in range(2))
    colours = base + first[..., None] * (second_colour - base)
    colours = colours + 0.8 * second[..., None] * (third_colour - colours)
    mottle = 0.05 * _noise(rng, side, 8, 30)
    grain = 0.03 * _noise(rng, side, SHORTEST_WAVE_PX, 8)
    smooth = _low_pass(colours + (mottle + grain)[..., None], SHORTEST_WAVE_PX)
    image = np.clip(smooth, 0.02, 0.98).astype(np.float32)
    return np.pad(image, ((0, 1), (0, 1), (0, 0)), mode="wrap")


@dataclass(frozen=True)
class Layer:
    """One rigid surface of a shot. `pose(t)` takes layer points to the image; no box means the whole plane."""

    part: int
    object: int
    box: RoundedBox | None
    texture: Texture
    pose: Callable[[float], Similarity]

    def covers(self, image_points: Points, t: float) -> np.ndarray:
        """Whether the layer lies over each image point at frame t."""
        if self.box is None:
            return np.ones(image_points.shape, bool)
        return self.box.distance(self.pose(t).inverse(image_points)) < 0

    def paint(self, canvas: Float32[np.ndarray, "H W 3"], t: float) -> None:
        """Blend the layer over the canvas; its outline is one pixel wide, so that it does not crawl."""
        height, width = canvas.shape[:2]
        pose = self.pose(t)
        rows, columns = slice(0, height), slice(0, width)
        if self.box is not None:
            reach = abs(pose.turn) * self.box.reach + 2
            rows = _clipped(pose.shift.imag, reach, height)
            columns = _clipped(pose.shift.real, reach, width)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        y, x = np.mgrid[rows, columns]
        points = pose.inverse(x + 1j * y)
        colour = self.texture.sample(points)
        if self.box is None:
            canvas[rows, columns] = colour
            return
        distance_px = self.box.distance(points) * abs(pose.turn)
        alpha = np.clip(0.5 - distance_px, 0, 1).astype(np.float32)[..., None]
        canvas[rows, columns] += alpha * (colour - canvas[rows, columns])


def _clipped(centre: float, reach: float, size: int) -> slice:
    return slice(max(0, math.floor(centre - reach)), min(size, math.ceil(centre + reach) + 1))


def _frequency(side: int) -> np.ndarray:
    """Waves per pixel of each entry of rfft2 over a [side, side] tile of texels."""
    fy = np.fft.fftfreq(side)[:, None] * TEXELS_PER_PX
    fx = np.fft.rfftfreq(side)[None, :] * TEXELS_PER_PX
    return np.hypot(fy, fx)


def _noise(rng: np.random.Generator, side: int, shortest_px: float, longest_px: float) -> np.ndarray:
    """Periodic noise [side, side] of unit variance; wavelengths between the two, amplitude 1 / frequency."""
    frequency = _frequency(side)
    band = (frequency >= 1 / longest_px) & (frequency <= 1 / shortest_px)
    weight = np.where(band, 1 / np.maximum(frequency, 1e-9), 0).astype(np.float32)
    white = rng.standard_normal((side, side), dtype=np.float32)
    noise = scipy.fft.irfft2(scipy.fft.rfft2(white) * weight, s=(side, side))
    return noise / noise.std()


def _low_pass(image: Float[np.ndarray, "S S C"], shortest_px: float) -> np.ndarray:
    side = image.shape[0]
    keep = (_frequency(side) <= 1 / shortest_px)[..., None]
    return scipy.fft.irfft2(scipy.fft.rfft2(image, axes=(0, 1)) * keep, s=(side, side), axes=(0, 1))
