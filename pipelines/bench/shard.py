"""`kinema shard` against plain copying of the same source bytes, and its processor time against a plain re-encode.

`python -m kinema.pipelines.bench.shard [FOLDER]` takes the videos of a folder instead of rendered ones.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from kinema.configs import ClipConfig, ShardConfig, build
from kinema.pipelines import shard
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.bench.paired import print_rows
from kinema.pipelines.scenes import render_demo_videos
from kinema.pipelines.video.encode import encoder_options


def run(videos: str | None = None, num_copies: int = 4, copy_seconds: float = 60.0) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}; ratio = value / baseline.

    Args: videos, folder of videos; None: rendered scenes of 640x480, `num_copies` different sets of three;
        copy_seconds, longest clip with clip.codec=copy (the rendered scenes have few keyframes).
    Copying is the floor that no packing can beat: the stage also decodes every frame, finds the cuts and encodes. The
    re-encode is what FFmpeg does: every frame decoded once and encoded with the stage's x264 settings, in one thread.
    """
    with tempfile.TemporaryDirectory() as folder, _one_process():
        source = Path(videos or Path(folder) / "videos")
        if not videos:
            for seed in range(num_copies):
                render_demo_videos(source / str(seed), height=480, width=640, num_frames=96, seed=seed)
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        size_mb = sum(path.stat().st_size for path in files) / 1e6
        _shard(files[0], Path(folder) / "imports")
        copy_s = _copy(files, Path(folder) / "copy")
        plain_s = sum(reencode_s(path) for path in files)
        wall_s, shard_s = _shard(source, Path(folder) / "clips")
        _, taken_s = _shard(source, Path(folder) / "copied", clip={"codec": "copy", "seconds": copy_seconds})
        samples = Artifact.read(Path(folder) / "clips").samples(["num_frames", "fps_num", "fps_den"]).to_pylist()
        frames = sum(row["num_frames"] for row in samples)
        video_s = sum(row["num_frames"] * row["fps_den"] / row["fps_num"] for row in samples)
    return [
        _row("source bytes through the stage", size_mb / wall_s, size_mb / copy_s, "MB/s, against copy + fsync"),
        _row("frames through the stage", frames / wall_s, frames / video_s, "frames/s, against real time"),
        _row("processor time of the stage", shard_s, plain_s, "s, against a plain re-encode"),
        _row(
            "frames with clip.codec=copy",
            frames / taken_s,
            frames / shard_s,
            "frames per processor s, against encoding",
        ),
    ]


@contextmanager
def _one_process() -> Iterator[None]:
    """Without Ray, so that this process's time is all the time there is."""
    before = os.environ.get("KINEMA_ENGINE")
    os.environ["KINEMA_ENGINE"] = "serial"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINEMA_ENGINE"]
        else:
            os.environ["KINEMA_ENGINE"] = before


def _shard(source: Path, out: Path, **settings: Any) -> tuple[float, float]:
    """Wall and processor seconds."""
    config = build(ShardConfig, {"videos": str(source), "out": str(out), "min_shards": 1, **settings})
    started, used = time.perf_counter(), time.process_time()
    shard.run(config, report=lambda *_: None)
    return time.perf_counter() - started, time.process_time() - used


def reencode_s(path: Path, clip: ClipConfig | None = None) -> float:
    """Processor seconds for decoding a file once and encoding it with the stage's settings."""
    clip = clip or ClipConfig()
    name, options = encoder_options(clip)
    used = time.process_time()
    with tempfile.TemporaryDirectory() as folder, av.open(str(path)) as source:
        stream = source.streams.video[0]
        stream.thread_count = 1
        rate = Fraction(stream.average_rate or 25)
        with av.open(f"{folder}/out.mp4", "w") as target:
            out = target.add_stream(name, rate=rate, options=options)
            assert isinstance(out, av.VideoStream)
            out.width, out.height, out.pix_fmt = stream.codec_context.width, stream.codec_context.height, "yuv420p"
            out.codec_context.thread_count, out.codec_context.gop_size = 1, clip.gop
            for index, frame in enumerate(source.decode(stream)):
                frame.pts, frame.time_base, frame.pict_type = index, 1 / rate, 0
                target.mux(out.encode(frame))
            target.mux(out.encode(None))
    return time.process_time() - used


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


def main(arguments: Sequence[str]) -> int:
    """See the top of the file."""
    folder = arguments[0] if arguments else None
    if folder and not any(path.is_file() for path in Path(folder).rglob("*")):
        sys.stderr.write(f"{folder!r} is no folder with videos; name one, or nothing for rendered ones\n")
        return 2
    print_rows(run(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
