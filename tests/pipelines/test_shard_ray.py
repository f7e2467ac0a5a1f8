"""The stage on Ray: a decoder that crashes or hangs costs its video, not the run."""

import os
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from kinema.configs import ClipConfig, ShardConfig
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.shard import build, run, scan, stage

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import numbered


@pytest.fixture(autouse=True)
def workers_have_this_module(ray_session):
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def scan_or_die(task: scan.ScanTask) -> tuple[str, str]:
    if task.source.id == "bomb.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    return scan.scan_task(task)


def scan_or_hang(task: scan.ScanTask) -> tuple[str, str]:
    if task.source.id == "hang.mp4":
        scan.stall_watch(task.stall_s)()
        time.sleep(600)
    return scan.scan_task(task)


def build_or_die(task: build.BuildTask) -> build.Built:
    if any(row["source"] == "b.mp4" and row["source"] not in task.excluded for row in task.rows):
        os.kill(os.getpid(), signal.SIGSEGV)
    return build.build_shard(task)


def try_or_die(task: build.BuildTask) -> None:
    if any(row["source"] == "b.mp4" for row in task.rows):
        os.kill(os.getpid(), signal.SIGSEGV)
    build.try_source(task)


def shard(tmp_path: Path, **settings):
    clip = ClipConfig(seconds=1, preset="ultrafast")
    config = ShardConfig(videos=str(tmp_path / "v"), out=str(tmp_path / "out"), clip=clip, **settings)
    return run(config, report=lambda line: None)


def quarantine(tmp_path: Path) -> list[tuple]:
    rows = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    return [(row["source"], row["stage"], row["error_class"], row["attempts"]) for row in rows]


def test_a_crash_while_scanning_costs_that_video(tmp_path, monkeypatch):
    for index, name in enumerate(("a.mp4", "bomb.mp4", "c.mp4")):
        numbered(tmp_path / "v" / name, 30, seed=index)
    monkeypatch.setattr(stage, "scan_task", scan_or_die)
    summary = shard(tmp_path)
    assert (summary.sources, summary.clips, summary.quarantined) == (3, 4, 1)
    assert quarantine(tmp_path) == [("bomb.mp4", "scan", "WorkerCrashed", 3)]
    monkeypatch.undo()
    assert shard(tmp_path).quarantined == 0, "the next run tries again"
    assert Artifact.read(tmp_path / "out").samples().num_rows == 6


def test_a_crash_while_building_costs_that_video(tmp_path, monkeypatch):
    for index, name in enumerate(("a.mp4", "b.mp4", "c.mp4")):
        numbered(tmp_path / "v" / name, 30, seed=index)
    monkeypatch.setattr(stage, "build_shard", build_or_die)
    monkeypatch.setattr(stage, "try_source", try_or_die)
    summary = shard(tmp_path, min_shards=1)
    artifact = Artifact.read(tmp_path / "out")
    assert (summary.shards, summary.clips, summary.quarantined) == (1, 4, 1)
    assert set(artifact.samples()["source"].to_pylist()) == {"a.mp4", "c.mp4"}
    assert {row[:3] for row in quarantine(tmp_path)} == {("b.mp4", "build", "WorkerCrashed")}
    assert artifact.verify() == []


@pytest.mark.slow
def test_a_decoder_that_hangs_is_stopped(tmp_path, monkeypatch):
    for index, name in enumerate(("a.mp4", "hang.mp4")):
        numbered(tmp_path / "v" / name, 30, seed=index)
    monkeypatch.setattr(stage, "scan_task", scan_or_hang)
    summary = shard(tmp_path, source_timeout_s=5.0)
    assert (summary.clips, summary.quarantined) == (2, 1)
    assert quarantine(tmp_path) == [("hang.mp4", "scan", "Timeout", 3)]
