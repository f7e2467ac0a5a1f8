"""Two or more ways to do the same work, timed in turns: medians, and medians of the ratios of the same round.

Other load on a machine falls on both sides of a round alike, so that a ratio within a round says more than a ratio of
two minima, and a median more than the best of a few. Processor time of this process stands beside the wall clock: it
hardly notices what other processes do, and counts every thread.
"""

from __future__ import annotations

import gc
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Paired:
    """Seconds of every round, by side."""

    wall_s: dict[str, list[float]] = field(default_factory=dict)
    """Of the clock."""
    processor_s: dict[str, list[float]] = field(default_factory=dict)
    """Of all threads of this process."""

    def seconds(self, side: str) -> float:
        """Median by the clock."""
        return statistics.median(self.wall_s[side])

    def processor_seconds(self, side: str) -> float:
        """Median of processor time."""
        return statistics.median(self.processor_s[side])

    def faster(self, ours: str, baseline: str) -> float:
        """How many times as fast ours is: the median over rounds."""
        return _median_ratio(self.wall_s[baseline], self.wall_s[ours])

    def faster_in_processor_time(self, ours: str, baseline: str) -> float:
        """The same in processor time."""
        return _median_ratio(self.processor_s[baseline], self.processor_s[ours])

    def sum(self, name: str, parts: Mapping[str, int]) -> str:
        """A further side: so many times each of those, of the same round. Returns: its name."""
        for seconds in (self.wall_s, self.processor_s):
            rounds = zip(*(seconds[side] for side in parts), strict=True)
            seconds[name] = [sum(map(operator.mul, values, parts.values())) for values in rounds]
        return name

    def row(self, name: str, ours: str, baseline: str, unit: str = "ms", scale: float = 1e3) -> dict[str, Any]:
        """A row of a table of times; its ratios say how many times as fast ours is."""
        return {
            "name": name,
            "value": scale * self.seconds(ours),
            "baseline": scale * self.seconds(baseline),
            "ratio": self.faster(ours, baseline),
            "processor_ratio": self.faster_in_processor_time(ours, baseline),
            "unit": unit,
        }

    def rate_row(self, name: str, ours: str, baseline: str, unit: str, items: float = 1.0) -> dict[str, Any]:
        """The same of a table of items per second, for sides that do `items` in a round."""
        row = self.row(name, ours, baseline, unit)
        return row | {"value": items / self.seconds(ours), "baseline": items / self.seconds(baseline)}


def paired(sides: Mapping[str, Callable[[], Any]], rounds: int = 5, warm_up: int = 1) -> Paired:
    """Run all sides once a round, in turns.

    Args: sides, what to time, by name; warm_up, rounds that do not count.
    """
    found = Paired({side: [] for side in sides}, {side: [] for side in sides})
    for number in range(warm_up + rounds):
        for side, work in sides.items():
            gc.collect()
            wall, processor = time.perf_counter(), time.process_time()
            work()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            if number >= warm_up:
                found.wall_s[side].append(wall)
                found.processor_s[side].append(processor)
    return found


def _median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / max(b, 1e-9) for a, b in zip(above, below, strict=True))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of {name, value, baseline, ratio, unit}, aligned; beside the ratio by the clock that of processor time."""
    width = max(len(row["name"]) for row in rows)
    columns = {"value": "ours", "baseline": "baseline", "ratio": "ratio", "processor_ratio": "processor"}
    print(f"  {'':<{width}}" + "".join(f"  {title:>10}" for title in columns.values()))
    for row in rows:
        shown = "".join(f"  {row[key]:>10.4g}" if key in row else " " * 12 for key in columns)
        print(f"  {row['name']:<{width}}{shown}  {row['unit']}")
