"""`kinema status ADDRESS`: our jobs of a cluster, their figures and dollars; the same for Prometheus and listeners."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kinema.configs import PricesConfig
from kinema.pipelines import cli, figures
from kinema.pipelines.cluster_status import Node, cluster_status, cost
from kinema.pipelines.progress import Progress

sys.path.insert(0, str(Path(__file__).parent))
from test_status import begin, build
from test_submit import NO_NAMESPACE, SUBMIT, on_a_head, two_films

PRICES = PricesConfig(cpu_node=3.6, gpu_node=36.0, head=0.36)
HOUR = 3600.0
# Ray's own client starts a job that holds a GPU.
HOLD = ["ray", "--no-wait", "--", "python", "-c"]


def test_cost_counts_every_node_for_as_long_as_it_lived():
    nodes = [
        Node({}, 0.0, None),
        Node({"CPU": 4.0}, 0.0, None),
        Node({"CPU": 8.0, "GPU": 1.0}, HOUR, 1.5 * HOUR),  # a spot machine that was taken away
    ]
    assert cost(nodes, PRICES, 0.0, 2 * HOUR) == pytest.approx(2 * 0.36 + 2 * 3.6 + 0.5 * 36)
    assert cost(nodes, PRICES, 1.25 * HOUR, 1.4 * HOUR) == pytest.approx(0.15 * (0.36 + 3.6 + 36))
    with pytest.raises(ValueError, match="prices.head=-1 is out of range"):
        PricesConfig(head=-1)


class Cluster:
    """A job server with one job of ours that runs, one that is done, and one of somebody else's."""

    def __init__(self, address: str):
        assert address == "http://head:8265"

    def list_jobs(self):
        def job(name, status, began, ended, **metadata):
            state = SimpleNamespace(value=status)
            times = {"start_time": began * 1000, "end_time": ended and ended * 1000}
            return SimpleNamespace(submission_id=name, job_id="01", status=state, metadata=metadata, **times)

        out = self.out
        running = job("r", "RUNNING", 1000, None, stage="shard", out=out)
        return [
            job("d", "SUCCEEDED", 100, 900, stage="teach", out=f"{out}-gone"),
            running,
            job("x", "RUNNING", 1, None),
        ]

    def _do_request(self, method: str, path: str):
        rows = [
            {"state": "ALIVE", "resources_total": {}, "start_time_ms": 0},
            {"state": "ALIVE", "resources_total": {"CPU": 4.0}, "start_time_ms": 0},
            {"state": "DEAD", "resources_total": {"CPU": 4.0}, "start_time_ms": 0, "end_time_ms": 1_030_000},
        ]
        data = {"result": {"result": rows if "nodes" in path else [{}, {}, {}]}}
        if path == "/api/cluster_status":
            data = {"clusterStatus": {"loadMetricsReport": {"usage": {"CPU": [3.0, 4.0], "GPU": [1.0, 2.0]}}}}
        if path.startswith("/nodes"):
            gpus = [{"utilizationGpu": 80}, {"utilizationGpu": 41}, {"utilizationGpu": None}]
            data = {"summary": [{"gpus": gpus}, {"gpus": []}, {}]}
        answer = {"data": data}
        return SimpleNamespace(status_code=200, json=lambda: answer, text="")


def test_jobs_of_ours_with_figures_and_cost(tmp_path, monkeypatch, capfd):
    import os

    import ray.job_submission

    artifact = begin(str(tmp_path / "clips"))
    for shard, second in ((0, 1000.0), (1, 1010.0), (2, 1030.0)):
        build(artifact, shard)
        os.utime(tmp_path / "clips" / "_commits" / f"{shard:06d}.json", (second, second))
    Cluster.out = artifact.url
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Cluster)
    found = cluster_status("http://head:8265", PRICES, now=1060.0)
    assert (found["nodes"], found["nodes_lost"], found["cpus"]) == (2, 1, 4.0)
    assert (found["cpus_in_use"], found["gpus_in_use"], found["gpu_percent"]) == (3.0, 1.0, 60.5)
    assert found["cost_so_far"] == pytest.approx((1060 * 3.96 + 1030 * 3.6) / HOUR, abs=1e-4)
    assert list(found["jobs"]) == ["r", "d"], "the one that runs first, others' jobs not at all"
    job = found["jobs"]["r"]
    assert (job["stage"], job["shards"], job["done"], job["failed"], job["in_flight"]) == ("shard", 5, 3, 0, 0)
    assert job["clips_per_second"] == pytest.approx(0.1) and job["eta_s"] == pytest.approx(60.0)
    assert job["cost_so_far"] == pytest.approx((60 * 3.96 + 30 * 3.6) / HOUR, abs=1e-4)
    assert job["cost_in_all"] == pytest.approx(job["cost_so_far"] + 60 * 3.96 / HOUR, abs=1e-4)
    assert "holds no artifact" in found["jobs"]["d"]["note"]
    (tmp_path / "prices.yaml").write_text("prices: {cpu_node: 3.6}")
    assert cli.main(["status", "http://head:8265", "--config", str(tmp_path / "prices.yaml"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["cost_per_hour"] == 3.6


def test_progress_is_told_to_listeners(capsys):
    told = []
    with figures.told_to(told.append):
        progress = Progress("teach", 10, "clips", every_s=0.0)
        progress.started -= 5.0
        progress.update(0)
        progress.update(4)
    progress.update(5)
    assert [(one.stage, one.done, one.total) for one in told] == [("teach", 0, 10), ("teach", 4, 10)]
    assert "eta_seconds" not in told[0].numbers()
    assert told[1].per_second == pytest.approx(0.8, rel=0.05) and told[1].eta_s == pytest.approx(7.5, rel=0.05)


@NO_NAMESPACE
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_head_shows_the_job_and_prometheus_the_figures(tmp_path):
    two_films(tmp_path / "videos")
    out = str(tmp_path / "clips")
    (tmp_path / "prices.yaml").write_text("prices: {gpu_node: 3600}")
    status = ["until", '"gpus_in_use": 1.0', "status", SUBMIT[2], "--config", str(tmp_path / "prices.yaml"), "--json"]
    shard = ["kinema", *SUBMIT, "shard", f"videos={tmp_path / 'videos'}", f"out={out}"]
    hold = [*HOLD, "import ray, time; ray.init(); ray.get(ray.remote(num_gpus=1)(lambda: time.sleep(90)).remote())"]
    commands = [shard, ["metrics", "ray_kinema_items"], hold, status]
    done, metrics, _, found = on_a_head(commands, tmp_path, 500, num_gpus=2)
    assert done["status"] == 0, done["err"][-2000:]
    assert found["status"] == 0, found["err"][-2000:]
    cluster = json.loads(found["out"])
    (job,) = cluster["jobs"].values()
    assert (job["stage"], job["status"], job["out"]) == ("shard", "SUCCEEDED", out)
    assert job["done"] == job["shards"] == 2 and job["clips"] == 2 and job["failed"] == 0
    assert (cluster["gpus"], cluster["gpus_in_use"], cluster["gpu_percent"]) == (2, 1, None), "Ray's accounts only"
    assert cluster["nodes"] == 1 and cluster["cpus"] == 3 and cluster["cost_per_hour"] == 3600
    assert job["cost_so_far"] == job["cost_in_all"] == pytest.approx(job["seconds"], rel=0.2)
    assert 'stage="shard"' in metrics["out"] or 'stage="scan"' in metrics["out"], metrics
