"""Every stage under every fault, serially: the next run ends with what a calm one has, or says what is wrong."""

from __future__ import annotations

import random
import secrets
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.demo import write_scene
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.meter import read_metrics

sys.path.insert(0, str(Path(__file__).parent))
from chaos import (
    DAMAGE,
    DONE,
    ERROR,
    KILLED,
    but_for_scans,
    command,
    counted,
    jumping_clock,
    note,
    poisoned,
    struck,
    tree,
)
from s3_server import s3_server

STAGES = ("shard", "teach", "track", "train", "embed")
SMALL_MODEL = ["model=flowfeat", "flowfeat.variant=dino_vits16_yt", "flowfeat.resize=48", "flowfeat.crop=32"]
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


def arguments(stage: str, inputs: str, out: str) -> list[str]:
    """Args: inputs, folder or URL with the artifacts of the stages before; out, where this one writes."""
    clips, flow = f"clips={inputs}/clips", f"flow={inputs}/flow"
    return {
        "shard": ["shard", f"videos={inputs}/videos", "clip.preset=ultrafast", "clip.seconds=0.25", "min_shards=3"],
        "teach": ["teach", clips, "teacher=dis", "gaps=[1]"],
        "track": ["track", clips, flow, "tracker=chain", "grid=4"],
        "train": ["train", clips, flow, "steps=4", "batch_size=1", "checkpoint_every=1", "log_every=1", "lr=1e-3",
                  "pictures_every=0", "loader.num_workers=0", *SMALL_MODEL],
        "embed": ["embed", clips, f"model={inputs}/train", "frame_stride=6", "short_side=48"],
    }[stage] + [f"out={out}", "--json"]  # fmt: skip


NAMES = dict(zip(STAGES, ("clips", "flow", "tracks", "train", "features"), strict=True))


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Iterator[Path]:
    """Videos, and every stage's output, undisturbed; MLflow logs to a database that exists."""
    root = tmp_path_factory.mktemp("calm")
    (root / "videos").mkdir()
    for seed in range(3):
        write_scene(Scene(seed=seed, height=64, width=96, num_frames=12), root / "videos" / f"{seed}.mp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'store.db'}")
        for stage in STAGES:
            ended = command(arguments(stage, str(root), str(root / NAMES[stage])), root)
            assert ended.how == DONE, ended.said
        yield root


def state(stage: str, out: Path) -> object:
    """What must not differ."""
    if stage != "train":
        return tree(out)
    newest = checkpoint.latest_checkpoint(out)
    losses = [(point["step"], point["loss"]) for point in read_metrics(out)]
    return tree(newest)["model.safetensors"], checkpoint.read_meta(newest)["step"], losses


def num_replaced(stage: str, calm: Path, folder: Path) -> int:
    """Files that become visible in an undisturbed run."""
    file = folder / "counted"
    ended = command(arguments(stage, str(calm), str(folder / "count")), folder, partial(counted, str(file)))
    assert ended.how == DONE, ended.said
    return int(file.read_text())


def rng_of(stage: str) -> random.Random:
    seed = secrets.randbits(32)
    print(f"chaos seed {seed} ({stage})")
    return random.Random(seed)


@pytest.mark.parametrize("stage", STAGES)
def test_faults_at_any_file_that_becomes_visible(calm, tmp_path, stage):
    """Kills, signals, a full disk and a read-only folder, at moments drawn anew each time."""
    rng, expected = rng_of(stage), state(stage, calm / NAMES[stage])
    number = num_replaced(stage, calm, tmp_path)
    slow = stage in ("train", "embed")  # ten times as long as the others
    for name, times in (("kill -9 of the driver", 7), ("SIGTERM", 3), ("disk full", 4), ("read-only", 3)):
        for round_ in range(times // 2 if slow else times):
            out = tmp_path / f"{name}-{round_}".replace(" ", "")
            call = arguments(stage, str(calm), str(out))
            ended = command(call, tmp_path, partial(struck, name, rng.randint(1, number)))
            if ended.how == KILLED:
                assert name == "kill -9 of the driver", ended
            elif ended.how == ERROR:
                last = ended.said.strip().splitlines()[-1]
                assert last.startswith(f"kinema {stage}: ") and ended.status in (1, 2), ended
                assert name in ("SIGTERM", "disk full", "read-only")
            again = command(call, tmp_path)
            assert again.how == DONE, (name, again)
            assert state(stage, out) == expected, (name, ended)
            note("serial", stage, name, f"{ended.how}, then identical")
            shutil.rmtree(out)


@pytest.mark.parametrize("stage", STAGES)
def test_a_clock_that_jumps_changes_nothing(calm, tmp_path, stage):
    for seconds, every in ((31_536_000.0, 3), (-86_400.0, 7)):
        out = tmp_path / f"{every}"
        ended = command(arguments(stage, str(calm), str(out)), tmp_path, partial(jumping_clock, seconds, every))
        assert ended.how == DONE, ended.said
        assert state(stage, out) == state(stage, calm / NAMES[stage])
        note("serial", stage, "clock jumps", "identical")


INPUTS = {"teach": ["clips"], "track": ["clips", "flow"], "embed": ["clips"], "train": ["clips", "flow"]}


@pytest.mark.parametrize("stage", INPUTS)
def test_damaged_inputs_are_told_and_lose_nothing(calm, tmp_path, stage):
    """A tar or table of an input: quarantined or refused in one line; with the input as it was, nothing is missing."""
    expected = state(stage, calm / NAMES[stage])
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for name in ("videos", "clips", "flow", "train"):
        shutil.copytree(calm / name, inputs / name)
    for name in INPUTS[stage]:
        tar = sorted((inputs / name).glob("*.tar"))[1]
        for path in (tar, inputs / name / "samples.parquet"):
            whole = path.read_bytes()
            for kind, damage in DAMAGE.items():
                out = tmp_path / f"out-{name}-{path.suffix}-{kind}".replace(" ", "")
                damage(path)
                call = arguments(stage, str(inputs), str(out))
                ended = command(call, tmp_path)
                told = ended.how == ERROR or "quarantined" in ended.said or state(stage, out) == expected
                told = told or (stage == "train" and "damaged" in ended.said)
                assert told, ended
                path.write_bytes(whole)
                if stage == "train":
                    shutil.rmtree(out, ignore_errors=True)  # it has learned from other samples: another run
                again = command(call, tmp_path)
                assert again.how == DONE and state(stage, out) == expected, (name, path.name, kind, ended, again)
                note("serial", stage, f"{kind} {path.suffix[1:]} of {name}", f"{ended.how}, then identical")


OWN = {"tar": "*.tar", "plan": "_plan.parquet", "rows of a shard": "_commits/*.parquet", "commit": "_commits/*.json"}


@pytest.mark.parametrize("stage", ["shard", "teach", "track", "embed"])
def test_damage_to_what_is_there_already_is_repaired_or_told(calm, tmp_path, stage):
    """Files of the output itself, cut or overwritten between two runs."""
    expected = state(stage, calm / NAMES[stage])
    for what, pattern in OWN.items():
        for kind in ("cut", "wrong magic"):
            out = tmp_path / f"{what}-{kind}".replace(" ", "")
            shutil.copytree(calm / NAMES[stage], out)
            DAMAGE[kind](sorted(out.glob(pattern))[0])
            ended = command(arguments(stage, str(calm), str(out)), tmp_path)
            repaired = ended.how == DONE and state(stage, out) == expected
            if not repaired:
                seen = command(["verify", str(out)], tmp_path)
                assert ended.how == ERROR or seen.how == ERROR, (what, kind, ended, seen)
            note("serial", stage, f"{kind} {what}", "repaired, identical" if repaired else "clear error")


STORE_FAULTS = ("500", "503", "cut", "lost")


@pytest.mark.parametrize("stage", ["shard", "teach", "track", "embed"])
def test_an_object_store_that_fails_now_and_then(calm, tmp_path, stage):
    rng = rng_of(stage)
    with s3_server() as faults:
        files = fsspec.filesystem("s3")
        for name in ("videos", "clips", "flow"):
            files.put(f"{calm / name}/", f"kinema/{name}/", recursive=True)
        for round_ in range(4):
            out, chosen = f"s3://kinema/{stage}-{round_}", [rng.choice(STORE_FAULTS) for _ in range(3)]
            for fault in chosen:
                where = r"^(GET|HEAD) " if fault == "cut" else r"^(GET|HEAD|PUT) "
                faults.add(fault, where=f"{where}.*{rng.choice(['', stage, '_commits', 'tar'])}")
            call = arguments(stage, "s3://kinema", out)
            if stage == "embed":
                call = [text.replace("model=s3://kinema/train", f"model={calm}/train") for text in call]
            ended = command(call, tmp_path)
            left = len(faults.queue)
            faults.queue.clear()
            if ended.how != DONE:
                ended_again = command(call, tmp_path)
                assert ended_again.how == DONE, (chosen, ended, ended_again)
            files.invalidate_cache()
            copy = tmp_path / f"{round_}"
            files.get(f"kinema/{stage}-{round_}/", f"{copy}/", recursive=True)
            assert but_for_scans(tree(copy)) == but_for_scans(tree(calm / NAMES[stage])), (chosen, ended)
            note("serial", stage, "object store: 500, 503, cut, lost", f"{ended.how}, identical", 3 - left)


def test_gradients_that_are_nan_end_the_training_and_spoil_nothing(calm, tmp_path):
    """From a step on every gradient is NaN; the checkpoint before it stays, and the run goes on from there."""
    for step in (1, 3, 4):
        out = tmp_path / str(step)
        call = arguments("train", str(calm), str(out))
        ended = command(call, tmp_path, partial(poisoned, step))
        assert ended.how == ERROR and f"gradient norm is nan at step {step - 1}" in ended.said, ended.said
        assert command(call, tmp_path).how == DONE
        assert state("train", out) == state("train", calm / "train")
        note("serial", "train", "NaN gradients", "clear error, then identical")
