"""`kinema status`: counts, rate, time left and cost, from folders and buckets, while the work goes on."""

import json
import os

import pyarrow as pa
import pytest

from kinema.pipelines import cli
from kinema.pipelines.artifacts import Artifact, sample_key
from kinema.pipelines.status import Cost, status

SHARDS, CLIPS = 5, 3


def begin(url: str) -> Artifact:
    """Five planned shards of three clips."""
    artifact = Artifact.open(url, kind="clips", config={})
    names = [(shard, f"{shard}-{place}") for shard in range(SHARDS) for place in range(CLIPS)]
    columns = {"shard": pa.array([s for s, _ in names], pa.int32()), "key": [sample_key(n) for _, n in names]}
    artifact.append_plan(pa.table({**columns, "source": [n for _, n in names]}))
    return artifact


def build(artifact: Artifact, shard: int, drop: int = 0) -> None:
    with artifact.shard_writer(shard) as writer:
        for place, key in enumerate(writer.planned):
            if place < drop:
                writer.quarantine(key, stage="shard", error_class="Corrupt", message="bad")
            else:
                writer.add(key, {"bin": b"x"}, {})
        writer.commit()


def fail(artifact: Artifact, shard: int) -> None:
    rows = artifact.plan_of(shard).select(["source", "key"]).to_pylist()
    artifact.quarantine(
        {**row, "stage": "shard", "error_class": "WorkerCrashed", "message": "m", "shard": shard} for row in rows
    )


def test_counts_rate_eta_and_cost_of_work_that_goes_on(tmp_path):
    artifact = begin(str(tmp_path / "clips"))
    assert status(artifact.url)["eta_s"] is None
    for shard, second in ((0, 1000.0), (1, 1010.0), (2, 1030.0)):
        build(artifact, shard, drop=shard == 2)
        os.utime(tmp_path / "clips" / "_commits" / f"{shard:06d}.json", (second, second))
    fail(artifact, 3)
    with artifact.shard_writer(4):
        found = status(artifact.url, Cost(price_per_node_hour=3.6, nodes=10), now=1050.0)
    assert (found["shards"], found["done"], found["failed"], found["in_flight"]) == (5, 3, 1, 1)
    assert (found["clips"], found["clips_planned"], found["quarantined"]) == (8, 15, 4)
    # Two commits of 3 and 2 clips within the 50 s since the first; three clips are left.
    assert found["clips_per_second"] == pytest.approx(5 / 50) and found["eta_s"] == pytest.approx(30)
    assert found["cost_so_far"] == pytest.approx(50 / 3600 * 36, abs=0.01)
    assert found["cost_in_all"] == pytest.approx(80 / 3600 * 36, abs=0.01)
    build(artifact, 4)
    os.utime(tmp_path / "clips" / "_commits" / "000004.json", (1100.0, 1100.0))
    ended = status(artifact.url, Cost(3.6, 10), now=9000.0)
    assert ended["eta_s"] == 0 and ended["cost_so_far"] == ended["cost_in_all"] == 1.0


def test_in_an_object_store_what_others_build_is_not_seen():
    artifact = begin("memory://status/clips")
    build(artifact, 0)
    found = status(artifact.url)
    assert (found["done"], found["in_flight"], found["clips"]) == (1, None, 3)


def test_a_run_and_the_command_line(tmp_path, capfd):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"steps": 100, "batch_size": 4}}))
    point = {"step": 20, "loss": 0.5, "samples_per_second": 8.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(point) + "\n")
    (tmp_path / "progress.json").write_text(json.dumps({"step": 30, "loss": 0.4}))
    assert cli.main(["status", str(tmp_path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (found["step"], found["steps"], found["running"], found["eta_s"]) == (30, 100, True, 35.0)
    assert cli.main(["status", str(tmp_path / "nothing")]) == 2
    assert "holds no artifact" in capfd.readouterr().err
