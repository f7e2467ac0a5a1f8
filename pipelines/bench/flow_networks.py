"""A pair of frames through each flow network on the CPU: processor seconds and peak memory, each in a fresh process."""

from __future__ import annotations

from typing import Any

from kinema.pipelines.teach import facts_of
from kinema.pipelines.teach.cost import PairCost, pair_cost

SIZES = ((448, 448), (1080, 1920))
NETWORKS = ("raft", "sea_raft_m", "waft", "alltracker")


def run(sizes: tuple[tuple[int, int], ...] = SIZES, networks: tuple[str, ...] = NETWORKS) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}: each network, refined as a teacher, against the first."""
    rows = []
    for height, width in sizes:
        baseline: PairCost | None = None
        for name in networks:
            cost = pair_cost(name, height, width, facts_of(name).iters)
            baseline = baseline or cost
            label = f"{name} {height}x{width}, one pair"
            rows.append(_row(f"{label}, processor time", cost.cpu_s, baseline.cpu_s, f"s, against {networks[0]}"))
            memory = f"{label}, peak memory of the process"
            rows.append(_row(memory, cost.peak_gib, baseline.peak_gib, f"GiB, against {networks[0]}"))
    return rows


def _row(name: str, value: float, baseline: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "baseline": baseline, "ratio": baseline / value, "unit": unit}
