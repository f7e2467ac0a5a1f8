"""`kinema teach` killed with SIGKILL at random moments: the artifact ends up as if nothing had happened."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest

from kinema.pipelines.artifacts import Artifact, sample_key
from kinema.pipelines.scenes import Scene

sys.path.insert(0, str(Path(__file__).parent))
from chaos import note

NUM_SHARDS, CLIPS_PER_SHARD, NUM_FRAMES, HEIGHT, WIDTH = 6, 2, 16, 120, 160


def encode(frames: list[np.ndarray]) -> bytes:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(24), options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return target.getvalue()


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chaos") / "clips"
    artifact = Artifact.open(folder, kind="clips", config={})
    rows = [(s, f"{s}-{c}.mp4") for s in range(NUM_SHARDS) for c in range(CLIPS_PER_SHARD)]
    columns = {"shard": pa.array([s for s, _ in rows], pa.int32()), "key": [sample_key(n) for _, n in rows]}
    artifact.append_plan(pa.table({**columns, "source": [n for _, n in rows]}))
    for shard in range(NUM_SHARDS):
        with artifact.shard_writer(shard) as writer:
            for place, row in enumerate(artifact.plan_of(shard).to_pylist()):
                scene = Scene(seed=10 * shard + place, height=HEIGHT, width=WIDTH, num_frames=NUM_FRAMES)
                mp4 = encode(list(scene.frames()))
                meta = json.dumps({"key": row["key"], "sha256": hashlib.sha256(mp4).hexdigest()}).encode()
                size = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES}
                writer.add(row["key"], {"mp4": mp4, "json": meta}, row={"source": row["source"], **size})
            writer.commit()
    artifact.finalize()
    return folder


def start(clips: Path, out: Path, engine: str) -> subprocess.Popen:
    environment = {**os.environ, "KINEMA_ENGINE": engine, "OMP_NUM_THREADS": "1"}
    environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "kinema.pipelines.cli", "teach", f"clips={clips}", f"out={out}", "--json"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=clips.parent, text=True
    )


def finish(process: subprocess.Popen) -> dict:
    stdout, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def tree(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def num_commits(folder: Path) -> int:
    return len(list(folder.glob("_commits/*.json")))


@pytest.mark.chaos
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("engine, num_rounds", [("serial", 2), ("ray", 1)])
def test_kill_9_at_random_moments_then_rerun_gives_the_same_bytes(clips, tmp_path, engine, num_rounds):
    """Four kills a round: while it starts, twice between two commits, and around the last one."""
    calm_summary = finish(start(clips, tmp_path / "calm", "serial"))
    assert calm_summary["clips"] == NUM_SHARDS * CLIPS_PER_SHARD
    calm = tree(tmp_path / "calm")
    seed = secrets.randbits(32)
    print(f"chaos seed {seed}")
    rng, killed = random.Random(seed), 0
    for number in range(num_rounds):
        out = tmp_path / f"killed-{number}"
        middle = sorted(rng.sample(range(1, NUM_SHARDS), 2))
        for target in (0, *middle, NUM_SHARDS):
            process = start(clips, out, engine)
            while num_commits(out) < target and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.3))
            was_running = process.poll() is None
            if was_running:
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
            process.communicate()
            print(f"killed at {num_commits(out)} commits" if was_running else "was finished")
        finish(start(clips, out, engine))
        assert tree(out) == calm
        assert Artifact.read(out).verify() == []
    note(engine, "teach", "kill -9 of the driver", "identical", killed)
