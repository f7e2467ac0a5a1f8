"""Random frames through the loader, against decoding each clip from its start, for short and long clips."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import torch

from kinema.configs import ClipConfig, LoaderConfig
from kinema.pipelines.artifacts import read_range
from kinema.pipelines.loader import Clip, ClipIndex, Loader
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips

CLIP_LENGTHS = (24, 96)


def run(height: int = 384, width: int = 512, num_clips: int = 4, seconds: float = 3.0) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}; ratio = loader / from the start.

    Each sample is one frame or a pair (t, t + 2) at a random place, as uint8 RGB, read in this process by one
    thread. Samples of both sides take turns in short rounds, so that other load falls on both.
    """
    rows = []
    for num_frames in CLIP_LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            scenes = [Scene(seed=s, height=height, width=width, num_frames=num_frames) for s in range(num_clips)]
            index = ClipIndex.open(write_scene_clips(scenes, folder, ClipConfig()).url)
            for name, offsets in (("one frame", (0,)), ("a pair of frames", (0, 2))):
                rows += _compare(f"{name} of {num_frames}", index, offsets, seconds)
    return rows


def _compare(name: str, index: ClipIndex, offsets: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    ours, theirs = _Side(index, offsets, Clip.frames), _Side(index, offsets, frames_from_start)
    while ours.seconds + theirs.seconds < seconds:
        for side in (ours, theirs):
            side.run_round(8)
    pairs: list[tuple[str, float, float]] = [
        ("samples/s", ours.samples / ours.seconds, theirs.samples / theirs.seconds),
        ("KB read per frame", ours.kb_per_frame, theirs.kb_per_frame),
        ("frames decoded per sample", ours.decoded_per_sample, theirs.decoded_per_sample),
    ]
    return [
        {"name": f"{name}: {unit}", "value": value, "baseline": baseline, "ratio": value / baseline, "unit": unit}
        for unit, value, baseline in pairs
    ]


class _Side:
    """A loader with its own index, so that nothing read by one side is counted or kept for the other."""

    def __init__(self, index: ClipIndex, offsets: tuple[int, ...], read_frames: Callable[..., np.ndarray]):
        def read(clip: Clip, rng: np.random.Generator) -> dict[str, torch.Tensor]:
            first = int(rng.integers(clip.num_frames - max(offsets)))
            return {"frames": torch.from_numpy(read_frames(clip, [first + offset for offset in offsets]))}

        own = ClipIndex.open(index.clips_url)
        self.loader = Loader(own, read, LoaderConfig(num_workers=0), batch_size=1, seed=0)
        self.batches = iter(self.loader)
        self.seconds, self.samples, self.frames_per_sample = 0.0, 0, len(offsets)

    def run_round(self, samples: int) -> None:
        started = time.perf_counter()
        for _ in range(samples):
            next(self.batches)
        self.seconds += time.perf_counter() - started
        self.samples += samples

    @property
    def kb_per_frame(self) -> float:
        return self.loader.stats()["bytes_read"] / self.samples / self.frames_per_sample / 1e3

    @property
    def decoded_per_sample(self) -> float:
        return self.loader.stats()["frames_decoded"] / self.samples


def frames_from_start(clip: Clip, indices: list[int]) -> np.ndarray:
    """The plain way: fetch the whole clip, open it, decode until the last wanted frame has come."""
    mp4 = read_range(clip._shard_url, clip.row["mp4_offset"], clip.row["mp4_size"])
    clip._counter.bytes_read += len(mp4)
    pictures: dict[int, np.ndarray] = {}
    with av.open(io.BytesIO(mp4), "r") as container:
        container.streams.video[0].thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            clip._counter.frames_decoded += 1
            if number in indices:
                pictures[number] = frame.to_ndarray(format="rgb24")
            if number == max(indices):
                break
    return np.stack([pictures[index] for index in indices])
