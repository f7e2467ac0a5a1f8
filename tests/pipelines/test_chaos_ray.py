"""Ray's workers, actors, drivers and nodes killed while stages run: what comes out is what the serial engine makes."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from kinema.configs import ClipConfig, EmbedConfig, ShardConfig, TeachConfig, TrackConfig
from kinema.pipelines import embed, shard, teach, track
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.demo import write_scene
from kinema.pipelines.shard import build, scan, stage

sys.path.insert(0, str(Path(__file__).parent))
from chaos import note, tree
from ray_nodes import Nodes, end_of, in_namespace, needs_namespace, num_commits, objects, start_stage
from s3_server import s3_server
from test_nodes import BUCKET, NUM_FILMS, path_of_stages, put_films, train_in_bucket

FILMS = 8
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]


def die(folder: str, name: str, times: int) -> None:
    """SIGKILL to this worker, unless it, or one before it, has died `times` times of this name."""
    for number in range(times):
        marker = Path(folder) / f"{name}-{number}"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class DyingScan:
    """`scan_task` whose worker is killed once for every source."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, task: scan.ScanTask) -> tuple[str, str]:
        done = scan.scan_task(task) if task.source.id < "4" else None  # half of them after their work
        die(self.folder, f"scan-{task.source.id}", 1)
        return done or scan.scan_task(task)


class DyingBuild(DyingScan):
    """`build_shard` likewise."""

    def __call__(self, task: build.BuildTask) -> build.Built:
        done = build.build_shard(task) if task.shard % 2 else None
        die(self.folder, f"build-{task.shard}", 1)
        return done or build.build_shard(task)


class DyingWork:
    """An actor's work on shards; the actor is killed twice on each: before it, and behind it."""

    def __init__(self, folder: str, work: Any):
        self.folder, self.work = folder, work

    def __call__(self, number: int) -> Any:
        die(self.folder, f"before-{number}", 1)
        done = self.work(number)
        die(self.folder, f"behind-{number}", 1)
        return done


def dying(folder: str, real: Any, *arguments: Any, **options: Any) -> DyingWork:
    return DyingWork(folder, real(*arguments, **options))


@pytest.fixture
def travelling(ray_session):
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def run_all(videos: Path, root: Path, model: str) -> None:
    """Four stages, one after the other."""
    clips, flow = str(root / "clips"), str(root / "flow")
    clip = ClipConfig(preset="ultrafast", seconds=0.5)
    quiet = {"report": lambda line: None}
    assert shard.run(ShardConfig(str(videos), clips, clip=clip, min_shards=FILMS), **quiet).exit_status == 0
    teach.run(TeachConfig(clips=clips, out=flow, gaps=(1,)), **quiet)
    track.run(TrackConfig(clips=clips, flow=flow, out=str(root / "tracks"), tracker="chain", grid=4), **quiet)
    features = EmbedConfig(clips=clips, model=model, out=str(root / "features"), frame_stride=6, short_side=48)
    embed.run(features, **quiet)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A checkpoint of one step."""
    from kinema.pipelines.cli import main
    from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow

    root = tmp_path_factory.mktemp("model")
    scenes = [Scene(seed=0, height=64, width=96, num_frames=8)]
    clips = write_scene_clips(scenes, str(root / "clips"))
    write_scene_flow(scenes, clips, str(root / "flow"))
    settings = ["model=flowfeat", "flowfeat.variant=dino_vits16_yt", "flowfeat.resize=48", "flowfeat.crop=32"]
    inputs = [f"clips={root / 'clips'}", f"flow={root / 'flow'}", f"out={root / 'run'}", "steps=1", "batch_size=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        assert main(["train", *inputs, *settings, "loader.num_workers=0"]) == 0
    return str(root / "run")


def test_every_worker_and_actor_is_killed(travelling, model, tmp_path, monkeypatch):
    videos, marks = tmp_path / "videos", tmp_path / "marks"
    videos.mkdir(), marks.mkdir()
    for seed in range(FILMS):
        write_scene(Scene(seed=seed, height=64, width=96, num_frames=12), videos / f"{seed}.mp4")
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    run_all(videos, tmp_path / "calm", model)
    monkeypatch.delenv("KINEMA_ENGINE")
    monkeypatch.setattr(stage, "scan_task", DyingScan(str(marks)))
    monkeypatch.setattr(stage, "build_shard", DyingBuild(str(marks)))
    for module, name in ((teach, "ShardTeacher"), (track, "ShardTracker"), (embed, "ShardEmbedder")):
        folder = marks / name
        folder.mkdir()
        monkeypatch.setattr(module, name, partial(dying, str(folder), getattr(module, name)))
    run_all(videos, tmp_path / "killed", model)
    assert tree(tmp_path / "killed") == tree(tmp_path / "calm")
    kills = Counter(path.relative_to(marks).as_posix().partition("-")[0] for path in marks.rglob("*-*"))
    assert kills["scan"] == kills["build"] == FILMS
    for kind, number in kills.items():
        what, _, moment = kind.partition("/")
        named = {"ShardTeacher": "teach", "ShardTracker": "track", "ShardEmbedder": "embed"}.get(what, "shard")
        fault = f"kill -9 of an actor, {moment} a shard" if moment else f"kill -9 of a worker, {what}"
        note("ray", named, fault, "identical", number)


def disturb(process: subprocess.Popen, rng: random.Random, out: str) -> str:
    """Kill or stop a driver between two commits. Returns: what was done, or an empty string if it was done already."""
    before, deadline = num_commits(out), time.monotonic() + 240
    while process.poll() is None and num_commits(out) <= before and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 0.3))
    if process.poll() is not None:
        return ""
    name = rng.choice(["SIGKILL", "SIGTERM"])
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=120)[1]
    if name == "SIGTERM" and process.returncode == 1:
        assert "stopped by the user; run the same command again" in said, said[-2000:]
    assert process.returncode != 2, said[-2000:]
    return "SIGTERM" if name == "SIGTERM" else "kill -9"


def scene(seed: int) -> dict[str, Any]:
    """Drivers are killed again and again, nodes now and then, and the object store fails all the time."""
    rng, counted = random.Random(seed), Counter()
    with s3_server() as faults:
        put_films()
        for name, arguments in path_of_stages(f"{BUCKET}/calm").items():
            if name == "embed":
                train_in_bucket()
            end_of(start_stage(name, *arguments, engine="serial"))
        faults.latency_s = 0.03
        with Nodes() as nodes:
            names = iter(f"n{number}" for number in range(99))
            alive = [next(names), next(names)]
            for node in alive:
                nodes.add(node)
            for name, arguments in path_of_stages(f"{BUCKET}/nodes").items():
                out = next(text for text in arguments if text.startswith("out=")).partition("=")[2]
                for _ in range(4):
                    for fault in ("500", "503", "cut", "lost"):
                        where = "^(GET|HEAD) " if fault == "cut" else "^(GET|HEAD|PUT) "
                        faults.add(fault, where=f"{where}.*{rng.choice(['', 'tar', '_commits', 'clips'])}")
                    done = disturb(start_stage(name, *arguments), rng, out)
                    counted[f"{name}|{done} of the driver"] += bool(done)
                lost = alive.pop(0)
                nodes.kill(lost)
                alive.append(next(names))
                nodes.add(alive[-1])
                counted[f"{name}|kill -9 of a node"] += 1
                end_of(start_stage(name, *arguments))
                counted[f"{name}|object store: 500, 503, cut, lost"] += 16 - len(faults.queue)
                faults.queue.clear()
        faults.latency_s = 0.0
        return {"counted": counted, "calm": objects(f"{BUCKET}/calm"), "nodes": objects(f"{BUCKET}/nodes")}


@needs_namespace
def test_drivers_and_nodes_are_killed_while_the_object_store_fails(tmp_path):
    seed = secrets.randbits(32)
    print(f"chaos seed {seed}")
    found = in_namespace(scene, seed, timeout=2300)
    assert sum(name.endswith(".tar") for name in found["calm"]) == 4 * NUM_FILMS
    assert found["nodes"] == found["calm"]
    for kind, number in found["counted"].items():
        stage_name, _, fault = kind.partition("|")
        if number:
            note("ray", stage_name, fault, "identical", number)
