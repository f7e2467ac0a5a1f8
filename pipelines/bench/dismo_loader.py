"""Training samples of DisMo: groups of pictures by ranged reads, shared by the samples of a clip, against one decode
per sample from the clip's start.

Both sides read the same clips and make the same tensors of the frames they have got: the difference is reading. The
rows say what a sample takes with and without its warps and colours, which cost both sides the same.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from kinema.configs import ClipConfig, DisMoConfig
from kinema.models.dismo.target_offset import frame_times
from kinema.pipelines.artifacts import read_range
from kinema.pipelines.loader import Clip, ClipIndex
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips
from kinema.pipelines.train.recipes.dismo.samples import drawn_frames, read_samples

HEIGHT_PX, WIDTH_PX, FPS = 288, 512, 24.0
CASES = ((96, 3), (240, 2))
"""Frames of a clip, and clips."""
GOP = 4
WINDOW, REACH = 8, 4
SAMPLES_PER_CLIP = 4


def run(cases: Sequence[tuple[int, int]] = CASES, rounds: int = 3, side_px: int = 256) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}: samples per second of processor time; ratio = ours / baseline.

    The sides take turns, and each is judged by its fastest round. Args: side_px, of the samples' frames.
    """
    config = DisMoConfig(autoencoder="pixels", frame_px=side_px)
    rows = []
    for num_frames, num_clips in cases:
        with tempfile.TemporaryDirectory(prefix="kinema-bench-") as name:
            scenes = [Scene(seed, HEIGHT_PX, WIDTH_PX, num_frames, fps=FPS) for seed in range(num_clips)]
            clips = write_scene_clips(scenes, Path(name) / "clips", ClipConfig(gop=GOP, preset="veryfast"))
            rows += _case(str(clips.url), config, f"{num_frames / FPS:g} s of {WIDTH_PX}x{HEIGHT_PX}", rounds)
    return rows


def _case(url: str, config: DisMoConfig, name: str, rounds: int) -> list[dict[str, Any]]:
    def frames_only(clip: Any, rngs: Sequence[np.random.Generator]) -> None:
        times = frame_times(clip.meta["pts"], clip.meta["time_base"])
        clip.frames(sorted(set().union(*(drawn_frames(times, rng, config, WINDOW, REACH) for rng in rngs))))

    def samples(clip: Any, rngs: Sequence[np.random.Generator]) -> None:
        read_samples(clip, rngs, config, WINDOW, REACH)

    rows = []
    for what, work in (("frames of samples/s", frames_only), ("whole samples/s", samples)):
        sides = {"ours": (_as_loaded, SAMPLES_PER_CLIP), "theirs": (_FromStart, 1)}
        best = dict.fromkeys(sides, float("inf"))
        for number in range(rounds + 1):  # the first round warms up
            for side, (opened, together) in sides.items():
                best[side] = min(best[side], _seconds_per_sample(url, opened, work, together, number))
        ours, theirs = 1 / best["ours"], 1 / best["theirs"]
        rows.append({"name": f"{name}: {what}", "value": ours, "baseline": theirs, "ratio": ours / theirs,
                     "unit": "samples/s of processor time"})  # fmt: skip
    return rows


def _seconds_per_sample(
    url: str, opened: Callable[[Clip], Any], work: Callable[[Any, Any], None], together: int, seed: int
) -> float:
    """Every clip gives `SAMPLES_PER_CLIP` samples, `together` at a time; nothing is kept from one time to the next."""
    index = ClipIndex.open(url)
    rngs = [[np.random.default_rng([seed, i, n]) for n in range(SAMPLES_PER_CLIP)] for i in range(len(index))]
    started = time.process_time()
    for number in range(len(index)):
        for first in range(0, SAMPLES_PER_CLIP, together):
            index._cache.clear()
            work(opened(index.clip(number)), rngs[number][first : first + together])
    return (time.process_time() - started) / (len(index) * SAMPLES_PER_CLIP)


def _as_loaded(clip: Clip) -> Clip:
    return clip


class _FromStart:
    """A clip that is decoded from its first frame to the last one asked for; only those asked for become RGB."""

    def __init__(self, clip: Clip):
        self.clip = clip
        self.meta = clip.meta

    def frames(self, indices: Iterable[int]) -> np.ndarray:
        wanted, row = list(indices), self.clip.row
        data = read_range(self.clip._shard_url, row["mp4_offset"], row["mp4_size"])
        found: dict[int, np.ndarray] = {}
        with av.open(io.BytesIO(data), "r") as container:
            container.streams.video[0].thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found[number] = frame.to_ndarray(format="rgb24")
                if number == max(wanted):
                    break
        return np.stack([found[index] for index in wanted])
