"""One textured layer: what it shows at each pixel of a frame, and where these pixels lie in another frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from kinema.pipelines.scenes.rendered.motion import Matrix, Pose, ThinPlate, apply, shift
from kinema.pipelines.scenes.rendered.textures import texture

_STRIDE = 8
_NODES = 6
_BAND = 64  # rows, a multiple of the stride
_SMALL_AREA = 12000


class Window(NamedTuple):
    """A rectangle of a frame, in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


class View(NamedTuple):
    """A layer in a window of a frame."""

    alpha: UInt8[np.ndarray, "h w"] | None
    """Coverage in 255ths; None: everywhere."""
    colour: UInt8[np.ndarray, "h w 4"] | None
    targets: list[tuple[Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]]
    """(x, y) of the pixels' surface in every other frame that was asked for."""


@dataclass(frozen=True)
class Layer:
    """A surface in its own coordinates (px about its middle) and its pose, layer -> image, as a function of time."""

    mask: UInt8[np.ndarray, "s s"] | None
    """Coverage, with a texel a pixel and the origin in its middle; None: the whole plane."""
    texture: tuple[str, int, int, float]
    """Arguments of `textures.texture`."""
    to_texels: Matrix
    pose: Pose
    is_affine: bool
    plate: ThinPlate | None = None

    @cached_property
    def hull(self) -> Float[np.ndarray, "N 2"]:
        """Corners around all that the mask covers, and a texel more, as far as sampling reaches."""
        assert self.mask is not None
        outlines, _ = cv2.findContours(self.mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        outer = cv2.convexHull(np.concatenate(outlines))[:, 0].astype(np.float64) if outlines else np.zeros((1, 2))
        around = outer[:, None] + np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
        return around.reshape(-1, 2) - (len(self.mask) - 1) / 2

    def window(self, t: float, scale: Matrix, size: tuple[int, int]) -> Window | None:
        """The part of a frame [H, W] that the layer may touch; None for nothing."""
        height, width = size
        if self.mask is None:
            return Window(0, 0, width, height)
        corners = self.hull
        if self.plate is not None:
            reach = self.plate.longest_px
            (left, top), (right, bottom) = corners.min(axis=0) - reach, corners.max(axis=0) + reach
            corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
        matrix = scale @ self.pose(t)
        if (corners @ matrix[2, :2] + matrix[2, 2]).min() < 0.05:
            return Window(0, 0, width, height)
        placed = apply(matrix, corners)
        left, top = (max(0, math.floor(v) - 1) for v in placed.min(axis=0))
        right, bottom = (min(n, math.ceil(v) + 2) for n, v in zip((width, height), placed.max(axis=0), strict=True))
        return Window(left, top, right - left, bottom - top) if right > left and bottom > top else None

    def view(self, t: float, others: Sequence[float], window: Window, scale: Matrix, colour: bool) -> View:
        """Draw the layer in a window of frame t.

        Args: others, frames in which its pixels are looked for; scale, full-size pixels -> pixels of this frame.
        """
        poses = [scale @ self.pose(s) for s in (t, *others)]
        inverse = np.linalg.inv(poses[0]) @ shift(window.left, window.top)
        if self.plate is None:
            targets = [_mapped(pose @ inverse, window, self.is_affine) for pose in poses[1:]]
            alpha = None if self.mask is None else self._mask_warped(inverse, window)
            picture = self._texture_warped(inverse, window) if colour else None
            return View(alpha, picture, targets)
        return self._bent_view(t, others, poses, inverse, window, colour)

    def surface(self, points: Float[np.ndarray, "N 2"], t: float) -> Float[np.ndarray, "N 2"]:
        """Surface points shown at image points of frame t."""
        u = apply(np.linalg.inv(self.pose(t)), points)
        return u if self.plate is None else self.plate.bend(u, t)

    def shown(self, surface: Float[np.ndarray, "N 2"], t: float) -> Float[np.ndarray, "N 2"]:
        """Image points of frame t at which surface points are shown."""
        return apply(self.pose(t), surface if self.plate is None else self.plate.unbend(surface, t))

    def _bent_view(
        self, t: float, others: Sequence[float], poses: list[Matrix], inverse: Matrix, window: Window, colour: bool
    ) -> View:
        """Through a lattice of every eighth pixel: bending is smooth, so that what lies between follows from it."""
        assert self.plate is not None
        small = window.width * window.height <= _SMALL_AREA  # bent too finely for the lattice, and cheap without it
        rows, columns = (np.arange(float(n)) if small else _lattice(n) for n in (window.height, window.width))
        points = np.stack(np.meshgrid(columns, rows), axis=-1)
        surface = self.plate.bend(apply(inverse, points), t)
        fields = [surface, *(apply(p, self.plate.unbend(surface, s)) for p, s in zip(poses[1:], others, strict=True))]
        planes = [(field[..., 0], field[..., 1]) for field in fields]
        if small:
            dense = [(np.ascontiguousarray(x, np.float32), np.ascontiguousarray(y, np.float32)) for x, y in planes]
        else:
            size = window.height, window.width
            dense = [(_dense(x, *size), _dense(y, *size)) for x, y in planes]
        x, y = dense[0]
        alpha = None
        if self.mask is not None:
            half = np.float32((len(self.mask) - 1) / 2)
            alpha = cv2.remap(self.mask, x + half, y + half, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        picture = None
        if colour:
            (a, b, c), (d, e, f) = self.to_texels[:2].astype(np.float32)
            image = texture(*self.texture)
            picture = cv2.remap(image, a * x + b * y + c, d * x + e * y + f, cv2.INTER_LINEAR,
                                borderMode=cv2.BORDER_REFLECT_101)  # fmt: skip
        return View(alpha, picture, dense[1:])

    def _mask_warped(self, inverse: Matrix, window: Window) -> UInt8[np.ndarray, "h w"]:
        assert self.mask is not None
        half = (len(self.mask) - 1) / 2
        return _warped(self.mask, shift(half, half) @ inverse, window, cv2.BORDER_CONSTANT, self.is_affine)

    def _texture_warped(self, inverse: Matrix, window: Window) -> UInt8[np.ndarray, "h w 4"]:
        image = texture(*self.texture)
        return _warped(image, self.to_texels @ inverse, window, cv2.BORDER_REFLECT_101, self.is_affine)


def _warped(image: np.ndarray, matrix: Matrix, window: Window, border: int, is_affine: bool) -> np.ndarray:
    """The image where `matrix` leads from each pixel of the window."""
    size, flags = (window.width, window.height), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    if is_affine:
        return cv2.warpAffine(image, matrix[:2] / matrix[2, 2], size, flags=flags, borderMode=border)
    return cv2.warpPerspective(image, matrix, size, flags=flags, borderMode=border)


def _mapped(matrix: Matrix, window: Window, is_affine: bool) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the window's pixels after a homography, exact to float32."""
    matrix = matrix / matrix[2, 2]
    columns, rows = np.arange(window.width, dtype=np.float64)[None], np.arange(window.height, dtype=np.float64)[:, None]

    def plane(row: np.ndarray) -> np.ndarray:
        return np.add((row[0] * columns + row[2]).astype(np.float32), (row[1] * rows).astype(np.float32))

    x, y = plane(matrix[0]), plane(matrix[1])
    if not is_affine:
        depth = np.reciprocal(plane(matrix[2]))
        x *= depth
        y *= depth
    return x, y


def _lattice(size: int) -> np.ndarray:
    """Pixel positions of the lattice of a window of this many pixels, with nodes to spare on both sides."""
    count = (max(size, 1) - 1) // _STRIDE + _NODES
    return (np.arange(count) - (_NODES // 2 - 1)) * float(_STRIDE)


@lru_cache(512)
def _basis(size: int) -> Float32[np.ndarray, "size nodes"]:
    """Weights of lattice nodes at every pixel: Lagrange polynomials through the six nearest nodes."""
    pixels = np.arange(size)
    weights = np.zeros((size, len(_lattice(size))), np.float32)
    weights[pixels[:, None], (pixels // _STRIDE)[:, None] + np.arange(_NODES)] = _lagrange()[pixels % _STRIDE]
    return weights


@lru_cache(1)
def _lagrange() -> Float32[np.ndarray, "stride nodes"]:
    """Weights of the six nodes around each place between two nodes."""
    places, nodes = np.arange(_STRIDE) / _STRIDE, np.arange(_NODES) - (_NODES // 2 - 1)
    rows = [
        [np.prod([(place - other) / (node - other) for other in nodes if other != node]) for node in nodes]
        for place in places
    ]
    return np.array(rows, np.float32)


def _dense(field: np.ndarray, height: int, width: int) -> Float32[np.ndarray, "h w"]:
    """A smooth field at every pixel from its lattice.

    Columns first, on the few rows of the lattice; then rows, a band at a time: a band follows from the few lattice
    rows around it.
    """
    rows = field.astype(np.float32) @ _basis(width).T
    dense = np.empty((height, width), np.float32)
    for start in range(0, height, _BAND):
        stop, node = min(start + _BAND, height), start // _STRIDE
        basis = _basis(stop - start)
        np.matmul(basis, rows[node : node + basis.shape[1]], out=dense[start:stop])
    return dense
