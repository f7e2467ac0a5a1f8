"""`kinema status OUT`: how far an artifact or a run is, how fast, how long yet, and what it costs.

Everything is read from the folder or bucket itself, so it works from any machine and while the stage is running.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.artifacts.layout import COMMITS, RUN_FILE
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.meter import PROGRESS_FILE, read_metrics

RATE_OVER_S = 900.0
"""The rate is that of the last quarter of an hour of work."""


@dataclass(frozen=True)
class Cost:
    """Dollars at a price for each node and hour."""

    price_per_node_hour: float
    nodes: int

    def of(self, seconds: float) -> float:
        """Dollars for so long."""
        return round(seconds / 3600 * self.price_per_node_hour * self.nodes, 2)


def status(target: str, cost: Cost | None = None, now: float | None = None) -> dict[str, Any]:
    """What `kinema status` prints.

    Args: cost, of the nodes at work; now, seconds since 1970.
    Raises: ValueError when there is neither an artifact nor a run.
    """
    now = time.time() if now is None else now
    if "://" not in target and (Path(target) / RUN_FILE).is_file():
        found, began, ended = _run(Path(target), now)
    else:
        found, began, ended = _artifact(Artifact.read(target), now)
    if cost is not None:
        worked_s = max(0.0, (now if ended is None else ended) - began) if began is not None else 0.0
        eta_s = found["eta_s"]
        total = None if eta_s is None else cost.of(worked_s + eta_s)
        found |= {"cost_so_far": cost.of(worked_s), "cost_in_all": total, **asdict(cost)}
    return found


def _artifact(artifact: Artifact, now: float) -> tuple[dict[str, Any], float | None, float | None]:
    """The fields, and when work began and ended (None: has not)."""
    planned, commits = artifact.planned_shards(), artifact.commits()
    counts = pc.value_counts(artifact.plan["shard"])
    left = {one["values"]: one["counts"] for one in counts.to_pylist() if one["values"] not in commits}
    bad = artifact.quarantined()
    for shard, key in set(zip(bad["shard"].to_pylist(), bad["key"].to_pylist(), strict=True)):
        if shard in left and key is not None:
            left[shard] -= 1
    failed = [shard for shard, number in left.items() if number <= 0]
    times = artifact.store.times(COMMITS)
    done = sorted((times.get(f"{shard:06d}.json", now), record["num_samples"]) for shard, record in commits.items())
    clips, all_clips = sum(number for _, number in done), artifact.plan.num_rows
    finished = len(commits) + len(failed) == len(planned) and bool(planned)
    began = done[0][0] if done else None
    rate = _rate(done, done[-1][0] if finished and done else now)
    waiting = sum(max(0, number) for number in left.values())
    eta_s = 0.0 if finished else waiting / rate if rate else None
    fields = {
        "what": artifact.kind,
        "where": artifact.url,
        "shards": len(planned),
        "done": len(commits),
        "failed": len(failed),
        "in_flight": artifact.store.num_building(".tar"),
        "clips": clips,
        "clips_planned": all_clips,
        "quarantined": bad.num_rows,
        "clips_per_second": round(rate, 3),
        "eta_s": None if eta_s is None else round(eta_s, 1),
    }
    return fields, began, done[-1][0] if finished and done else None


def _rate(done: list[tuple[float, int]], until: float) -> float:
    """Clips per second of the commits (time, clips) of the last RATE_OVER_S; 0 with fewer than two commits.

    The clips of the first commit were made before its time, so they count for nothing.
    """
    recent = [entry for entry in done if entry[0] >= until - RATE_OVER_S]
    if len(recent) < 2:
        return 0.0
    seconds = max(until, recent[-1][0]) - recent[0][0]
    return sum(number for _, number in recent[1:]) / seconds if seconds > 0 else 0.0


def _run(folder: Path, now: float) -> tuple[dict[str, Any], float | None, float | None]:
    config = json.loads((folder / RUN_FILE).read_text())["config"]
    points, newest = read_metrics(folder), checkpoint.latest_checkpoint(folder)
    step = points[-1]["step"] if points else 0
    running = folder / PROGRESS_FILE
    if running.is_file():
        step = max(step, json.loads(running.read_text())["step"])
    rate = float(points[-1].get("samples_per_second", math.nan)) if points else math.nan
    left = max(0, config["steps"] - step) * config["batch_size"]
    eta_s = 0.0 if not left else left / rate if rate > 0 else None
    fields = {
        "what": "run",
        "where": str(folder),
        "step": step,
        "steps": config["steps"],
        "running": running.is_file(),
        "loss": points[-1]["loss"] if points else None,
        "samples_per_second": rate,
        "checkpoint": "" if newest is None else newest.name,
        "eta_s": None if eta_s is None else round(eta_s, 1),
    }
    began = (folder / RUN_FILE).stat().st_mtime
    ended = None if running.is_file() or newest is None else (newest / checkpoint.META_FILE).stat().st_mtime
    return fields, began, ended
