"""A rendered shot: layers drawn back to front, and the exact motion between any two of its frames.

Flow is exact: it follows from the layers' motion, not from the drawn pictures. Where several surfaces share a pixel
(outlines are a pixel wide), the one that covers half of it or more is meant. Occlusion is exact to half a pixel: a
surface point counts as hidden when a nearer layer covers the pixel it falls in.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from kinema.pipelines.scenes.rendered import shapes
from kinema.pipelines.scenes.rendered.effects import ShotEffects, Streak, smeared
from kinema.pipelines.scenes.rendered.layers import Layer
from kinema.pipelines.scenes.rendered.motion import Drift, Matrix, Pose, ThinPlate, shift
from kinema.pipelines.scenes.rendered.settings import RenderSettings
from kinema.pipelines.scenes.rendered.textures import HEIGHT, TEXELS_PER_PX, WIDTH

OUTSIDE = 255
_OPAQUE, _HALF = 255, 128
_SURFACES_KEPT = 4
_POSES_KEPT = 64
_SHAPES = (0.4, 0.3, 0.3)  # shares of polygons, blobs, cut-outs


@dataclass(frozen=True)
class Surface:
    """What a frame shows: the nearest layer of each pixel and, for some other frames, where that surface lies."""

    labels: UInt8[np.ndarray, "H W"]
    targets: dict[int, Float32[np.ndarray, "2 H W"]]
    image: UInt8[np.ndarray, "H W 3"] | None


class RenderedShot:
    """A short film with known motion, the same for the same settings, seed and index.

    Units: (x, y) in pixels, pixel centres at integers; times in frames 0 .. num_frames - 1.
    """

    def __init__(self, settings: RenderSettings, seed: int, index: int):
        self.settings, self.seed, self.index = settings, seed, index
        self.height, self.width, self.num_frames = settings.height, settings.width, settings.num_frames
        self._rng = np.random.default_rng([seed, 1, index])
        self.layers = self._draw_layers()
        self.effects = ShotEffects(settings.effects, seed, index, (self.height, self.width), len(self.layers))
        self._surfaces: OrderedDict[tuple, Surface] = OrderedDict()

    def frames(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """All frames in order, RGB."""
        return (self.frame(t) for t in range(self.num_frames))

    def frame(self, t: int) -> UInt8[np.ndarray, "H W 3"]:
        """Frame t, RGB, with the shot's photometric effects."""
        surface = self._surface(t, (), None, colour=True)
        assert surface.image is not None
        return self.effects.apply(t, surface.image, surface.labels)

    def flow_px(self, t0: int, t1: int, size: tuple[int, int] | None = None) -> Float32[np.ndarray, "2 H W"]:
        """Where the surface seen at each pixel of frame t0 lies in frame t1, minus where it was."""
        return self.motion(t0, t1, size)[0]

    def occluded(self, t0: int, t1: int, size: tuple[int, int] | None = None) -> Bool[np.ndarray, "H W"]:
        """True where the surface seen at frame t0's pixel is hidden, or out of the frame, at t1."""
        return self.motion(t0, t1, size)[1]

    def motion(
        self, t0: int, t1: int, size: tuple[int, int] | None = None
    ) -> tuple[Float32[np.ndarray, "2 H W"], Bool[np.ndarray, "H W"]]:
        """flow_px and occluded together.

        Args: size, (height, width) of a resized frame, whose pixels the flow is then in.
        Raises: ValueError for a frame that the shot does not have.
        """
        here = self._surface(t0, (t1,), size)
        there = self._surface(t1, (), size)
        target = here.targets[t1]
        return target - _grid(*here.labels.shape), _hidden(target, here.labels, there.labels)

    def tracks(
        self, points_xy: Float[np.ndarray, "N 2"], t0: int
    ) -> tuple[Float32[np.ndarray, "T N 2"], Bool[np.ndarray, "T N"]]:
        """Positions in every frame of the surface points seen at places of frame t0, and whether they are seen."""
        points = np.asarray(points_xy, np.float64)
        labels = self._labels_at(points, t0)
        positions = np.empty((self.num_frames, len(points), 2), np.float32)
        visible = np.empty((self.num_frames, len(points)), bool)
        surface = np.empty_like(points)
        for number, layer in enumerate(self.layers):
            surface[labels == number] = layer.surface(points[labels == number], t0)
        for t in range(self.num_frames):
            shown = np.empty_like(points)
            for number, layer in enumerate(self.layers):
                shown[labels == number] = layer.shown(surface[labels == number], t)
            positions[t], visible[t] = shown, self._labels_at(shown, t) <= labels
        return positions, visible

    def object_ids(self, t: int, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W"]:
        """The nearest layer of each pixel; 0 is the background."""
        return self._surface(t, (), size).labels

    def _labels_at(self, points: Float[np.ndarray, "N 2"], t: int) -> np.ndarray:
        """The nearest layer at places of frame t; OUTSIDE beyond the frame."""
        x, y = (np.floor(points[:, axis] + 0.5) for axis in (0, 1))
        inside = (x >= 0) & (y >= 0) & (x < self.width) & (y < self.height)
        labels = self.object_ids(t)
        found = labels[np.where(inside, y, 0).astype(int), np.where(inside, x, 0).astype(int)]
        return np.where(inside, found, OUTSIDE)

    def _surface(self, t: int, others: tuple[int, ...], size: tuple[int, int] | None, colour: bool = False) -> Surface:
        """Draw frame t, or take it from what was drawn last."""
        for frame in (t, *others):
            if not 0 <= frame < self.num_frames:
                raise ValueError(f"frame {frame} is not one of the shot's {self.num_frames} frames")
        size = size or (self.height, self.width)
        key = (t, size)
        found = self._surfaces.get(key)
        if found is None or not set(others) <= set(found.targets) or (colour and found.image is None):
            image = None if found is None else found.image
            full = size == (self.height, self.width)
            if not others and full and t + 1 < self.num_frames:
                others = (t + 1,)  # most likely asked for next, and cheap while the layer is at hand
            drawn = self._drawn(t, others, size, image is None and (colour or full))
            found = Surface(drawn.labels, drawn.targets, drawn.image if image is None else image)
            self._surfaces[key] = found
            while len(self._surfaces) > _SURFACES_KEPT:
                self._surfaces.popitem(last=False)
        return found

    def _drawn(self, t: int, others: tuple[int, ...], size: tuple[int, int], colour: bool) -> Surface:
        height, width = size
        sx, sy = width / self.width, height / self.height
        scale = np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])
        labels = np.zeros(size, np.uint8)
        targets = {s: np.empty((2, *size), np.float32) for s in others}
        image = np.empty((*size, 4), np.uint8) if colour else None
        for number, layer in enumerate(self.layers):
            window = layer.window(t, scale, size)
            if window is None:
                continue
            view = layer.view(t, others, window, scale, colour)
            place = window.slices
            if view.alpha is None:
                image = view.colour if colour else None
                for s, maps in zip(others, view.targets, strict=True):
                    targets[s][0], targets[s][1] = maps
                continue
            covered = cv2.compare(view.alpha, _HALF, cv2.CMP_GE)  # type: ignore[call-overload]
            labels[place][covered > 0] = number
            for s, maps in zip(others, view.targets, strict=True):
                for axis in (0, 1):
                    cv2.copyTo(maps[axis], covered, targets[s][axis][place])
            if image is not None and view.colour is not None:
                blur = self.effects.streak(layer, t)
                _blend(image[place], view.colour, view.alpha, blur)
        if image is not None:
            blur = self.effects.streak(self.layers[0], t)
            image = image if blur is None else _background_blurred(image, labels, blur)
            return Surface(labels, targets, np.asarray(cv2.cvtColor(image, cv2.COLOR_RGBA2RGB), np.uint8))
        return Surface(labels, targets, None)

    def _draw_layers(self) -> list[Layer]:
        settings, rng = self.settings, self._rng
        centre = shift((self.width - 1) / 2, (self.height - 1) / 2)
        half = (self.width / 2, self.height / 2)
        drift = self._drift(settings.speed(rng) * settings.background_speed, math.hypot(*half))

        @lru_cache(_POSES_KEPT)
        def background(t: float) -> Matrix:
            return centre @ drift.matrix(t)

        back = np.linalg.inv(centre)

        def camera(t: float) -> Matrix:
            return background(t) @ back

        layers = [self._layer(None, background, drift.is_affine, half, 2.0)]
        for _ in range(int(rng.integers(settings.objects[0], settings.objects[1] + 1))):
            low, high = (share * min(self.height, self.width) for share in settings.object_size)
            radius = low * (high / low) ** (rng.random() ** 1.3)
            place = rng.uniform((0, 0), (self.width, self.height))
            own = self._drift(settings.speed(rng), radius)
            pose = _object_pose(camera, shift(*place) @ _rest(rng), own)
            mask = self._mask(radius)
            affine = drift.is_affine and own.is_affine
            layers.append(self._layer(mask, pose, affine, (radius, radius), 0.7))
        return layers

    def _layer(
        self, mask: np.ndarray | None, pose: Pose, is_affine: bool, half: tuple[float, float], bend_px: float
    ) -> Layer:
        rng, settings = self._rng, self.settings
        plate = None
        if rng.random() < settings.thin_plate:
            plate = ThinPlate.draw(rng, (1.1 * half[0], 1.1 * half[1]), bend_px + 0.5 * settings.speed(rng))
        angle, zoom = rng.uniform(0, 2 * math.pi), rng.uniform(0.85, 1.15)
        if mask is None:
            angle = 0.0
        cos, sin = zoom * TEXELS_PER_PX * math.cos(angle), zoom * TEXELS_PER_PX * math.sin(angle)
        wide, high = WIDTH / settings.detail, HEIGHT / settings.detail
        origin = rng.uniform((0.3 * wide, 0.3 * high), (0.7 * wide, 0.7 * high))
        to_texels = np.array([[cos, -sin, origin[0]], [sin, cos, origin[1]], [0, 0, 1]])
        number = int(rng.integers(settings.num_textures))
        picture = (settings.textures, self.seed, number, settings.detail)
        return Layer(mask, picture, to_texels, pose, is_affine, plate)

    def _mask(self, radius: float) -> UInt8[np.ndarray, "s s"]:
        rng = self._rng
        kind = rng.choice(3, p=_SHAPES)
        if kind == 2:
            return shapes.cut_out(
                self.settings.textures, self.seed, int(rng.integers(self.settings.num_textures)), radius
            )
        return (shapes.polygon, shapes.blob)[kind](rng, radius)

    def _drift(self, speed_px: float, radius: float) -> Drift:
        """A layer's motion: its middle moves at `speed_px`, its rim by about half as much in other ways."""
        rng = self._rng
        direction = rng.uniform(0, 2 * math.pi)
        rim = 0.5 * speed_px / radius
        limits = (0.25, 0.12, 0.08, 0.12)
        spin, zoom, shear, tilt = (
            float(np.clip(rng.normal(0, share * rim), -limit, limit))
            for share, limit in zip((0.7, 0.5, 0.3, 0.8), limits, strict=True)
        )
        turn = rng.uniform(0, 2 * math.pi)
        tilts = (
            (tilt * math.cos(turn), tilt * math.sin(turn)) if rng.random() < self.settings.homography else (0.0, 0.0)
        )
        reach = max(0.35 * min(self.height, self.width), 2 * speed_px)
        velocity = (speed_px * math.cos(direction), speed_px * math.sin(direction))
        return Drift(velocity, spin, zoom, shear, tilts, radius, reach)


def _object_pose(camera: Pose, rest: Matrix, own: Drift) -> Pose:
    """The camera's motion of the place where an object moves by itself; its own velocity is in the image's axes."""
    place, turned = shift(rest[0, 2], rest[1, 2]), rest.copy()
    turned[:2, 2] = 0

    @lru_cache(_POSES_KEPT)
    def pose(t: float) -> Matrix:
        return camera(t) @ place @ own.matrix(t) @ turned

    return pose


def _rest(rng: np.random.Generator) -> Matrix:
    """An object's turn and stretch before it moves."""
    angle, stretch = rng.uniform(0, 2 * math.pi), math.exp(rng.uniform(-0.3, 0.3))
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos * stretch, -sin / stretch, 0], [sin * stretch, cos / stretch, 0], [0, 0, 1]])


@lru_cache(8)
def _grid(height: int, width: int) -> Float32[np.ndarray, "2 H W"]:
    return np.stack(np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)))


def _hidden(
    target: Float32[np.ndarray, "2 H W"], own: UInt8[np.ndarray, "H W"], there: UInt8[np.ndarray, "H W"]
) -> Bool[np.ndarray, "H W"]:
    """Where a nearer layer, or the outside of the frame, lies at the target."""
    nearest = cv2.remap(there, target[0], target[1], cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT,
                        borderValue=OUTSIDE)  # fmt: skip
    return nearest > own


def _blend(image: np.ndarray, colour: np.ndarray, alpha: np.ndarray, blur: Streak | None) -> None:
    """Put a layer over the picture, in place: copied where it is opaque, mixed on its rim."""
    if blur is not None:
        alpha, colour = (smeared(part, blur, cv2.BORDER_REPLICATE) for part in (alpha, colour))
    rim = np.flatnonzero(cv2.inRange(alpha, 1, _OPAQUE - 1))
    rows, columns = np.divmod(rim, alpha.shape[1])
    weight = alpha[rows, columns, None].astype(np.float32) / _OPAQUE
    under, over = image[rows, columns], colour[rows, columns]
    mixed = np.rint(under + weight * (over.astype(np.float32) - under)).astype(np.uint8)
    cv2.copyTo(colour, cv2.compare(alpha, _OPAQUE, cv2.CMP_EQ), image)  # type: ignore[call-overload]
    image[rows, columns] = mixed


def _background_blurred(image: np.ndarray, labels: np.ndarray, blur: Streak) -> np.ndarray:
    """The background blurred along its motion, beneath objects that stay as they are."""
    blurred = smeared(image, blur, cv2.BORDER_REFLECT_101)
    return cv2.copyTo(blurred, cv2.compare(labels, 0, cv2.CMP_EQ), image)  # type: ignore[call-overload]
