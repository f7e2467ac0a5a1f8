"""The simulated cluster against arithmetic."""

import math
from dataclasses import replace

import pytest

from kinema.pipelines.bench.cluster import ClusterBenchConfig, lines, simulate

STILL = ClusterBenchConfig(
    items=6400, cpu_s=10.0, spread=0.0, read_mb=0.0, written_mb=0.0, requests=0.0, slots=8, node_start_s=0.0,
    lost_every_h=0.0, dispatch_s=0.0, node_price=3.6,
)  # fmt: skip


def test_without_limits_time_falls_with_the_nodes_and_money_stays():
    one, ten = simulate(STILL, 1), simulate(STILL, 10)
    assert one.wall_s == pytest.approx(6400 * 10 / 8) and ten.wall_s == pytest.approx(one.wall_s / 10)
    assert one.efficiency == ten.efficiency == pytest.approx(1.0)
    assert one.dollars == ten.dollars == pytest.approx(one.wall_s / 1000)


def test_each_limit_binds_at_its_own_rate():
    wall = {name: simulate(replace(STILL, **changes), 100).wall_s for name, changes in {
        "driver": {"dispatch_s": 0.05},
        "store": {"requests": 10.0, "latency_s": 0.0, "store_requests_per_s": 100.0},
        "latency": {"requests": 20.0, "latency_s": 0.5, "store_requests_per_s": 0.0},
        "bandwidth": {"read_mb": 30.0, "node_mb_per_s": 24.0},
    }.items()}  # fmt: skip
    assert wall["driver"] == pytest.approx(6400 * 0.05 + 10, rel=0.01)
    assert wall["store"] == pytest.approx(6400 * 10 / 100, rel=0.02)
    assert wall["latency"] == pytest.approx(8 * 20)
    assert wall["bandwidth"] == pytest.approx(8 * (10 + 30 * 8 / 24))


def test_lost_nodes_cost_what_the_exponential_law_says():
    """An item of c seconds on a node lost at rate r needs (exp(r c) - 1) / r seconds on average, and waits besides."""
    config = replace(STILL, items=20_000, slots=1, cpu_s=600.0, lost_every_h=1.0, node_start_s=0.0)
    found = simulate(config, 20)
    per_item = math.expm1(600 / 3600) * 3600
    assert found.wall_s * 20 / 20_000 == pytest.approx(per_item, rel=0.03)
    assert found.efficiency == pytest.approx(600 / per_item, rel=0.03)
    assert found.repeated == pytest.approx(20_000 * math.expm1(600 / 3600), rel=0.05)
    waiting = simulate(replace(config, node_start_s=300.0), 20)
    assert waiting.wall_s == pytest.approx(found.wall_s * (1 + 300 / 3600), rel=0.03)


def test_the_table_has_a_row_for_each_number_of_nodes():
    text = list(lines(replace(STILL, nodes=(1, 4))))
    assert [row.split("|")[1].strip() for row in text[3:]] == ["1", "4"] and "100 %" in text[3]
