"""Bytes of clips at the PSNR of MPEG-1, by setting, with what each costs to encode and to read a frame from.

A group of pictures costs its first picture in full: short groups are fast to read from and large. Each setting's crf is
chosen so that its PSNR comes nearest to MPEG-1's (groups of 12, as ffmpeg writes it); bytes are those at that crf. A
frame is read at a random place, one thread: ours by one ranged read of its group, MPEG-1's by decoding from the start.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kinema.configs import ClipConfig
from kinema.pipelines.bench.fpt_loader import CLIP, clips_of_equal_psnr, decode_from_start, stored, write_mpeg1
from kinema.pipelines.bench.paired import paired
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips

CASES = ((24, 2), (96, 1))
"""Frames, number of films."""
SETTINGS = {
    "clip.codec=mpeg4 clip.gop=3": CLIP,
    "clip.codec=mpeg4 clip.gop=4": replace(CLIP, gop=4),
    "clip.gop=4 clip.preset=veryfast": ClipConfig(gop=4, preset="veryfast"),
    "clip.gop=12 clip.preset=veryfast": ClipConfig(preset="veryfast"),
    "clip.gop=12 clip.preset=medium (the default)": ClipConfig(),
}
NUM_READS = 48


class Film(Scene):
    """A scene that is rendered once, however often it is encoded."""

    def __init__(self, seed: int, side_px: int, num_frames: int):
        super().__init__(seed, side_px, side_px, num_frames)
        self._rendered = [super(Film, self).frame(t) for t in range(num_frames)]

    def frame(self, t: int) -> np.ndarray:
        """Frame t, RGB."""
        return self._rendered[t]


def run(
    side_px: int = 512,
    cases: Sequence[tuple[int, int]] = CASES,
    settings: Mapping[str, ClipConfig] = SETTINGS,
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, processor_ratio, unit}; the baseline is MPEG-1."""
    rows = []
    for num_frames, num_films in cases:
        films = [Film(seed, side_px, num_frames) for seed in range(num_films)]
        with tempfile.TemporaryDirectory(prefix="kinema-bench-") as name:
            rows += _case(Path(name), films, settings, rounds)
    return rows


def _case(folder: Path, films: Sequence[Film], settings: Mapping[str, ClipConfig], rounds: int) -> list[dict[str, Any]]:
    truth = [np.stack(list(film.frames())) for film in films]
    files = [folder / f"{film.seed}.mpg" for film in films]

    def write() -> None:
        for file, frames in zip(files, truth, strict=True):
            write_mpeg1(file, frames)

    write()
    num_frames = films[0].num_frames
    decoded = (decode_from_start(file, num_frames - 1) for file in files)
    theirs = stored(truth, decoded, sum(file.stat().st_size for file in files))
    encode: dict[str, Callable[[], Any]] = {"theirs": write}
    read: dict[str, Callable[[], Any]] = {"theirs": partial(_read_from_start, files, num_frames)}
    rows = []
    for number, (name, setting) in enumerate(settings.items()):
        clips, ours = clips_of_equal_psnr(folder / str(number), films, truth, theirs.psnr_db, setting)
        found = ClipConfig(**clips.manifest["config"])
        encode[name] = partial(_encode, films, folder / f"again{number}", found)
        read[name] = partial(_read, ClipIndex.open(str(clips.url)), num_frames)
        unit = f"KB at {ours.psnr_db:.1f} dB (crf {found.crf}), against MPEG-1 at {theirs.psnr_db:.1f} dB"
        kilobytes, baseline = ours.num_bytes / 1e3, theirs.num_bytes / 1e3
        sizes = {"value": kilobytes, "baseline": baseline, "ratio": kilobytes / baseline, "unit": unit}
        rows.append({"name": f"{num_frames} frames, {name}: video"} | sizes)
    for what, sides, items in (("encoding", encode, num_frames * len(films)), ("a random frame", read, NUM_READS)):
        times = paired(sides, rounds, warm_up=1)
        unit = "frames/s, against MPEG-1"
        rows += [
            times.rate_row(f"{num_frames} frames, {name}: {what}", name, "theirs", unit, items) for name in settings
        ]
    return rows


def _encode(films: Sequence[Film], url: Path, clip: ClipConfig) -> None:
    with tempfile.TemporaryDirectory(dir=url.parent) as folder:
        write_scene_clips(films, folder, clip)


def _places(num_clips: int, num_frames: int) -> list[tuple[int, int]]:
    """Clip and frame of each read, the same for all sides."""
    generator = np.random.default_rng(0)
    return [(int(generator.integers(num_clips)), int(generator.integers(num_frames))) for _ in range(NUM_READS)]


def _read(index: ClipIndex, num_frames: int) -> None:
    for clip, t in _places(len(index), num_frames):
        index.clip(clip).frames([t])


def _read_from_start(files: Sequence[Path], num_frames: int) -> None:
    for clip, t in _places(len(files), num_frames):
        decode_from_start(files[clip], t, only_last=True)
