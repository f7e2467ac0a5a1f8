"""Textures of rendered shots: procedural, or from any folder of images; each made once per process and kept.

A texture has TEXELS_PER_PX texels for a pixel of the frame and no detail finer than the frame can carry, so that
sampling it between texels shows what sampling the surface itself would. It is RGB and a fourth channel that means
nothing: OpenCV warps four channels twice as fast as three.
"""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

TEXELS_PER_PX = 1.5
HEIGHT, WIDTH = 720, 1080
"""Texels of a procedural texture; what lies beyond is its mirror image."""
SMOOTHING_TEXELS = 1.3
"""Standard deviation of the low-pass filter: waves shorter than about 3 px of a frame are gone."""
KEPT = 64
_PICTURES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"))


def texture(folder: str, seed: int, number: int, detail: float = 1.0) -> UInt8[np.ndarray, "h w 4"]:
    """Texture `number` of a seed: an image of the folder, or a procedural one when there is no folder.

    Args: detail, how many times smaller what it shows is; a picture of 1/detail of the usual size needs it to show as
        much as usual.
    Raises: ValueError for a folder without an image that can be decoded.
    """
    if detail != 1.0:
        return _shrunk(folder, seed, number, detail)
    return _from_folder(folder, number) if folder else _procedural(seed, number)


@lru_cache(KEPT)
def _shrunk(folder: str, seed: int, number: int, detail: float) -> UInt8[np.ndarray, "h w 4"]:
    """A texture at 1/detail of its sides, blurred first so that it has no finer detail per texel than the usual one."""
    image = texture(folder, seed, number)
    size = [round(side / detail) for side in image.shape[1::-1]]
    smooth = cv2.GaussianBlur(image, (0, 0), SMOOTHING_TEXELS * math.sqrt(detail**2 - 1))
    return cv2.resize(smooth, size, interpolation=cv2.INTER_LINEAR)


@lru_cache(KEPT)
def _procedural(seed: int, number: int) -> UInt8[np.ndarray, "h w 4"]:
    """Clouds of two or three colours, patches with edges, stripes, shapes and grain."""
    rng = np.random.default_rng([seed, 7, number])
    palette = _palette(rng, int(rng.integers(3, 6)))
    image = _patches(_clouds(rng, 1, int(rng.integers(3, 6)))[..., 0], palette)
    if rng.random() < 0.4:
        image = _striped(rng, image, palette)
    for _ in range(int(rng.integers(8, 90))):
        _stamp(rng, image, palette)
    relief = _clouds(rng, 1, 2) * 22 + _clouds(rng, 1, 6, first=5) * 24 + _clouds(rng, 3, 1, first=6) * 5
    return _finished(image + relief)


def _clouds(rng: np.random.Generator, channels: int, octaves: int, first: int = 1) -> Float32[np.ndarray, "h w c"]:
    """Value noise of zero mean, about unit size, octave k with 2^k cells across and half the size of the one before."""
    total = np.zeros((HEIGHT, WIDTH, channels), np.float32)
    size = 1.0
    for octave in range(first, first + octaves):
        cells = (max(2, 2**octave * HEIGHT // WIDTH), 2**octave, channels)
        grid = rng.standard_normal(cells, dtype=np.float32)
        upsampled = cv2.resize(grid, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        total += size * upsampled.reshape(total.shape)
        size *= 0.6
    return total


def _patches(height: Float32[np.ndarray, "h w"], palette: np.ndarray) -> Float32[np.ndarray, "h w 3"]:
    """Regions of palette colours between level lines of a landscape."""
    levels = np.quantile(height[::16, ::16], np.linspace(0, 1, len(palette) + 1)[1:-1])
    return palette[np.searchsorted(levels, height.ravel())].reshape(*height.shape, 3).astype(np.float32)


def _striped(rng: np.random.Generator, image: np.ndarray, palette: np.ndarray) -> Float32[np.ndarray, "h w 3"]:
    """Stripes or checks of another colour over a part of the texture."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(12, 70)
    x, y = np.arange(WIDTH, dtype=np.float32)[None], np.arange(HEIGHT, dtype=np.float32)[:, None]
    phase = (np.cos(angle) * x + np.sin(angle) * y) % period < period / 2
    if rng.random() < 0.5:
        phase ^= (np.sin(angle) * x - np.cos(angle) * y) % period < period / 2
    where = phase & (_clouds(rng, 1, 2)[..., 0] > rng.uniform(-0.5, 0.5))
    return np.where(where[..., None], palette[rng.integers(len(palette))].astype(np.float32), image)


def _stamp(rng: np.random.Generator, image: np.ndarray, palette: np.ndarray) -> None:
    """A polygon, ellipse or line of one colour."""
    colour = [float(c) for c in palette[rng.integers(len(palette))] + rng.uniform(-30, 30)]
    centre = rng.uniform((0, 0), (WIDTH, HEIGHT))
    size = rng.uniform(6, 70)
    kind = rng.integers(3)
    if kind == 0:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        corners = centre + size * np.stack([np.cos(angles), np.sin(angles)], 1)
        cv2.fillPoly(image, [np.rint(corners).astype(np.int32)], colour)
    elif kind == 1:
        axes = (max(1, round(size)), max(1, round(size * rng.uniform(0.2, 1))))
        cv2.ellipse(image, (round(centre[0]), round(centre[1])), axes, float(rng.uniform(0, 180)), 0, 360, colour, -1)
    else:
        end = centre + rng.uniform(-3, 3, 2) * size
        ends = [(round(float(p[0])), round(float(p[1]))) for p in (centre, end)]
        cv2.line(image, ends[0], ends[1], colour, int(rng.integers(2, 9)))


def _palette(rng: np.random.Generator, count: int) -> Float32[np.ndarray, "N 3"]:
    """Colours around one hue, one of them of another, from dark to light."""
    hue = rng.uniform()
    hues = [(hue + (0.5 if k == 0 else rng.uniform(-0.12, 0.12))) % 1.0 for k in range(count)]
    values = np.linspace(rng.uniform(0.08, 0.3), rng.uniform(0.7, 0.95), count)
    colours = [colorsys.hsv_to_rgb(h, rng.uniform(0.1, 0.75), v) for h, v in zip(hues, values, strict=True)]
    return (np.array(colours)[rng.permutation(count)] * 255).astype(np.float32)


@lru_cache(8)
def image_files(folder: str) -> tuple[str, ...]:
    """Images below a folder, sorted. Raises: ValueError when there is none."""
    found = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in _PICTURES and p.is_file())
    if not found:
        raise ValueError(
            f"textures={folder} holds no image (.jpg, .png, ...); give a folder of images, or leave it out"
        )
    return tuple(found)


@lru_cache(KEPT)
def _from_folder(folder: str, number: int) -> UInt8[np.ndarray, "h w 4"]:
    """An image at about the size of a procedural texture; one that cannot be decoded gives way to the next."""
    files = image_files(folder)
    for shift in range(len(files)):
        path = files[(number + shift) % len(files)]
        data = np.fromfile(path, np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
        if image is not None and min(image.shape[:2]) >= 16:
            scale = max(HEIGHT / image.shape[0], WIDTH / image.shape[1])
            how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
            resized = cv2.resize(image, None, fx=scale, fy=scale, interpolation=how)
            return _finished(cv2.cvtColor(resized, cv2.COLOR_BGR2RGB).astype(np.float32))
    raise ValueError(f"textures={folder}: none of {len(files)} images can be decoded; give a folder of other images")


def _finished(image: np.ndarray) -> UInt8[np.ndarray, "h w 4"]:
    smooth = cv2.GaussianBlur(image, (0, 0), SMOOTHING_TEXELS)
    return cv2.cvtColor(np.rint(np.clip(smooth, 2, 253)).astype(np.uint8), cv2.COLOR_RGB2RGBA)
