"""Rendered shots as a source for the loader: nothing is stored, every sample is rendered when it is asked for.

`Loader(RenderedIndex(settings, seed, count), read_sample, ...)` works as with a `ClipIndex`: clip i is shot i of the
seed, whichever worker renders it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, UInt8

from kinema.configs.rendered import RenderedSourceConfig
from kinema.pipelines.artifacts.tables import content_hash
from kinema.pipelines.loader.clip import ReadCounter
from kinema.pipelines.scenes.rendered import RenderedShot, RenderSettings
from kinema.pipelines.scenes.rendered.configured import render_settings
from kinema.pipelines.scenes.rendered.textures import image_files
from kinema.pipelines.sidecars.flow_codec import FlowPair
from kinema.pipelines.sidecars.tracks_codec import Tracks

FPS = 24.0
_TRACKS_GRID = 16


class RenderedSample:
    """A rendered shot with the interface of `Clip`: frames, flow pairs, occlusion, tracks."""

    def __init__(self, settings: RenderSettings, seed: int, index: int, key: str, counter: ReadCounter):
        self._shot_arguments = (settings, seed, index)
        self.key, self.num_frames = key, settings.num_frames
        self.height, self.width, self.fps = settings.height, settings.width, FPS
        self._counter = counter
        self.meta: dict[str, Any] = {"key": key, "source": f"rendered/{seed}/{index:08d}", "labels": {}}
        self.num_flows = 1

    @cached_property
    def _shot(self) -> RenderedShot:
        return RenderedShot(*self._shot_arguments)

    def frames(self, indices: Sequence[int]) -> UInt8[np.ndarray, "n H W 3"]:
        """Frames in the order asked for."""
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise ValueError(f"clip {self.key} has frames 0..{self.num_frames - 1}, not {index}")
        if not len(indices):
            return np.zeros((0, self.height, self.width, 3), np.uint8)
        self._counter.frames_decoded += len(indices)
        return np.stack([self._shot.frame(int(index)) for index in indices])

    @property
    def flow_pairs(self) -> list[tuple[int, int]]:
        """Every pair of frames, both ways: flow over any gap is exact."""
        frames = range(self.num_frames)
        return [(t, s - t) for t in frames for s in frames if s != t]

    @property
    def flow_size(self) -> tuple[int, int]:
        """(height, width): that of the frames."""
        return self.height, self.width

    def flow(self, t: int, gap: int) -> Float32[np.ndarray, "2 H W"]:
        """Exact flow from frame t to frame t + gap."""
        return self._shot.flow_px(t, t + gap)

    def occlusion(self, t: int, gap: int) -> Bool[np.ndarray, "H W"]:
        """True where frame t's pixel is hidden in frame t + gap."""
        return self._shot.occluded(t, t + gap)

    def flow_pair(self, t: int, gap: int) -> FlowPair:
        """Both together."""
        return FlowPair(t, gap, *self._shot.motion(t, t + gap))

    def tracks(self) -> Tracks:
        """Exact tracks of a grid of points of the first frame."""
        centres = (np.arange(_TRACKS_GRID) + 0.5) / _TRACKS_GRID
        x, y = np.meshgrid(centres * self.width - 0.5, centres * self.height - 0.5)
        places = np.stack([x.ravel(), y.ravel()], axis=1)
        points, visible = self._shot.tracks(places, 0)
        queries = np.concatenate([np.zeros((len(places), 1)), places], axis=1).astype(np.float32)
        return Tracks(points, visible, self.flow_size, queries)

    def masks(self) -> None:
        """There are none."""


class RenderedIndex:
    """`count` shots of a seed in place of a `ClipIndex`. Picklable; travels to loader workers.

    Args: numbers, of the shots that are meant; None for 0 .. count - 1.
    """

    def __init__(self, settings: RenderSettings, seed: int, count: int, numbers: Sequence[int] | None = None):
        if count < 1:
            raise ValueError(f"count={count} rendered shots: use 1 or more")
        self.settings, self.seed, self.count = settings, seed, count
        self._numbers = range(count) if numbers is None else numbers
        self.counter = ReadCounter()
        self.clips_url = f"rendered:{seed}"
        self.left_out: dict[str, int] = {}
        self.shards = None  # nothing is stored, so nothing is fetched ahead
        self.table = pa.table({"key": pa.array([], pa.string())})
        self._identity = content_hash(asdict(settings))

    @classmethod
    def of(cls, config: RenderedSourceConfig) -> RenderedIndex:
        """The shots that settings describe. Raises: ValueError for textures or flow to match that cannot be had."""
        if config.textures:
            image_files(config.textures)
        return cls(_settings_of(config), config.seed, config.count)

    def __len__(self) -> int:
        return len(self._numbers)

    def split(self, hold_out: int) -> tuple[RenderedIndex, RenderedIndex]:
        """(shots to learn from, shots to judge on), as `ClipIndex.split`."""
        if hold_out == 0 or len(self) < 2:
            return self, self
        step = min(hold_out, len(self))
        judged = self._numbers[step - 1 :: step]
        left = set(judged)
        learned = [number for number in self._numbers if number not in left]
        parts = [RenderedIndex(self.settings, self.seed, self.count, numbers) for numbers in (learned, judged)]
        parts[0].left_out = {"held out": len(judged)}
        return parts[0], parts[1]

    def content_hash(self) -> str:
        """Of all that decides the shots, a folder of textures by its files' names and sizes."""
        folder = self.settings.textures
        textures = image_files(folder) if folder else ()
        files = [[str(Path(name).relative_to(folder)), Path(name).stat().st_size] for name in textures]
        return content_hash([asdict(replace(self.settings, textures="")), self.seed, self.count, files])

    @property
    def keys(self) -> list[str]:
        """Key of every shot."""
        return [self._key(number) for number in self._numbers]

    def clip(self, number: int) -> RenderedSample:
        """Clip `number` of 0..len-1."""
        if not 0 <= number < len(self):
            raise ValueError(f"there are {len(self)} rendered shots, not number {number}")
        shot = self._numbers[number]
        return RenderedSample(self.settings, self.seed, shot, self._key(shot), self.counter)

    def drawn(self, number: int, rng: np.random.Generator) -> RenderedSample:
        """Clip `number`; there is one truth, so nothing is drawn."""
        return self.clip(number)

    def describe(self) -> str:
        """What there is, in words."""
        settings, held_out = self.settings, self.left_out.get("held out", 0)
        size = f"{settings.num_frames} frames of {settings.height}x{settings.width}"
        return f"{len(self)} rendered shots of {size}" + (f"; left out: {held_out} held out" if held_out else "")

    def _key(self, shot: int) -> str:
        text = f"{self._identity}:{self.seed}:{shot}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@lru_cache(4)
def _settings_of(config: RenderedSourceConfig) -> RenderSettings:
    """Kept, since matching a histogram renders a few hundred small shots."""
    return render_settings(config, config.textures)
