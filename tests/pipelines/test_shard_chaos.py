"""`kinema shard` killed with SIGKILL: the artifact ends up as if nothing had happened."""

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kinema.pipelines.artifacts import Artifact

sys.path.insert(0, str(Path(__file__).parent))
from chaos import note
from made_videos import numbered, tree

SETTINGS = ("clip.seconds=0.5", "clip.preset=ultrafast", "min_shards=6")

# Runs the stage and ends the process without any cleaning up just before the n-th file becomes visible.
KILLED_AT = """
import os, sys
from kinema.pipelines.artifacts import store
from kinema.configs import ClipConfig, ShardConfig
from kinema.pipelines.shard import run

left = int(sys.argv[3])
publish = store.LocalStore.publish

def dying(self, *arguments):
    global left
    left -= 1
    if left == 0:
        os._exit(9)
    publish(self, *arguments)

store.LocalStore.publish = dying
clip = ClipConfig(seconds=0.5, preset="ultrafast")
run(ShardConfig(videos=sys.argv[1], out=sys.argv[2], clip=clip, min_shards=6))
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chaos") / "videos"
    for index in range(6):
        numbered(folder / f"{index}.mp4", 36, seed=index, speed=3, height=192, width=256)
    data = (folder / "0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def environment(engine: str) -> dict[str, str]:
    names = {**os.environ, "KINEMA_ENGINE": engine, "OMP_NUM_THREADS": "1"}
    names.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    names.pop("RAY_ADDRESS", None)
    return names


def start(videos: Path, out: Path, engine: str = "serial") -> subprocess.Popen:
    command = [sys.executable, "-m", "kinema.pipelines.cli", "shard", f"videos={videos}", f"out={out}", *SETTINGS]
    return subprocess.Popen(
        command, env=environment(engine), cwd=out.parent, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors


def kill(process: subprocess.Popen) -> None:
    """The stage and whatever it started, without warning."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)


@pytest.fixture(scope="module")
def undisturbed(videos) -> dict[str, str]:
    out = videos.parent / "undisturbed"
    finish(start(videos, out))
    assert Artifact.read(out).verify() == []
    return tree(out)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("moment", [pytest.param(4, marks=SLOW), pytest.param(13, marks=SLOW), 22])
def test_killed_before_a_file_becomes_visible(videos, undisturbed, tmp_path, moment):
    """While scanning, before the plan, while building."""
    out = tmp_path / "clips"
    command = [sys.executable, "-c", KILLED_AT, str(videos), str(out), str(moment)]
    died = subprocess.run(command, env=environment("serial"), cwd=tmp_path, capture_output=True, timeout=120)
    assert died.returncode == 9, died.stderr.decode()
    assert tree(out) != undisturbed
    finish(start(videos, out))
    assert tree(out) == undisturbed


def num_files(out: Path) -> int:
    return sum(path.is_file() and not path.name.startswith(".kinema-tmp-") for path in out.rglob("*"))


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine, kills", [("serial", 10), ("ray", 3)])
def test_killed_at_random_moments(videos, undisturbed, tmp_path, engine, kills):
    """Moments are numbers of files that are there already: seconds say little on a machine with other work."""
    seed = secrets.randbits(32)
    print(f"chaos seed {seed}")
    moments = random.Random(seed)
    out, killed = tmp_path / "clips", 0
    while killed < kills:
        present = num_files(out)
        target = moments.randint(present, len(undisturbed) - 1)
        process = start(videos, out, engine)
        while num_files(out) < target and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        if process.poll() is None:
            kill(process)
            killed += 1
            print(f"killed at {num_files(out)} of {len(undisturbed)} files")
        else:
            process.communicate()
        if (out / "samples.parquet").exists():
            assert tree(out) == undisturbed
            out.rename(tmp_path / f"done-{killed}-{secrets.token_hex(4)}")  # finished in spite of the kills
    finish(start(videos, out, engine))
    assert tree(out) == undisturbed
    assert Artifact.read(out).verify() == []
    note(engine, "shard", "kill -9 of the driver and all it started", "identical", kills)
