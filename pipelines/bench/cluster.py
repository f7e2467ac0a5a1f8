"""How long, how well used and how dear a stage is on N nodes: `python -m kinema.pipelines.bench.cluster key=value ...`

A simulation of what decides that at scale: items of measured cost on the slots of nodes, spot machines that are taken
away and replaced, a driver that hands out one task after another, an object store with a latency, a rate of requests
that it takes, and a bandwidth for each node. What a lost node was working on is done again by others.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kinema.configs.checks import require
from kinema.configs.load import build


@dataclass(frozen=True)
class ClusterBenchConfig:
    """The work, the nodes and the store. Costs are those of one core; measure them with the stage's own summary."""

    items: int = 1_000_000
    """Videos or shards."""
    cpu_s: float = 12.0
    """Processor seconds of an item."""
    spread: float = 0.5
    """Standard deviation of an item's cost over its mean (costs are log-normal)."""
    read_mb: float = 5.0
    """Read from the store for an item."""
    written_mb: float = 3.0
    """Written to it."""
    requests: float = 12.0
    """Requests to it for an item, one after the other."""
    nodes: tuple[int, ...] = (1, 2, 16, 64, 256)
    """Numbers of nodes that are compared."""
    slots: int = 32
    """Tasks at once on a node."""
    node_price: float = 0.60
    """Dollars for a node and hour."""
    node_start_s: float = 120.0
    """From the request for a node to its first task."""
    lost_every_h: float = 24.0
    """Mean hours until a node is taken away; 0: never."""
    dispatch_s: float = 0.002
    """Driver's time for a task."""
    latency_s: float = 0.03
    """Of a request."""
    store_requests_per_s: float = 5000.0
    """Requests the store takes from all nodes together; 0: any number."""
    node_mb_per_s: float = 1000.0
    """A node's bandwidth, shared by its slots."""
    seed: int = 0
    """Of costs and losses."""

    def __post_init__(self) -> None:
        for name in ("items", "cpu_s", "slots", "node_mb_per_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "use a positive number")
        require(bool(self.nodes) and min(self.nodes) > 0, "nodes", self.nodes, "use positive numbers, as in [1,16]")


@dataclass(frozen=True)
class Outcome:
    """What a number of nodes comes to."""

    nodes: int
    wall_s: float
    efficiency: float
    """Processor seconds of items that counted, over what was paid for."""
    dollars: float
    nodes_lost: int
    repeated: int
    """Items begun again because their node was lost."""


class _Nodes:
    """Slots by the time they are free; a lost node's come back with its replacement."""

    def __init__(self, config: ClusterBenchConfig, number: int, rng: random.Random):
        self.config, self.rng = config, rng
        self.dies_at = [self._death(config.node_start_s) for _ in range(number)]
        self.generation = [0] * number
        self.free = [(config.node_start_s, node, 0) for node in range(number) for _ in range(config.slots)]
        heapq.heapify(self.free)
        self.lost = 0

    def _death(self, now: float) -> float:
        hours = self.config.lost_every_h
        return now + self.rng.expovariate(1 / (hours * 3600)) if hours else math.inf

    def take(self) -> tuple[float, int]:
        """The next free slot: when, and on which node."""
        while True:
            at, node, generation = heapq.heappop(self.free)
            if generation < self.generation[node]:
                continue  # its node is gone, and the replacement has slots of its own
            if self.dies_at[node] <= at:
                self.lose(node)
                continue
            return at, node

    def lose(self, node: int) -> None:
        """The node is gone at its time; another one begins."""
        begins = self.dies_at[node] + self.config.node_start_s
        self.lost += 1
        self.generation[node] += 1
        self.dies_at[node] = self._death(begins)
        for _ in range(self.config.slots):
            heapq.heappush(self.free, (begins, node, self.generation[node]))

    def give_back(self, at: float, node: int) -> None:
        """A slot is free again."""
        heapq.heappush(self.free, (at, node, self.generation[node]))


def simulate(config: ClusterBenchConfig, number: int) -> Outcome:
    """Run all items on `number` nodes."""
    rng = random.Random(config.seed)
    nodes = _Nodes(config, number, random.Random(config.seed + 1))
    sigma = math.sqrt(math.log1p(config.spread**2))
    moved_s = (config.read_mb + config.written_mb) * config.slots / config.node_mb_per_s
    store_s = config.requests / config.store_requests_per_s if config.store_requests_per_s else 0.0
    again: list[tuple[float, float]] = []  # (when its node was lost, cost) of items to be done again
    useful, wall, driver_free, store_free, repeated, begun = 0.0, 0.0, 0.0, 0.0, 0, 0
    while begun < config.items or again:
        at, node = nodes.take()
        if again and (again[0][0] <= at or begun == config.items):
            lost_at, cost = heapq.heappop(again)
            at = max(at, lost_at)
        else:
            cost = config.cpu_s * math.exp(rng.gauss(-sigma * sigma / 2, sigma))
            begun += 1
        driver_free = max(driver_free, at) + config.dispatch_s
        store_free = max(store_free, driver_free) + store_s
        ends = max(driver_free + cost + moved_s + config.requests * config.latency_s, store_free)
        if nodes.dies_at[node] < ends:
            heapq.heappush(again, (nodes.dies_at[node], cost))
            repeated += 1
            nodes.give_back(nodes.dies_at[node], node)  # take() replaces the node then
            continue
        nodes.give_back(ends, node)
        useful, wall = useful + cost, max(wall, ends)
    paid_s = wall * number
    dollars = paid_s / 3600 * config.node_price
    return Outcome(number, wall, useful / (paid_s * config.slots), dollars, nodes.lost, repeated)


def lines(config: ClusterBenchConfig) -> Iterator[str]:
    """A table, a row for each number of nodes."""
    yield f"{config.items:,} items of {config.cpu_s:g} s on nodes of {config.slots} slots"
    yield "| nodes | wall time | efficiency | dollars | nodes lost | items repeated |"
    yield "|---|---|---|---|---|---|"
    for number in config.nodes:
        found = simulate(config, number)
        hours = found.wall_s / 3600
        took = f"{hours:.1f} h" if hours >= 1 else f"{found.wall_s:.0f} s"
        share = f"{100 * found.efficiency:.0f} %"
        yield f"| {number} | {took} | {share} | {found.dollars:,.2f} | {found.nodes_lost} | {found.repeated} |"


def one_core_each(config: ClusterBenchConfig, cpu_s: float, items: int) -> ClusterBenchConfig:
    """The settings of nodes with one slot that are there and stay, for a comparison with what was measured."""
    still = replace(config, node_start_s=0.0, lost_every_h=0.0, spread=0.0)
    return replace(still, items=items, cpu_s=cpu_s, slots=1, nodes=(1, 2))


if __name__ == "__main__":
    for line in lines(build(ClusterBenchConfig, {}, sys.argv[1:])):
        print(line, flush=True)
