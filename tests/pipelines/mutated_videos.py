"""Thousands of damaged videos through `kinema shard`: bits flipped, cut, spliced, headers overwritten.

    python -m tests.pipelines.mutated_videos SHARED_DATA --count 5000 --batch 250 --out results.jsonl

Each batch is a folder of mutated files and one run of the stage in a process of its own, with limits of time and
memory. A file is accounted for when its clips are in samples.parquet or its reason is in quarantine.parquet.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import av

EXTENSIONS = {".mp4", ".mov", ".webm", ".mkv", ".ts", ".avi"}
KINDS = ("bits", "cut", "splice", "header")
MAX_BYTES, MAX_PIXELS, NUM_PACKETS = 180_000, 6_000_000, 16
CLIP = ["clip.seconds=0.5", "clip.short_side=48", "clip.preset=veryfast", "motion=none", "min_shards=4"]
BATCH_TIMEOUT_S = 900


def originals(data: Path) -> dict[str, bytes]:
    """Short files by name: as they are where they are small, else their first packets, packed again."""
    found = {}
    for path in sorted([*(data / "videos").iterdir(), *(data / "irregular").rglob("*")]):
        if path.suffix not in EXTENSIONS:
            continue
        whole = path.read_bytes()
        keep = len(whole) <= MAX_BYTES and _num_pixels(whole) <= MAX_PIXELS
        found[path.name] = whole if keep else shortened(whole, path.suffix)
    return found


def _num_pixels(data: bytes) -> int:
    """Of all frames together; 0 where it does not open."""
    try:
        with av.open(io.BytesIO(data)) as container:
            video = container.streams.video[0]
            return video.width * video.height * sum(packet.size > 0 for packet in container.demux(video))
    except (av.FFmpegError, IndexError):
        return 0


def shortened(data: bytes, suffix: str) -> bytes:
    """The first packets of the first video stream, in the same container; half as many of large pictures."""
    names = {".mov": "mov", ".webm": "webm", ".mkv": "matroska", ".ts": "mpegts", ".avi": "avi"}
    target = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(target, "w", format=names.get(suffix, "mp4")) as out:
        video = source.streams.video[0]
        copied = out.add_stream_from_template(video, opaque=True)
        count = NUM_PACKETS // (2 if video.width * video.height > 500_000 else 1)
        for number, packet in enumerate(source.demux(video)):
            if number == count or packet.dts is None:
                break
            packet.stream = copied
            out.mux(packet)
    return target.getvalue()


def mutate(rng: random.Random, kind: str, data: bytes, other: bytes) -> bytes:
    """One damaged copy of `data`; splices take a piece of `other`."""
    made = bytearray(data)
    if kind == "bits":
        for _ in range(2 ** rng.randint(0, 8)):
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del made[rng.randrange(len(made)) :]
    elif kind == "splice":
        at, size = rng.randrange(len(made)), rng.randint(1, 1 + len(made) // 4)
        start = rng.randrange(len(other))
        choice = rng.randrange(4)
        piece = (other[start:], other[start : start + size], bytes(size), b"")[choice]
        made[at : None if choice == 0 else at + size] = piece
    else:
        start, size = _header(data)
        for _ in range(2 ** rng.randint(0, 5)):
            made[start + rng.randrange(size)] = rng.randrange(256)
    return bytes(made)


def _header(data: bytes) -> tuple[int, int]:
    """Where the container says what it holds: the movie box of an MP4, else the first 2 KB."""
    box = data.find(b"moov")
    return (box, min(len(data) - box, 4096)) if box >= 0 else (0, min(2048, len(data)))


def write_batch(folder: Path, sources: dict[str, bytes], first: int, count: int, seed: int) -> list[str]:
    """Mutated files `first`, `first` + 1, ...; each depends on (seed, number) only. Returns: their names."""
    names, known = [], sorted(sources)
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        rng = random.Random(f"{seed}-{number}")
        kind, name, other = KINDS[number % len(KINDS)], rng.choice(known), rng.choice(known)
        names.append(f"{number:05d}_{kind}_{name}")
        (folder / names[-1]).write_bytes(mutate(rng, kind, sources[name], sources[other]))
    return names


def run_stage(videos: Path, out: Path, engine: str = "serial") -> subprocess.CompletedProcess:
    """The stage in a process that may hold 4 GB and take a quarter of an hour."""
    names = {**os.environ, "KINEMA_ENGINE": engine, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kinema.pipelines.cli", "shard", f"videos={videos}", f"out={out}", *CLIP]
    command += ["allowed_quarantine=1", "source_memory_gb=2", "--json"]
    return subprocess.run(command, env=names, capture_output=True, text=True, timeout=BATCH_TIMEOUT_S)


def outcomes(out: Path, names: list[str]) -> dict[str, str]:
    """What became of every file: `clips`, `clips in part`, an error class, or `LOST`."""
    from kinema.pipelines.artifacts import Artifact

    artifact = Artifact.read(out)
    assert artifact.verify() == []
    made = set(artifact.samples(["source"])["source"].to_pylist()) if artifact.commits() else set()
    bad = {row["source"]: row["error_class"] for row in artifact.quarantined().to_pylist()}
    return {
        name: ("clips in part" if name in bad else "clips") if name in made else bad.get(name, "LOST") for name in names
    }


def try_batch(folder: Path, sources: dict[str, bytes], first: int, count: int, seed: int) -> dict:
    """Counts by kind of damage and outcome, and what it cost."""
    names = write_batch(folder / "videos", sources, first, count, seed)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = run_stage(folder / "videos", folder / "clips")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        return {"first": first, "status": done.returncode, "said": done.stderr[-3000:]}
    found = outcomes(folder / "clips", names)
    counts = Counter((name.split("_")[1], outcome) for name, outcome in found.items())
    return {
        "first": first,
        "status": 0,
        "counts": {f"{kind}: {outcome}": number for (kind, outcome), number in sorted(counts.items())},
        "lost": [name for name, outcome in found.items() if outcome == "LOST"],
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "peak_mb": after.ru_maxrss // 1024,
    }


def table(lines: list[dict]) -> str:
    """Outcomes in rows, kinds of damage in columns."""
    counts: Counter = Counter()
    for line in lines:
        counts.update(line.get("counts", {}))
    rows = sorted({name.partition(": ")[2] for name in counts})
    text = [f"| outcome | {' | '.join(KINDS)} | all |", "|---" * (len(KINDS) + 2) + "|"]
    for row in rows:
        numbers = [counts[f"{kind}: {row}"] for kind in KINDS]
        text.append(f"| {row} | {' | '.join(map(str, numbers))} | {sum(numbers)} |")
    return "\n".join(text)


def main() -> None:
    """Batches that are in the result file already are not run again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with videos/ and irregular/")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--batches", type=int, default=0, help="at most so many now; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="one JSON line a batch")
    args = parser.parse_args()
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    sources = originals(args.data)
    wanted = [first for first in range(0, args.count, args.batch) if first not in {line["first"] for line in known}]
    for first in wanted[: args.batches or None]:
        with tempfile.TemporaryDirectory(prefix="mutated-") as folder:
            line = try_batch(Path(folder) / "b", sources, first, min(args.batch, args.count - first), args.seed)
        known.append(line)
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
    print(table(known))


if __name__ == "__main__":
    main()
