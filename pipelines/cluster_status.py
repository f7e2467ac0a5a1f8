"""`kinema status http://HEAD:8265`: nodes of a running cluster, our jobs on it, how far they are, what they cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kinema.configs.prices import PricesConfig
from kinema.pipelines.errors import StageError, one_line
from kinema.pipelines.status import status

_RUNNING, _LIMIT = ("PENDING", "RUNNING"), 10_000
_SHOWN_ENDED = 5
"""So many jobs that have ended are shown, the newest."""


@dataclass(frozen=True)
class Node:
    """One node's life, in seconds since 1970."""

    resources: dict[str, float]
    began: float
    ended: float | None
    """None: it is alive."""

    def seconds_in(self, began: float, ended: float) -> float:
        """How long it lived between two times."""
        return max(0.0, min(ended, self.ended or ended) - max(began, self.began))


def price_of(prices: PricesConfig, resources: dict[str, float]) -> float:
    """Dollars for an hour of a node with these resources of Ray's."""
    if resources.get("GPU", 0) > 0:
        return prices.gpu_node
    return prices.cpu_node if resources.get("CPU", 0) > 0 else prices.head


def cost(nodes: Sequence[Node], prices: PricesConfig, began: float, ended: float) -> float:
    """Dollars of all nodes between two times, lost ones as long as they lived."""
    return sum(node.seconds_in(began, ended) / 3600 * price_of(prices, node.resources) for node in nodes)


def cluster_status(address: str, prices: PricesConfig, now: float | None = None) -> dict[str, Any]:
    """What `kinema status ADDRESS` prints: nodes, and by job of ours its stage, figures of its output, cost.

    Raises: StageError when no job server answers.
    """
    from ray.job_submission import JobSubmissionClient

    now = time.time() if now is None else now
    try:
        client = JobSubmissionClient(address)
        nodes = _nodes(client)
        jobs = [job for job in client.list_jobs() if (job.metadata or {}).get("stage")]
    except (ConnectionError, RuntimeError) as error:
        raise StageError(f"no Ray job server answers at {address}: {one_line(error)[:200]}") from None
    alive = [node for node in nodes if node.ended is None]
    began = min((node.began for node in nodes), default=now)
    found: dict[str, Any] = {
        "what": "cluster",
        "where": address,
        "nodes": len(alive),
        "nodes_lost": len(nodes) - len(alive),
        "cpus": sum(node.resources.get("CPU", 0) for node in alive),
        "gpus": sum(node.resources.get("GPU", 0) for node in alive),
        **_use(client),
        "cost_per_hour": round(sum(price_of(prices, node.resources) for node in alive), 4),
        "cost_so_far": round(cost(nodes, prices, began, now), 4),
    }
    jobs.sort(key=lambda job: (str(job.status.value) in _RUNNING, job.start_time or 0), reverse=True)
    running = sum(job.status.value in _RUNNING for job in jobs)
    shown = {job.submission_id: _job(client, job, nodes, prices, now) for job in jobs[: running + _SHOWN_ENDED]}
    return found | {"jobs": shown}


def _job(client: Any, job: Any, nodes: Sequence[Node], prices: PricesConfig, now: float) -> dict[str, Any]:
    stage, out = job.metadata["stage"], job.metadata.get("out", "")
    began = (job.start_time or now * 1000) / 1000
    ended = now if job.status.value in _RUNNING else (job.end_time or now * 1000) / 1000
    found: dict[str, Any] = {"stage": stage, "status": job.status.value, "out": out, "seconds": round(ended - began, 1)}
    try:
        figures = status(out, now=now) if out else {}
    except (ValueError, StageError, OSError) as error:  # not begun, or a folder that only the cluster sees
        figures = {"note": one_line(error)[:200]}
    found |= {name: value for name, value in figures.items() if name not in ("what", "where")}
    if job.status.value in _RUNNING and found.get("in_flight") is None and job.job_id:
        found["in_flight"] = _num_running(client, job.job_id)
    found["cost_so_far"] = round(cost(nodes, prices, began, ended), 4)
    eta_s = found.get("eta_s") if job.status.value in _RUNNING else 0.0
    per_hour = sum(price_of(prices, node.resources) for node in nodes if node.ended is None)
    found["cost_in_all"] = None if eta_s is None else round(found["cost_so_far"] + eta_s / 3600 * per_hour, 4)
    return found


def _nodes(client: Any) -> list[Node]:
    rows = _listed(client, f"/api/v0/nodes?detail=1&limit={_LIMIT}")
    return [
        Node(
            row.get("resources_total") or {},
            (row.get("start_time_ms") or 0) / 1000,
            None if row["state"] == "ALIVE" else (row.get("end_time_ms") or 0) / 1000,
        )
        for row in rows
    ]


def _num_running(client: Any, job_id: str) -> int:
    """Tasks of a job that are being worked on."""
    filters = f"filter_keys=job_id&filter_predicates=%3D&filter_values={job_id}"
    filters += "&filter_keys=state&filter_predicates=%3D&filter_values=RUNNING"
    return len(_listed(client, f"/api/v0/tasks?limit={_LIMIT}&{filters}"))


def _use(client: Any) -> dict[str, float | None]:
    """What of the processors and GPUs tasks hold, by Ray's accounts, and how busy the GPUs are, in percent, by the
    nodes' own agents; null for what nobody reports (yet)."""
    status = _answer(client, "/api/cluster_status").get("clusterStatus") or {}
    held = (status.get("loadMetricsReport") or {}).get("usage") or {}
    nodes = _answer(client, "/nodes?view=summary").get("summary") or []
    percents = [gpu.get("utilizationGpu") for node in nodes for gpu in node.get("gpus") or []]
    busy = [percent for percent in percents if percent is not None]
    return {
        "cpus_in_use": held["CPU"][0] if "CPU" in held else None,
        "gpus_in_use": held["GPU"][0] if "GPU" in held else None,
        "gpu_percent": round(sum(busy) / len(busy), 1) if busy else None,
    }


def _listed(client: Any, path: str) -> list[dict[str, Any]]:
    """Rows of Ray's state API."""
    return _answer(client, path)["result"]["result"]


def _answer(client: Any, path: str) -> dict[str, Any]:
    """What the head says, asked with the job client's own credentials."""
    answer = client._do_request("GET", path)
    if answer.status_code != 200:
        raise RuntimeError(f"{path.partition('?')[0]} answers {answer.status_code}: {answer.text[:200]}")
    return answer.json()["data"]
