"""Rendered scenes: textured, articulated objects under a moving camera, with exact motion.

A shot is a stack of rigid layers (a background and the parts of some objects), each under a known similarity
transform at every instant. Frames are drawn back to front; flow, occlusion and tracks follow from the transforms
themselves, for any pair of frames and any point, not from the drawn pixels.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt8

from kinema.pipelines.scenes._layers import Layer, Points, RoundedBox, Similarity, Swing, Texture

Pose = Callable[[float], Similarity]
Camera = Literal["still", "pan", "zoom", "turn", "mixed"]

_PART_TILE_PX = 96

# Share of the shorter side (pan), of the scale (zoom) and radians (turn) that each camera swings through.
_CAMERA_SWINGS: dict[str, tuple[float, float, float]] = {
    "still": (0.0, 0.0, 0.0),
    "pan": (0.20, 0.0, 0.0),
    "zoom": (0.04, 0.15, 0.0),
    "turn": (0.04, 0.0, 0.20),
    "mixed": (0.10, 0.12, 0.15),
}


class Scene:
    """A short film with known motion, the same for the same arguments.

    Args: height, width in pixels; num_frames; fps; num_objects in every shot; cuts, frames at which a new shot
        begins; camera, what it does; speed_px, typical object and camera speed in pixels per frame (0 for 1/150 of
        the shorter side).
    Raises: ValueError for an empty size, a negative number, or cuts that are not increasing frame numbers.
    Units: (x, y), pixel centres at integers; times in frames.
    """

    def __init__(
        self,
        seed: int,
        height: int = 256,
        width: int = 320,
        num_frames: int = 48,
        fps: float = 24.0,
        num_objects: int = 3,
        cuts: tuple[int, ...] = (),
        camera: Camera = "mixed",
        speed_px: float = 0.0,
    ):
        if min(height, width, num_frames) < 1 or fps <= 0:
            raise ValueError(f"scene of {num_frames} frames of {height}x{width} at {fps} fps is empty")
        if num_objects < 0 or speed_px < 0:
            raise ValueError(f"scene num_objects={num_objects}, speed_px={speed_px}: neither may be negative")
        if list(cuts) != sorted(set(cuts)) or any(not 0 < cut < num_frames for cut in cuts):
            raise ValueError(f"scene cuts {cuts} must increase and lie within 1..{num_frames - 1}")
        if camera not in _CAMERA_SWINGS:
            raise ValueError(f"scene camera {camera!r} is unknown; use one of {', '.join(_CAMERA_SWINGS)}")
        self.seed, self.height, self.width = seed, height, width
        self.num_frames, self.fps, self.num_objects = num_frames, fps, num_objects
        self.cuts, self.camera = tuple(cuts), camera
        self.speed_px = speed_px or min(height, width) / 150
        starts = (0, *self.cuts)
        parts_before = 1
        self._shots: list[_Shot] = []
        for index, start in enumerate(starts):
            shot = _Shot(self, index, start, parts_before)
            parts_before += len(shot.layers) - 1
            self._shots.append(shot)

    def frames(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """All frames in order, RGB."""
        return (self.frame(t) for t in range(self.num_frames))

    def frame(self, t: int) -> UInt8[np.ndarray, "H W 3"]:
        """Frame t, RGB."""
        shot = self._shots[self.shot_of(t)]
        canvas = np.zeros((self.height, self.width, 3), np.float32)
        for layer in shot.layers:
            layer.paint(canvas, t)
        return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)

    def shot_of(self, t: int) -> int:
        """Which shot frame t belongs to."""
        if not 0 <= t < self.num_frames:
            raise ValueError(f"frame {t} is not one of the scene's {self.num_frames} frames")
        return sum(cut <= t for cut in self.cuts)

    def frame_at(self, time_s: float) -> int:
        """The frame shown at this time since the beginning."""
        return min(max(round(time_s * self.fps), 0), self.num_frames - 1)

    def flow_px(self, t0: int, t1: int, size: tuple[int, int] | None = None) -> Float32[np.ndarray, "2 H W"]:
        """Where each pixel of frame t0 lies in frame t1, minus where it was, in pixels.

        Args: t0, t1, frames of the same shot, in any order; size, (height, width) of a resized frame: the flow
            is evaluated at its pixel centres and given in its pixels.
        Raises: ValueError when a cut lies between the frames.
        """
        return self.motion(t0, t1, size)[0]

    def occluded(self, t0: int, t1: int, size: tuple[int, int] | None = None) -> Bool[np.ndarray, "H W"]:
        """True where the surface seen at frame t0's pixel is hidden, or out of the frame, at t1."""
        return self.motion(t0, t1, size)[1]

    def motion(
        self, t0: int, t1: int, size: tuple[int, int] | None = None
    ) -> tuple[Float32[np.ndarray, "2 H W"], Bool[np.ndarray, "H W"]]:
        """flow_px and occluded, together for the price of one."""
        points, scale = self._grid(size)
        target, hidden = self._move(points, t0, t1)
        flow = target - points
        flow_px = np.stack([flow.real * scale[0], flow.imag * scale[1]]).astype(np.float32)
        return flow_px, hidden | self._outside(target)

    def out_of_frame(self, t0: int, t1: int, size: tuple[int, int] | None = None) -> Bool[np.ndarray, "H W"]:
        """True where frame t0's pixel has left the picture at t1."""
        return self._outside(self._move(self._grid(size)[0], t0, t1)[0])

    def tracks(
        self, points_xy: Float[np.ndarray, "N 2"], t0: int
    ) -> tuple[Float32[np.ndarray, "T N 2"], Bool[np.ndarray, "T N"]]:
        """Positions of surface points, chosen in frame t0, in every frame, and whether they are seen there.

        Frames of other shots have NaN positions and are not visible.
        """
        points = np.asarray(points_xy, np.float64)
        start = points[:, 0] + 1j * points[:, 1]
        xy = np.full((self.num_frames, len(start), 2), np.nan, np.float32)
        visible = np.zeros((self.num_frames, len(start)), bool)
        for t in range(self.num_frames):
            if self.shot_of(t) != self.shot_of(t0):
                continue
            target, hidden = self._move(start, t0, t)
            xy[t, :, 0], xy[t, :, 1] = target.real, target.imag
            visible[t] = ~(hidden | self._outside(target))
        return xy, visible

    def part_ids(self, t: int, size: tuple[int, int] | None = None) -> Int32[np.ndarray, "H W"]:
        """The rigid part at each pixel; 0 is the background; other shots' parts have other numbers."""
        shot = self._shots[self.shot_of(t)]
        return shot.parts[shot.top(self._grid(size)[0], t)]

    def object_ids(self, t: int, size: tuple[int, int] | None = None) -> Int32[np.ndarray, "H W"]:
        """The object at each pixel, counted from 1 in every shot; 0 is the background."""
        shot = self._shots[self.shot_of(t)]
        return shot.objects[shot.top(self._grid(size)[0], t)]

    def _grid(self, size: tuple[int, int] | None) -> tuple[Points, tuple[float, float]]:
        """Pixel centres of a frame of this size in the scene's pixels, and its pixels per pixel of the scene."""
        height, width = size or (self.height, self.width)
        scale = (width / self.width, height / self.height)
        x = (np.arange(width) + 0.5) / scale[0] - 0.5
        y = (np.arange(height) + 0.5) / scale[1] - 0.5
        return x[None, :] + 1j * y[:, None], scale

    def _move(self, points: Points, t0: int, t1: int) -> tuple[Points, np.ndarray]:
        """Where the surfaces seen at `points` at t0 lie at t1, and whether a nearer layer hides them there."""
        first, second = self.shot_of(t0), self.shot_of(t1)
        if first != second:
            raise ValueError(f"frames {t0} and {t1} belong to different shots (cuts {self.cuts}): no motion")
        return self._shots[first].move(points, t0, t1)

    def _outside(self, points: Points) -> np.ndarray:
        x, y = points.real, points.imag
        return (x < -0.5) | (y < -0.5) | (x >= self.width - 0.5) | (y >= self.height - 0.5)


class _Shot:
    """Layers of one shot, back to front; each is rigid in its own coordinates."""

    def __init__(self, scene: Scene, index: int, start: int, first_part: int):
        self.start = start
        self._rng = np.random.default_rng([scene.seed, index])
        self._size = complex(scene.width, scene.height)
        self._side = min(scene.height, scene.width)
        self._speed = scene.speed_px
        self._hue = self._rng.uniform()
        camera = self._draw_camera(scene)
        hue = (self._hue, 0.10)
        tile_px = 384 if self._side >= 192 else 192
        ground = self._texture(tile_px, hue, bright=index % 2 == 0)
        self.layers = [Layer(0, 0, None, ground, camera)]
        # Objects start side by side in drawn order, so that all of them are seen.
        columns = self._rng.permutation(scene.num_objects) + self._rng.uniform(0.2, 0.8, scene.num_objects)
        for number, column in enumerate(columns / max(scene.num_objects, 1), start=1):
            for layer in self._draw_object(column, number, camera):
                part = first_part + len(self.layers) - 1
                self.layers.append(Layer(part, number, layer.box, layer.texture, layer.pose))
        self.parts = np.array([layer.part for layer in self.layers], np.int32)
        self.objects = np.array([layer.object for layer in self.layers], np.int32)

    def top(self, points: Points, t: int) -> np.ndarray:
        """Index of the nearest layer at each image point."""
        top = np.zeros(points.shape, np.int64)
        for index, layer in enumerate(self.layers[1:], start=1):
            top[layer.covers(points, t)] = index
        return top

    def move(self, points: Points, t0: int, t1: int) -> tuple[Points, np.ndarray]:
        """See Scene._move. A layer covers its own points by construction; only nearer ones can hide them."""
        top = self.top(points, t0)
        target = np.empty_like(points)
        hidden = np.zeros(points.shape, bool)
        for index, layer in enumerate(self.layers):
            here = top == index
            if not here.any():
                continue
            moved = layer.pose(t1)(layer.pose(t0).inverse(points[here]))
            target[here] = moved
            over = np.zeros(moved.shape, bool)
            for nearer in self.layers[index + 1 :]:
                over |= nearer.covers(moved, t1)
            hidden[here] = over
        return target, hidden

    def _draw_camera(self, scene: Scene) -> Pose:
        pan, zoom, turn = _CAMERA_SWINGS[scene.camera]
        rng, side, speed = self._rng, self._side, self._speed
        pan_x, pan_y = (Swing.draw(rng, pan * side, speed) for _ in range(2))
        # The rim of the picture, half a side from the centre, moves at `speed` too.
        zoom_log, angle = (Swing.draw(rng, amount, 2 * speed / side) for amount in (zoom, turn))
        centre = self._size / 2

        def pose(t: float) -> Similarity:
            dt = t - self.start
            factor = math.exp(zoom_log(dt)) * np.exp(1j * angle(dt))
            return Similarity.about(centre, complex(factor), complex(pan_x(dt), pan_y(dt)))

        return pose

    def _draw_object(self, column: float, number: int, camera: Pose) -> list[Layer]:
        """A torso and two to four limbs that swing about joints on its rim."""
        rng, side, speed = self._rng, self._side, self._speed
        shape = self._rng.uniform(0.08, 0.14, 2) * side
        torso = RoundedBox(shape[0], shape[1], rng.uniform(0.2, 1.0) * shape.min())
        home = complex((0.1 + 0.8 * column) * self._size.real, rng.uniform(0.3, 0.7) * self._size.imag)
        path_x, path_y = (Swing.draw(rng, 0.15 * side, 1.2 * speed) for _ in range(2))
        spin = Swing.draw(rng, 0.6, 0.7 * speed / shape.max())
        angle0 = rng.uniform(0, 2 * math.pi)
        hue = (self._hue + 0.5 + rng.uniform(-0.3, 0.3), 0.15)

        def body(t: float) -> Similarity:
            dt = t - self.start
            turn = complex(np.exp(1j * (angle0 + spin(dt))))
            return camera(t).after(Similarity(turn, home + complex(path_x(dt), path_y(dt))))

        limbs = [
            self._draw_limb(number, body, torso, k / 4 * 2 * math.pi, hue)
            for k in rng.permutation(4)[: rng.integers(2, 5)]
        ]
        middle = Layer(0, number, torso, self._texture(_PART_TILE_PX, hue), body)
        return [*limbs, middle] if rng.uniform() < 0.5 else [middle, *limbs]

    def _draw_limb(
        self, number: int, body: Pose, torso: RoundedBox, direction: float, hue: tuple[float, float]
    ) -> Layer:
        rng = self._rng
        length, thickness = rng.uniform(0.07, 0.12) * self._side, rng.uniform(0.03, 0.05) * self._side
        box = RoundedBox(length, thickness, thickness * rng.uniform(0.5, 1.0))
        joint = complex(torso.half_width * math.cos(direction), torso.half_height * math.sin(direction)) * 0.8
        swing = Swing.draw(rng, 0.7, self._speed / length)

        def pose(t: float) -> Similarity:
            turn = complex(np.exp(1j * (direction + swing(t - self.start))))
            # The limb's origin is its middle; it turns about its inner end, which sits on the joint.
            return body(t).after(Similarity(turn, joint + turn * length * 0.8))

        return Layer(0, number, box, self._texture(_PART_TILE_PX, hue), pose)

    def _texture(self, tile_px: int, hue: tuple[float, float], bright: bool | None = None) -> Texture:
        bright = bool(self._rng.uniform() < 0.5) if bright is None else bright
        return Texture(int(self._rng.integers(2**63)), tile_px, _palette(self._rng, hue, bright))


def _palette(rng: np.random.Generator, hue: tuple[float, float], bright: bool) -> np.ndarray:
    """Three RGB colours around one hue (centre, half width), dark, middle and light."""
    values = (0.35, 0.7, 0.95) if bright else (0.1, 0.3, 0.65)
    colours = [
        colorsys.hsv_to_rgb((hue[0] + rng.uniform(-hue[1], hue[1])) % 1.0, rng.uniform(0.4, 0.9), value)
        for value in values
    ]
    return np.array(colours)[rng.permutation(3)]
