"""Numbers of a run: sums between two log points, reduced over ranks, written as one JSON object per line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from kinema.configs.json_text import json_text

METRICS_FILE = "metrics.jsonl"
MEASURES_FILE = "measures.jsonl"
"""What was measured on held-out clips, a line for each time."""
PROGRESS_FILE = "progress.json"


class StepSums:
    """What one optimizer step adds up over its micro-batches and then over ranks, in one small all-reduce.

    Holds sums weighted by samples, so a rank with more skipped samples counts less.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.total: Tensor | None = None

    def add(self, loss: Tensor, num_samples: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """One micro-batch: means and the number of samples they are over."""
        self.names = ("num_samples", "loss", *metrics)
        values = torch.stack(
            [torch.as_tensor(v, device=loss.device).detach().double() for v in (loss, *metrics.values())]
        )
        weight = num_samples.detach().to(loss.device, torch.float64)
        row = torch.cat([weight.reshape(1), values * weight])
        self.total = row if self.total is None else self.total + row

    def reduce(self, stop: bool, ask: bool = False) -> tuple[float, dict[str, float], bool, bool]:
        """Over ranks: number of samples, mean of every metric over them, whether any rank set each of the two flags."""
        assert self.total is not None
        row = torch.cat([self.total, self.total.new_tensor([float(stop), float(ask)])])
        if dist.is_initialized():
            dist.all_reduce(row)
        *sums, stops, asks = row.tolist()
        count = sums[0]
        means = {n: s / count if count else 0.0 for n, s in zip(self.names[1:], sums[1:], strict=True)}
        return count, means, stops > 0, asks > 0


class Window:
    """Means since the last log point; part of a checkpoint, so a resumed run logs what an undisturbed one does."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        self.sums: dict[str, float] = {}
        self.steps = 0
        self.samples = 0.0
        self.started = time.perf_counter()
        self.wait_s = 0.0

    def add(self, count: float, means: Mapping[str, float], wait_s: float) -> None:
        """One optimizer step over all ranks."""
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1
        self.samples += count
        self.wait_s += wait_s

    def state_dict(self) -> dict[str, Any]:
        """Sums so far; times are not part of it."""
        return {"sums": dict(self.sums), "steps": self.steps, "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a window; its rate is over what this process did."""
        self.sums, self.steps, self.samples = dict(state["sums"]), state["steps"], state["samples"]

    def means(self) -> dict[str, float]:
        """Every metric's mean over the window's steps."""
        return {name: value / self.steps for name, value in self.sums.items()}


def memory_mb(device: torch.device) -> dict[str, float]:
    """Resident memory of this process and, on a GPU, the peak of its allocator."""
    found = {"memory_rss_mb": psutil.Process().memory_info().rss / 2**20}
    if device.type == "cuda":
        found["memory_cuda_peak_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


class MetricsFile:
    """`metrics.jsonl` of a run, on rank 0; a resumed run drops the lines after the step it starts from."""

    def __init__(self, run: Path, step: int, name: str = METRICS_FILE):
        self.path = run / name
        kept = [line for line in read_metrics(run, name) if line["step"] <= step]
        text = "".join(json_text(line) + "\n" for line in kept)
        temporary = self.path.with_suffix(".jsonl.partial")
        temporary.write_text(text)
        os.replace(temporary, self.path)
        self.file = self.path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one point; a value that is not finite is written as null."""
        self.file.write(json_text({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_metrics(run: Path, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """All points of a run; a last line that was cut off by a kill is left out."""
    path = Path(run) / name
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class ProgressFile:
    """`progress.json`, replaced at most once a second by rank 0: the driver shows it without talking to ranks."""

    def __init__(self, run: Path, every_s: float = 1.0):
        self.path = run / PROGRESS_FILE
        self.every_s = every_s
        self.written = float("-inf")

    def update(self, step: int, loss: float, last: bool = False) -> None:
        """Say where the run is."""
        now = time.monotonic()
        if now - self.written < self.every_s and not last:
            return
        self.written = now
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json_text({"step": step, "loss": loss}))
        os.replace(temporary, self.path)
