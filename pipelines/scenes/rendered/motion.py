"""How layers move: similarities, shear and tilt as 3x3 matrices of time, and bending by thin-plate splines.

A layer's own coordinates are pixels about its middle. A surface point v is shown at frame t at M_t(b_t(v)), where b_t
undoes the bending: v = u + a_t D(u), with D a thin-plate spline whose slope is so small that u follows from v by
Newton's method. At t = 0 nothing is bent.

Source: Bookstein, "Principal warps", PAMI 1989 (thin-plate splines).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Matrix = Float[np.ndarray, "3 3"]
LARGEST_SLOPE = 0.2
"""Of the bending: far from folding, and Newton's method converges at once."""
NEWTON_STEPS = 2
_UNIT_LATTICE = np.stack(np.meshgrid(np.linspace(-1, 1, 10), np.linspace(-1, 1, 10)), axis=-1)


def swing(velocity: float, reach: float, t: float) -> float:
    """A path that starts at 0 with `velocity` and stays within `reach`."""
    return reach * math.sin(velocity * t / reach) if reach > 0 else velocity * t


def shift(x: float, y: float) -> Matrix:
    """Translation."""
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


@dataclass(frozen=True)
class Drift:
    """Motion of a layer about its middle, as velocities at t = 0; each path is bounded, so that it can go on for ever.

    Units: px, radians, log scale and shear a frame; tilt in shares of foreshortening over `radius_px` a frame.
    """

    velocity_xy: tuple[float, float] = (0.0, 0.0)
    spin: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    tilt_xy: tuple[float, float] = (0.0, 0.0)
    radius_px: float = 100.0
    reach_px: float = 200.0

    def matrix(self, t: float) -> Matrix:
        """From the layer's place at t = 0 to that at t, about the origin."""
        x, y = (swing(v, self.reach_px, t) for v in self.velocity_xy)
        angle, scale = swing(self.spin, 1.2, t), math.exp(swing(self.zoom, 0.5, t))
        shear = swing(self.shear, 0.3, t)
        tilt = [swing(v, 0.35, t) / self.radius_px for v in self.tilt_xy]
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        linear = np.array([[cos, -sin + cos * shear, x], [sin, cos + sin * shear, y], [tilt[0], tilt[1], 1.0]])
        return linear

    @property
    def is_affine(self) -> bool:
        """No tilt."""
        return self.tilt_xy == (0.0, 0.0)


class ThinPlate:
    """Bending of a layer: D goes through random displacements at its knots; a_t = sin(rate t) swings about 0.

    Args: knots [K, 2] and values [K, 2] in the layer's pixels; half_size, of the layer; rate, radians a frame.
    """

    def __init__(self, knots: np.ndarray, values: np.ndarray, half_size: tuple[float, float], rate: float):
        self._unit = np.float32(1 / max(half_size))
        self._knots = (knots * self._unit).astype(np.float32)
        self.rate = rate
        self._weights = _spline_weights(self._knots.astype(np.float64), values).astype(np.float32)
        self.longest_px = 1.5 * float(np.abs(values).max())

    @staticmethod
    def draw(rng: np.random.Generator, half_size: tuple[float, float], amplitude_px: float) -> ThinPlate:
        """Bending of about `amplitude_px` a frame over a layer of this half size, no steeper than LARGEST_SLOPE."""
        knots = _UNIT_LATTICE[::3, ::3].reshape(-1, 2) * half_size
        knots += rng.uniform(-0.15, 0.15, knots.shape) * half_size
        values = rng.standard_normal(knots.shape)
        bending, slopes = ThinPlate(knots, values, half_size, 1.0).with_slopes(_UNIT_LATTICE * half_size)
        # a_t = sin(rate t): over one frame the bending changes by about sin(rate) times D.
        rate = float(rng.uniform(0.4, 0.8))
        typical = float(np.hypot(bending[..., 0], bending[..., 1]).mean())
        factor = min(amplitude_px / (typical * math.sin(rate)), LARGEST_SLOPE / float(np.abs(slopes).sum(-1).max()))
        return ThinPlate(knots, values * factor, half_size, rate * float(rng.choice([-1, 1])))

    def amplitude(self, t: float) -> float:
        """a_t."""
        return math.sin(self.rate * t)

    def __call__(self, points: Float[np.ndarray, "*S 2"]) -> Float[np.ndarray, "*S 2"]:
        """D at points of the layer."""
        basis, _ = self._basis(points, slopes=False)
        return (basis @ self._weights).reshape(points.shape)

    def with_slopes(
        self, points: Float[np.ndarray, "*S 2"]
    ) -> tuple[Float[np.ndarray, "*S 2"], Float[np.ndarray, "*S 2 2"]]:
        """D, and its derivatives (last axis: by x, by y)."""
        basis, slopes = self._basis(points, slopes=True)
        assert slopes is not None
        by_xy = np.stack([slope @ self._weights for slope in slopes], axis=-1) * self._unit
        return (basis @ self._weights).reshape(points.shape), by_xy.reshape(*points.shape, 2)

    def bend(self, u: Float[np.ndarray, "*S 2"], t: float) -> Float[np.ndarray, "*S 2"]:
        """Surface points shown at u."""
        amplitude = self.amplitude(t)
        return u + amplitude * self(u) if amplitude else u

    def unbend(self, v: Float[np.ndarray, "*S 2"], t: float) -> Float[np.ndarray, "*S 2"]:
        """Where surface points v are shown: Newton's method, whose second step leaves less than 1e-3 px."""
        amplitude = self.amplitude(t)
        if not amplitude:
            return v
        u = v - amplitude * self(v)
        for _ in range(NEWTON_STEPS):
            bending, slopes = self.with_slopes(u)
            rest = v - u - amplitude * bending
            a, b = 1 + amplitude * slopes[..., 0, 0], amplitude * slopes[..., 0, 1]
            c, d = amplitude * slopes[..., 1, 0], 1 + amplitude * slopes[..., 1, 1]
            determinant = a * d - b * c
            x, y = rest[..., 0], rest[..., 1]
            u = u + np.stack([(d * x - b * y) / determinant, (a * y - c * x) / determinant], axis=-1)
        return u

    def _basis(self, points: np.ndarray, slopes: bool) -> tuple[np.ndarray, list[np.ndarray] | None]:
        """Kernel at every knot, then 1, x, y, [N, K + 3]; and its derivatives by x and y."""
        flat = points.reshape(-1, 2).astype(np.float32) * self._unit
        count = len(self._knots)
        basis = np.empty((len(flat), count + 3), np.float32)
        x, y = (flat[:, axis, None] - self._knots[None, :, axis] for axis in (0, 1))
        squared = x * x + y * y
        logarithm = np.log(np.maximum(squared, np.float32(1e-12)))
        np.multiply(squared, logarithm, out=basis[:, :count])
        basis[:, count], basis[:, count + 1 :] = 1, flat
        if not slopes:
            return basis, None
        logarithm += 1
        logarithm *= 2
        by_x, by_y = np.zeros_like(basis), np.zeros_like(basis)
        np.multiply(x, logarithm, out=by_x[:, :count])
        np.multiply(y, logarithm, out=by_y[:, :count])
        by_x[:, count + 1] = by_y[:, count + 2] = 1
        return basis, [by_x, by_y]


def _spline_weights(knots: np.ndarray, values: np.ndarray) -> Float[np.ndarray, "K+3 2"]:
    """Weights of the kernel r^2 log r^2 at each knot, and of 1, x, y."""
    count = len(knots)
    squared = ((knots[:, None] - knots[None]) ** 2).sum(-1)
    system = np.zeros((count + 3, count + 3))
    system[:count, :count] = squared * np.log(np.maximum(squared, 1e-12))
    affine = np.concatenate([np.ones((count, 1)), knots], axis=1)
    system[:count, count:], system[count:, :count] = affine, affine.T
    return np.linalg.solve(system, np.concatenate([values, np.zeros((3, 2))]))


def apply(matrix: Matrix, points: Float[np.ndarray, "*S 2"]) -> Float[np.ndarray, "*S 2"]:
    """A homography of points (x, y)."""
    moved = points @ matrix[:2, :2].T + matrix[:2, 2]
    if not matrix[2, 0] and not matrix[2, 1]:
        return moved / matrix[2, 2]
    return moved / (points @ matrix[2, :2] + matrix[2, 2])[..., None]


Pose = Callable[[float], Matrix]
