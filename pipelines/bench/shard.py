"""`kinema shard` against plain copying of the same source bytes to the same disk, each measured in one run."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from kinema.configs import ShardConfig, build
from kinema.pipelines import shard
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.scenes import render_demo_videos


def run(videos: str | None = None, num_copies: int = 4) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}; ratio = shard / copy.

    Args: videos, folder of videos; None: rendered scenes of 640x480, `num_copies` different sets of three.
    Copying is the floor that no packing can beat: the stage also decodes every frame, finds the cuts and encodes.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(videos or Path(folder) / "videos")
        if not videos:
            for seed in range(num_copies):
                render_demo_videos(source / str(seed), height=480, width=640, num_frames=96, seed=seed)
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        size_mb = sum(path.stat().st_size for path in files) / 1e6
        copy_s = _copy(files, Path(folder) / "copy")
        shard_s = _shard(source, Path(folder) / "clips")
        # the rendered scenes have few keyframes: long clips
        taken_s = _shard(source, Path(folder) / "copied", clip={"codec": "copy", "seconds": 60.0}, motion="none")
        samples = Artifact.read(Path(folder) / "clips").samples(["num_frames", "fps_num", "fps_den"]).to_pylist()
        frames = sum(row["num_frames"] for row in samples)
        video_s = sum(row["num_frames"] * row["fps_den"] / row["fps_num"] for row in samples)
    return [
        _row("source bytes through the stage", size_mb / shard_s, size_mb / copy_s, "MB/s, against copy + fsync"),
        _row("frames through the stage", frames / shard_s, frames / video_s, "frames/s, against real time"),
        _row("frames with clip.codec=copy", frames / taken_s, frames / shard_s, "frames/s, against encoding"),
    ]


def _shard(source: Path, out: Path, **settings: Any) -> float:
    started = time.perf_counter()
    config = build(ShardConfig, {"videos": str(source), "out": str(out), **settings})
    shard.run(config, report=lambda *_: None)
    return time.perf_counter() - started


def _copy(files: list[Path], target: Path) -> float:
    target.mkdir()
    started = time.perf_counter()
    for number, path in enumerate(files):
        copied = target / f"{number}{path.suffix}"
        shutil.copyfile(path, copied)
        with copied.open("rb") as handle:
            os.fsync(handle.fileno())
    return time.perf_counter() - started


def _row(name: str, value: float, baseline: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "baseline": baseline, "ratio": value / baseline, "unit": unit}
