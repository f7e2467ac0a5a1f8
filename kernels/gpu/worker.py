"""One task in a process of its own: python -m kinema.kernels.gpu.worker TASK --out DIR [--until SECONDS] [--tasks ...].

Exit status: 0; `ROWS_WRONG` if all rows are written and some are wrong or failed; anything else means that it did not
get to the end, and the driver writes the row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kinema.kernels import tuning
from kinema.kernels.gpu import rows, timing
from kinema.kernels.gpu.cases import GpuCase, Task, relative_error

TASKS = "kinema.kernels.gpu.cases:tasks"
ROWS_WRONG = 3
"""Python itself ends with 1 for an exception, before a row could be written."""
BASELINE_S = 8
"""A baseline that would begin with less time left than this is skipped: most are compiled first."""
SPARE_S = 2
"""One that is not done so long before the task's end is given up, so that the task ends by itself."""

Write = Callable[[dict[str, Any]], None]


def tasks_of(source: str) -> tuple[Task, ...]:
    """The tasks that a function gives; a run with stand-ins names another function."""
    module, function = source.split(":")
    return getattr(importlib.import_module(module), function)()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one task; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run one task of make gpu.")
    parser.add_argument("task")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--until", type=float, default=math.inf, help="when the process is ended, on the system's clock"
    )
    parser.add_argument("--driver", type=int, help="the process whose end is this one's, with all that it started")
    parser.add_argument("--tasks", default=TASKS)
    options = parser.parse_args(arguments)
    if options.driver is not None:
        threading.Thread(target=_end_with, args=(options.driver,), daemon=True).start()
    (task,) = (task for task in tasks_of(options.tasks) if task.name == options.task)
    return run(task, options.out, options.until)


def _end_with(driver: int) -> None:
    """Kill the group of this process, which is its own, once the driver is gone, however that ended."""
    while os.getppid() == driver:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def run(task: Task, out: Path, until: float = math.inf) -> int:
    """The rows of a task, each on the disk before the next is measured; returns the exit status.

    Every case is checked and timed before any baseline is: those may take the time that is left.
    """
    rows.identity()  # asks the device for its name, which it would not tell any more after an illegal access
    written: list[dict[str, Any]] = []

    def write(row: dict[str, Any]) -> None:
        full = {**rows.identity(), "task": task.name, **row}
        rows.append(out / "rows.csv", full)
        written.append(full)
        print("  ".join(f"{key} {full[key]}" for key in rows.COLUMNS[6:] if full.get(key, "") != ""), flush=True)

    def failed(name: str, error: Exception) -> None:
        write({"case": name, "status": "failed", "note": _one_line(error)})
        traceback.print_exc()

    rates = timing.load_rates(out / "rates.json")
    measured: list[tuple[GpuCase, timing.Times]] = []
    try:
        for made in task.yields():
            if not isinstance(made, GpuCase):
                write(made)
                continue
            try:
                times = measure(made, rates, write)
            except torch.AcceleratorError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a case raises costs its row, in which it is written down
                failed(made.name, error)
                continue
            if times is not None:
                measured.append((made, times))
    except torch.AcceleratorError as error:  # nothing runs on the device after it
        failed(task.name, error)
        measured = []
    except Exception as error:  # noqa: BLE001 - the same for what making a case raises
        failed(task.name, error)
    try:
        for case, times in measured:
            compare(case, times, rates, write, until)
    except torch.AcceleratorError as error:
        failed(task.name, error)
    _keep(task, out, written)
    return ROWS_WRONG if any(row["status"] in ("wrong", "failed") for row in written) else 0


def measure(case: GpuCase, rates: dict[str, float], write: Write) -> timing.Times | None:
    """Check a case, then time it: a row. None for what is only checked; what the kernel raises is left to callers."""
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
        return None
    times = timing.time_call(case.ours)
    write({**ours, **_figures(case, times, rates), "peak_mb": round(timing.peak_mb(case.ours), 1), "of_ours": 1.0})
    return times


def compare(case: GpuCase, times: timing.Times, rates: dict[str, float], write: Write, until: float) -> None:
    """Time the baselines of a case, a row each, with how far their results are from ours."""
    if not case.baselines:
        return
    # Shapes of other cases count as recompilations, of which torch.compile allows few before it gives up.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    ours = _tensors(case.ours())
    for name, baseline in case.baselines.items():
        row = {"case": case.name, "way": name}
        left = until - time.monotonic()
        if left < BASELINE_S:
            write({**row, "status": "skipped", "note": f"{left:.0f} s left of the task's time"})
            continue
        try:
            with _at_most(left - SPARE_S):
                memory = timing.peak_mb(baseline)
                error = _difference(_tensors(baseline()), ours)
                other = timing.time_call(baseline)
        except OutOfTime:
            write({**row, "status": "skipped", "note": f"not done within {left - SPARE_S:.0f} s"})
            continue
        except torch.AcceleratorError:
            raise
        except Exception as problem:  # noqa: BLE001 - a baseline that cannot run here is no failure of ours
            write({**row, "status": "missing", "note": _one_line(problem)})
            continue
        write(
            {
                **{**row, "status": "measured", "error": error, "peak_mb": round(memory, 1)},
                **_figures(case, other, rates),
                "of_ours": round(other.warm_ms / times.warm_ms, 3),
            }
        )


class OutOfTime(BaseException):
    """Not an `Exception`, which torch.compile would take for an error of what it compiles."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` inside, at the next step of Python, once so much time has passed."""

    def raise_it(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, raise_it)
    if seconds < math.inf:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, without their graph."""
    return [x.detach() for x in (result if isinstance(result, (tuple, list)) else [result]) if x is not None]


def _difference(found: list[torch.Tensor], ours: list[torch.Tensor]) -> str:
    """The largest difference of a baseline's results to ours, relative to the largest value; empty for other forms."""
    if len(found) != len(ours) or any(a.numel() != b.numel() for a, b in zip(found, ours, strict=True)):
        return ""
    pairs = zip(found, ours, strict=True)
    return f"{max(relative_error(a.reshape(b.shape), b.double()) for a, b in pairs):.1e}"


def _keep(task: Task, out: Path, written: list[dict[str, Any]]) -> None:
    """What later tasks, or the project, want of a task besides its rows."""
    if task.stage == "rates" and all(row["status"] == "measured" for row in written):
        timing.save_rates(out / "rates.json", written)
    if task.stage == "tuning" and torch.cuda.is_available():
        table = tuning.file_of(torch.cuda.get_device_name())
        if table.exists():
            shutil.copy(table, out)


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
    copy, matrix = rates.get("copy"), _matrix_rate(case.matrix_dtype, rates)
    if copy and matrix:
        least_ms = max(case.bytes_moved / copy / 1e6, case.flops / matrix / 1e9)
        found["of_copy_rate"] = round(gbytes_per_s / copy, 3)
        found["of_matrix_rate"] = round(tflops / matrix, 3)
        found["of_roofline"] = round(least_ms / times.warm_ms, 3)
    return found


def _matrix_rate(dtype: torch.dtype, rates: dict[str, float]) -> float | None:
    """TFLOP/s of products as exact as a dtype: float32's are three products of 16-bit halves where that is faster."""
    own = rates.get(f"matrix {str(dtype).removeprefix('torch.')}")
    if own and dtype == torch.float32:
        return max(own, rates.get("matrix float16", 0.0) / 3)
    return own


def _one_line(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip()}"[:300]


if __name__ == "__main__":
    ended_with = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without waiting for what torch.compile keeps running beside this process.
    os._exit(ended_with)
