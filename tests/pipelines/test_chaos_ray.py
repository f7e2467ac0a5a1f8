"""Ray's workers, actors, drivers and nodes killed while stages run: what comes out is what the serial engine makes."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from ray import cloudpickle

from kinema.configs import ClipConfig, EmbedConfig, ShardConfig, TeachConfig, TrackConfig
from kinema.pipelines import embed, shard, teach, track
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.errors import StageError
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.demo import write_scene
from kinema.pipelines.shard import build, scan, stage

sys.path.insert(0, str(Path(__file__).parent))
import chaos
from chaos import DAMAGE, but_for_scans, jumping_clock, note, struck, tree
from ray_nodes import Nodes, end_of, in_namespace, needs_namespace, num_commits, objects, start_stage
from s3_server import s3_server
from test_nodes import BUCKET, NUM_FILMS, path_of_stages, put_films, train_in_bucket

FILMS = 6
NAMES = {"shard": "clips", "teach": "flow", "track": "tracks", "embed": "features"}
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]


def run_stage(name: str, inputs: str, out: str, videos: str, model: str) -> Any:
    """One stage. Args: inputs, folder or URL with the artifacts of the stages before; out, its own artifact."""
    clips, flow = f"{inputs}/clips", f"{inputs}/flow"
    quiet = {"report": lambda line: None}
    if name == "shard":
        clip = ClipConfig(preset="ultrafast", seconds=0.5)
        return shard.run(ShardConfig(videos, out, clip=clip, min_shards=FILMS), **quiet)
    if name == "teach":
        return teach.run(TeachConfig(clips=clips, out=out, gaps=(1,)), **quiet)
    if name == "track":
        return track.run(TrackConfig(clips=clips, flow=flow, out=out, tracker="chain", grid=4), **quiet)
    features = EmbedConfig(clips=clips, model=model, out=out, frame_stride=6, short_side=48)
    return embed.run(features, **quiet)


@dataclass(frozen=True)
class Calm:
    """What an undisturbed run of every stage made, serially."""

    root: Path
    model: str

    @property
    def videos(self) -> Path:
        return self.root / "videos"

    def run(self, name: str, out: str | Path, inputs: str | Path = "", videos: str | Path = "") -> Any:
        """One stage, from calm inputs unless others are given."""
        return run_stage(name, str(inputs or self.root), str(out), str(videos or self.videos), self.model)

    def tree(self, name: str) -> dict[str, str]:
        return tree(self.root / NAMES[name])


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Calm:
    from kinema.pipelines.cli import main

    made = Calm(tmp_path_factory.mktemp("calm"), str(tmp_path_factory.mktemp("model") / "run"))
    made.videos.mkdir()
    for seed in range(FILMS):
        write_scene(Scene(seed=seed, height=64, width=96, num_frames=12), made.videos / f"{seed}.mp4")
    settings = ["model=flowfeat", "flowfeat.variant=dino_vits16_yt", "flowfeat.resize=48", "flowfeat.crop=32"]
    inputs = [f"clips={made.root / 'clips'}", f"flow={made.root / 'flow'}", f"out={made.model}", "steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        for name, folder in NAMES.items():
            if name == "embed":
                assert main(["train", *inputs, "batch_size=1", *settings, "loader.num_workers=0"]) == 0
            made.run(name, made.root / folder)
    return made


Around = Callable[[str, int], contextlib.AbstractContextManager]
"""(what is worked on, its number) -> the context a worker does it in: `scan` a source, `build` a shard, or an actor's
`work` on a shard."""


class InWorker:
    """A task, or an actor's work on shards, in a context of the worker's process."""

    def __init__(self, around: Around, work: Any):
        self.around, self.work = around, work

    def __call__(self, item: Any) -> Any:
        if isinstance(item, scan.ScanTask):
            what, number = "scan", int(item.source.id.partition(".")[0])
        elif isinstance(item, build.BuildTask):
            what, number = "build", item.shard
        else:
            what, number = "work", item
        with self.around(what, number):
            return self.work(item)


def in_actor(around: Around, real: Any, *arguments: Any, **options: Any) -> InWorker:
    with around("start", -1):
        return InWorker(around, real(*arguments, **options))


@contextlib.contextmanager
def around_work(around: Around) -> Iterator[None]:
    """Whatever workers of any stage do, they do in this context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "scan_task", InWorker(around, scan.scan_task))
        patch.setattr(stage, "build_shard", InWorker(around, build.build_shard))
        for module, name in ((teach, "ShardTeacher"), (track, "ShardTracker"), (embed, "ShardEmbedder")):
            patch.setattr(module, name, partial(in_actor, around, getattr(module, name)))
        yield


@pytest.fixture
def travelling(ray_session):
    """Workers get these modules by value: they cannot import them."""
    modules = sys.modules[__name__], chaos
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


def first(folder: str, name: str) -> bool:
    """Whether this is the first time, of all workers, that the name is asked for."""
    try:
        (Path(folder) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def deaths(folder: str, moments: str, what: str, number: int) -> Iterator[None]:
    """SIGKILL to the worker before and behind each shard, or before half of them and behind the others."""
    each = moments == "both" and what != "scan"
    if number >= 0 and (each or number % 2) and first(folder, f"{what}-before-{number}"):
        os.kill(os.getpid(), signal.SIGKILL)
    yield
    if number >= 0 and (each or not number % 2) and first(folder, f"{what}-behind-{number}"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_every_worker_and_actor_is_killed(travelling, calm, tmp_path):
    for name, folder in NAMES.items():
        marks = tmp_path / f"marks-{name}"
        marks.mkdir()
        with around_work(partial(deaths, str(marks), "one" if name == "embed" else "both")):
            calm.run(name, tmp_path / folder, inputs=tmp_path)
        assert tree(tmp_path / folder) == calm.tree(name)
        kills = Counter(path.name.rpartition("-")[0] for path in marks.iterdir())
        assert sum(kills.values()) == {"shard": 3, "embed": 1}.get(name, 2) * FILMS, kills
        who = "a worker" if name == "shard" else "an actor"
        for moment, number in kills.items():
            note("ray", name, f"kill -9 of {who} ({moment.replace('-', ', ')} a shard)", "identical", number)


@contextlib.contextmanager
def one_file_is_refused(folder: str, fault: str, at: int, what: str, number: int) -> Iterator[None]:
    """The fault, once among all workers, at the `at`-th file that the work on a shard makes visible."""
    if what in ("build", "work") and first(folder, fault):
        with struck(fault, at):
            yield
    else:
        yield


@contextlib.contextmanager
def clocks_jump(what: str, number: int) -> Iterator[None]:
    """By a year forwards, or by a day backwards, again and again."""
    seconds, every = [(31_536_000.0, 3), (-86_400.0, 7)][number % 2]
    with jumping_clock(seconds, every):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_disks_fill_turn_read_only_and_clocks_jump_in_workers(travelling, calm, tmp_path, name):
    """Two runs that end early, in one line, and a third that goes on from there with clocks that jump."""
    out, rng = tmp_path / NAMES[name], random.Random(secrets.randbits(32))
    for fault, says in (("disk full", "[Nn]o space left|disk full"), ("read-only", "[Rr]ead-only")):
        with around_work(partial(one_file_is_refused, str(tmp_path), fault, rng.randint(1, 3))):
            with pytest.raises(StageError, match=says):
                calm.run(name, out)
    with around_work(clocks_jump):
        calm.run(name, out)
    assert tree(out) == calm.tree(name)
    note("ray", name, "disk full in a worker", "clear error, then identical")
    note("ray", name, "read-only folder in a worker", "clear error, then identical")
    note("ray", name, "clock jumps in workers", "identical", FILMS)


INPUTS = {"teach": ["clips"], "track": ["clips", "flow"], "embed": ["clips"]}


@pytest.mark.parametrize("name", INPUTS)
def test_damaged_inputs_are_told_and_lose_nothing(travelling, calm, tmp_path, name):
    """Several shards of every input at once, then its table; with the inputs as they were, nothing is missing."""
    inputs, out, damaged = tmp_path / "inputs", tmp_path / "out", []
    for folder in INPUTS[name]:
        shutil.copytree(calm.root / folder, inputs / folder)
        tars = sorted((inputs / folder).glob("*.tar"))[len(damaged) :]
        damaged += [(kind, folder, tar, tar.read_bytes()) for kind, tar in zip(DAMAGE, tars, strict=False)]
    for kind, _, tar, _ in damaged:
        DAMAGE[kind](tar)
    calm.run(name, out, inputs=inputs)
    told = {row["shard"] for row in Artifact.read(out).quarantined().to_pylist()}
    for kind, folder, tar, whole in damaged:
        tar.write_bytes(whole)
        (made,) = out.glob(f"*-{tar.stem[-6:]}.tar")
        same = made.read_bytes() == (calm.root / NAMES[name] / made.name).read_bytes()
        assert same or int(tar.stem[-6:]) in told, (kind, tar.name)
        note("ray", name, f"{kind} tar of {folder}", f"{'not read' if same else 'quarantined'}, then identical")
    assert told, "none of it was noticed"
    for folder in INPUTS[name]:
        table = inputs / folder / "samples.parquet"
        whole = table.read_bytes()
        for kind in ("cut", "wrong magic"):
            DAMAGE[kind](table)
            with pytest.raises((ValueError, StageError), match="samples.parquet"):
                calm.run(name, tmp_path / "never", inputs=inputs)
            table.write_bytes(whole)
            note("ray", name, f"{kind} parquet of {folder}", "clear error, then identical")
    assert calm.run(name, out, inputs=inputs).quarantined == 0
    assert tree(out) == calm.tree(name)


@contextlib.contextmanager
def with_variables(variables: dict[str, str], what: str, number: int) -> Iterator[None]:
    os.environ.update(variables)
    yield


STORE_FAULTS = ("500", "503", "cut", "lost")
FAULTS_A_STAGE = 12


def test_an_object_store_that_fails_now_and_then(travelling, calm, tmp_path):
    seed = secrets.randbits(32)
    print(f"chaos seed {seed}")
    rng = random.Random(seed)
    with s3_server() as faults:
        files = fsspec.filesystem("s3")
        files.put(f"{calm.videos}/", "kinema/videos/", recursive=True)
        told = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        for name, folder in NAMES.items():
            for number in range(FAULTS_A_STAGE):
                fault = STORE_FAULTS[number % 4]
                where = "^(GET|HEAD) " if fault == "cut" else "^(GET|HEAD|PUT) "
                faults.add(fault, where=f"{where}.*{rng.choice(['', 'tar', '_commits', folder])}")
            with around_work(partial(with_variables, told)):
                calm.run(name, f"s3://kinema/{folder}", inputs="s3://kinema", videos="s3://kinema/videos")
            left = len(faults.queue)
            faults.queue.clear()
            files.invalidate_cache()
            files.get(f"kinema/{folder}/", f"{tmp_path / folder}/", recursive=True)
            assert but_for_scans(tree(tmp_path / folder)) == but_for_scans(calm.tree(name))
            note("ray", name, "object store: 500, 503, cut, lost", "identical", FAULTS_A_STAGE - left)


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


DRIVERS_A_STAGE = 2


def fail_now_and_then(faults: Any, rng: random.Random) -> None:
    for fault in STORE_FAULTS:
        where = "^(GET|HEAD) " if fault == "cut" else "^(GET|HEAD|PUT) "
        faults.add(fault, where=f"{where}.*{rng.choice(['', 'tar', '_commits', 'clips'])}")


def scene(seed: int) -> dict[str, Any]:
    """Drivers are killed or stopped, then a node is lost under the one that goes on; the store fails all the time."""
    rng, counted = random.Random(seed), Counter()
    with s3_server() as faults:
        put_films()
        for name, arguments in path_of_stages(f"{BUCKET}/calm").items():
            if name == "embed":
                train_in_bucket()
            end_of(start_stage(name, *arguments, engine="serial"))
        faults.latency_s = 0.03
        with Nodes() as nodes:
            nodes.add("n0"), nodes.add("n1")
            for number, (name, arguments) in enumerate(path_of_stages(f"{BUCKET}/nodes").items()):
                out = next(text for text in arguments if text.startswith("out=")).partition("=")[2]
                for _ in range(DRIVERS_A_STAGE):
                    fail_now_and_then(faults, rng)
                    done = disturb(start_stage(name, *arguments), rng, out)
                    counted[f"{name}|{done} of the driver"] += bool(done)
                fail_now_and_then(faults, rng)
                process, before = start_stage(name, *arguments), num_commits(out)
                while process.poll() is None and num_commits(out) <= before:
                    time.sleep(0.05)
                if process.poll() is None:
                    nodes.kill(f"n{number}"), nodes.add(f"n{number + 2}")
                    counted[f"{name}|kill -9 of a node"] += 1
                end_of(process)
                injected = (DRIVERS_A_STAGE + 1) * len(STORE_FAULTS) - len(faults.queue)
                counted[f"{name}|object store: 500, 503, cut, lost"] += injected
                faults.queue.clear()
        faults.latency_s = 0.0
        return {"counted": counted, "calm": objects(f"{BUCKET}/calm"), "nodes": objects(f"{BUCKET}/nodes")}


@needs_namespace
def test_drivers_and_nodes_are_killed_while_the_object_store_fails():
    seed = secrets.randbits(32)
    print(f"chaos seed {seed}")
    found = in_namespace(scene, seed, timeout=2300)
    assert sum(name.endswith(".tar") for name in found["calm"]) == 4 * NUM_FILMS
    assert found["nodes"] == found["calm"]
    for kind, number in found["counted"].items():
        stage_name, _, fault = kind.partition("|")
        note("ray", stage_name, fault, "identical", number)
    assert sum(number for kind, number in found["counted"].items() if "kill" in kind or "SIGTERM" in kind) >= 4
