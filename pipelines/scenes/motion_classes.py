"""Rendered clips in which how something moves and what it looks like vary independently.

One object over a plain ground moves in one of eight ways. Its shape, texture and colour, its place and size, and the
ground's grey are drawn without regard to the motion: whoever can read the motion class from an embedding has seen
motion, whoever can read shape, texture or colour has seen appearance.

Units: positions and lengths are in sides of the square frame, x to the right and y down; time in frames.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

MOTIONS = ("rotate", "left", "right", "up", "down", "zoom_in", "zoom_out", "shake")
SHAPES = ("disc", "square", "triangle", "ring")
TEXTURES = ("stripes", "checks", "dots", "halves")
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
LABELS = {"motion": MOTIONS, "shape": SHAPES, "texture": TEXTURES, "colour": HUES}
"""Names of what a clip is known to be, and their values."""


@dataclass(frozen=True)
class Framing:
    """How large a clip shows its object, and how far it goes."""

    size: tuple[float, float]
    """Range of half the object's size, in sides."""
    place: tuple[float, float]
    """Range of the middle of its way, along each axis, in sides."""
    step: float
    """Mean step of a translation from frame to frame, in sides."""
    swing: float
    """Mean distance of a shaking object from its place, in sides."""
    cells: tuple[float, float]
    """Range of how many cells of its texture half the object has."""


FAR = Framing((0.16, 0.24), (0.38, 0.62), 0.055, 0.07, (2.5, 4.5))
NEAR = Framing((0.26, 0.38), (0.4, 0.6), 0.09, 0.08, (1.2, 2.2))
"""The object covers a third of the frame and its texture is coarse, so that most pixels change with its motion."""
_DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True)
class MotionClip:
    """A film of one object, the same for the same arguments."""

    seed: int
    motion: str
    shape: str
    texture: str
    colour: str
    side: int = 64
    """Height and width in pixels."""
    num_frames: int = 12
    fps: float = 6.0
    close_up: bool = False
    """Whether the object is seen from `NEAR` rather than from `FAR`."""

    def __post_init__(self) -> None:
        for name, values in LABELS.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(values)}")
        if min(self.side, self.num_frames) < 1:
            raise ValueError(f"a clip of {self.num_frames} frames of {self.side} pixels is empty")

    @property
    def labels(self) -> dict[str, str]:
        """What is known of the clip, by name."""
        return {name: getattr(self, name) for name in LABELS}

    @property
    def height(self) -> int:
        """In pixels."""
        return self.side

    @property
    def width(self) -> int:
        """In pixels."""
        return self.side

    @property
    def cuts(self) -> tuple[int, ...]:
        """A clip is one shot."""
        return ()

    @property
    def speed_px(self) -> float:
        """Typical motion in pixels per frame."""
        return self.framing.step * self.side

    @property
    def framing(self) -> Framing:
        """How large the object is and how far it goes."""
        return NEAR if self.close_up else FAR

    def frames(self) -> UInt8[np.ndarray, "T side side 3"]:
        """All frames, RGB."""
        return np.stack([self.frame(t) for t in range(self.num_frames)])

    def frame(self, t: int) -> UInt8[np.ndarray, "side side 3"]:
        """Frame t, RGB."""
        # Appearance and motion are drawn from streams of their own: a clip with another motion looks the same.
        look = np.random.default_rng([self.seed, 0])
        ground, ink, paper = self._colours(look)
        cells = look.uniform(*self.framing.cells)
        turn = look.uniform(0, 2 * math.pi)
        px, py, angle, size = self._poses(np.random.default_rng([self.seed, 1]))[t]
        centres = (np.arange(self.side) + 0.5) / self.side
        x, y = np.meshgrid(centres, centres)
        cos, sin = math.cos(angle + turn) / size, math.sin(angle + turn) / size
        u, v = cos * (x - px) + sin * (y - py), cos * (y - py) - sin * (x - px)
        softness = 1.0 / (self.side * size)  # one pixel in the object's units
        inside = np.clip(0.5 - _distance(self.shape, u, v) / softness, 0, 1)[..., None]
        inked = _pattern(self.texture, u * cells, v * cells, softness * cells)[..., None]
        picture = ground * (1 - inside) + (ink * inked + paper * (1 - inked)) * inside
        return np.rint(picture * 255).astype(np.uint8)

    def _colours(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ground, the object's dark and its light colour."""
        hue = (HUES.index(self.colour) + rng.uniform(-0.25, 0.25)) / len(HUES)
        grey = rng.uniform(0.1, 0.9)
        dark, light = rng.uniform(0.25, 0.5), rng.uniform(0.75, 1.0)
        ink, paper = (np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1.0), value)) for value in (dark, light))
        return np.full(3, grey), ink, paper

    def _poses(self, rng: np.random.Generator) -> Float[np.ndarray, "T 4"]:
        """x, y of the centre, angle in radians, half size."""
        framing, t = self.framing, np.arange(self.num_frames) - (self.num_frames - 1) / 2
        size: np.ndarray = np.full(self.num_frames, rng.uniform(*framing.size))
        x: np.ndarray = np.full(self.num_frames, rng.uniform(*framing.place))
        y: np.ndarray = np.full(self.num_frames, rng.uniform(*framing.place))
        angle: np.ndarray = np.zeros(self.num_frames)
        speed = float(rng.uniform(0.7, 1.3))
        if self.motion in _DIRECTIONS:
            dx, dy = _DIRECTIONS[self.motion]
            x, y = x + framing.step * speed * dx * t, y + framing.step * speed * dy * t
        elif self.motion == "rotate":
            angle = 0.35 * speed * t
        elif self.motion == "zoom_in":
            size = size * np.exp(0.1 * speed * t)
        elif self.motion == "zoom_out":
            size = size * np.exp(-0.1 * speed * t)
        else:
            heading = rng.uniform(0, 2 * math.pi, self.num_frames)
            sides = np.where(np.arange(self.num_frames) % 2, 1, -1)
            reach = framing.swing * speed * rng.uniform(0.6, 1.4, self.num_frames) * sides
            axis = rng.uniform(0, math.pi)
            x = x + reach * np.cos(axis + 0.5 * np.sin(heading))
            y = y + reach * np.sin(axis + 0.5 * np.sin(heading))
        return np.stack([x, y, angle, size], axis=1)


def motion_clips(count: int, seed: int, **options: Any) -> Iterator[MotionClip]:
    """Clips whose labels are independent: motions in turn, shape, texture and colour drawn evenly.

    Args: options, `side`, `num_frames`, `close_up` of `MotionClip`.
    """
    rng = np.random.default_rng([seed, 2])
    for index, motion in enumerate(islice(cycle(MOTIONS), count)):
        shape, texture, colour = (str(rng.choice(values)) for values in (SHAPES, TEXTURES, HUES))
        yield MotionClip(seed * 1_000_003 + index, motion, shape, texture, colour, **options)


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance from the outline, negative inside, of an object about as large as the unit disc."""
    radius = np.hypot(u, v)
    if shape == "disc":
        return radius - 1
    if shape == "ring":
        return np.abs(radius - 0.75) - 0.32
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.88
    sides = [math.cos(a) * u + math.sin(a) * v for a in (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)]
    return np.maximum.reduce(sides) - 0.62


def _pattern(texture: str, u: np.ndarray, v: np.ndarray, softness: float) -> np.ndarray:
    """Share of the dark colour, over a lattice of unit cells."""
    if texture == "stripes":
        wave = np.sin(math.pi * u)
    elif texture == "checks":
        wave = np.sin(math.pi * u) * np.sin(math.pi * v)
    elif texture == "dots":
        wave = np.cos(math.pi * u) ** 2 * np.cos(math.pi * v) ** 2 - 0.35
    else:
        wave = u
    return np.clip(0.5 + wave / (math.pi * max(softness, 1e-3)), 0, 1)
