"""One task in a process of its own: python -m kinema.kernels.gpu.worker TASK --out DIR [--tasks module:function]."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kinema.kernels.gpu import rows, timing
from kinema.kernels.gpu.cases import GpuCase, Task

TASKS = "kinema.kernels.gpu.cases:tasks"


def tasks_of(source: str) -> tuple[Task, ...]:
    """The tasks that a function gives; a run with stand-ins names another function."""
    module, function = source.split(":")
    return getattr(importlib.import_module(module), function)()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one task; status 0, or 1 if a row is wrong or failed."""
    parser = argparse.ArgumentParser(description="Run one task of make gpu.")
    parser.add_argument("task")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default=TASKS)
    options = parser.parse_args(arguments)
    (task,) = (task for task in tasks_of(options.tasks) if task.name == options.task)
    return run(task, options.out)


def run(task: Task, out: Path) -> int:
    """The rows of a task, each on the disk before the next is measured; returns the exit status."""
    written: list[dict[str, Any]] = []

    def write(row: dict[str, Any]) -> None:
        full = {**rows.identity(), "task": task.name, **row}
        rows.append(out / "rows.csv", full)
        written.append(full)
        print("  ".join(f"{key} {full[key]}" for key in rows.COLUMNS[6:] if full.get(key, "") != ""), flush=True)

    try:
        for made in task.yields():
            if isinstance(made, GpuCase):
                measure(made, timing.load_rates(out / "rates.json"), write)
            else:
                write(made)
    except Exception as error:  # noqa: BLE001 - whatever a case raises costs a row, in which it is written down
        write({"case": task.name, "status": "failed", "note": _one_line(error)})
        traceback.print_exc()
    if task.stage == "rates" and all(row["status"] == "measured" for row in written):
        timing.save_rates(out / "rates.json", written)
    return 1 if any(row["status"] in ("wrong", "failed") for row in written) else 0


def measure(case: GpuCase, rates: dict[str, float], write: Callable[[dict[str, Any]], None]) -> None:
    """Check a case, then time it and its baselines; a row each. What the kernel raises is left to the caller."""
    errors = case.check()
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    right = all(error <= case.tolerance for error in errors.values())  # a nan is not
    ours = {
        "case": case.name,
        "way": "ours",
        "status": "wrong" if not right else "ok" if case.timed else "checked",
        "error": f"{errors[worst]:.1e}",
        "tolerance": f"{case.tolerance:.0e}",
        "note": "" if right else f"{worst} is over the tolerance",
    }
    if not case.timed:
        write(ours)
        return
    times = timing.time_call(case.ours)
    write({**ours, **_figures(case, times, rates), "peak_mb": round(timing.peak_mb(case.ours), 1), "of_ours": 1.0})
    for name, baseline in case.baselines.items():
        try:
            memory = timing.peak_mb(baseline)
            other = timing.time_call(baseline)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - a baseline that cannot run here is no failure of ours
            write({"case": case.name, "way": name, "status": "missing", "note": _one_line(error)})
            continue
        write(
            {
                **{"case": case.name, "way": name, "status": "measured", "peak_mb": round(memory, 1)},
                **_figures(case, other, rates),
                "of_ours": round(other.warm_ms / times.warm_ms, 3),
            }
        )


def _figures(case: GpuCase, times: timing.Times, rates: dict[str, float]) -> dict[str, Any]:
    """Times, and how they compare with what the card reaches: the roofline is the slower of copying and multiplying."""
    gbytes_per_s, tflops = case.bytes_moved / times.warm_ms / 1e6, case.flops / times.warm_ms / 1e9
    found: dict[str, Any] = {
        "timer": times.timer,
        "warm_ms": round(times.warm_ms, 5),
        "cold_ms": round(times.cold_ms, 5),
        "mbytes": round(case.bytes_moved / 1e6, 2),
        "gflop": round(case.flops / 1e9, 2),
        "gbytes_per_s": round(gbytes_per_s, 1),
        "tflops": round(tflops, 4),
    }
    copy, matrix = rates.get("copy"), rates.get(f"matrix {str(case.matrix_dtype).removeprefix('torch.')}")
    if copy and matrix:
        least_ms = max(case.bytes_moved / copy / 1e6, case.flops / matrix / 1e9)
        found["of_copy_rate"] = round(gbytes_per_s / copy, 3)
        found["of_matrix_rate"] = round(tflops / matrix, 3)
        found["of_roofline"] = round(least_ms / times.warm_ms, 3)
    return found


def _one_line(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip()}"[:300]


if __name__ == "__main__":
    sys.exit(main())
