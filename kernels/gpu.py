"""`make gpu`: check and time the kernels on a CUDA device, and append the rows to benchmarks/gpu.csv.

Every operation lists its cases in `kernels/OP/gpu_cases.py`. A case is checked against its reference in fp64 first; one
that fails is reported, not timed, and makes the exit status 1. Without a device nothing is run and nothing is written.
"""

from __future__ import annotations

import csv
import datetime
import functools
import importlib
import importlib.metadata
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import kinema

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.csv"
COLUMNS = (
    *("date", "version", "device", "torch", "triton", "case", "baseline"),
    *("ours_ms", "baseline_ms", "ratio", "ours_mb", "baseline_mb", "max_error"),
    *("gbytes_per_s", "of_copy_rate", "tflops", "of_matrix_rate"),
)
OPS = ("local_correlation", "correlation_lookup", "cosine_attention")
REPEATS = 20


@dataclass(frozen=True)
class GpuCase:
    """One size of one operation."""

    name: str
    """Operation, sizes, dtype, direction: `local_correlation C128 55x128 r4 fp16 forward`."""
    ours: Callable[[], Any]
    """Runs the kernel; tensors are made beforehand."""
    check: Callable[[], float]
    """Largest error relative to the largest value, against the reference in fp64."""
    tolerance: float
    """The error that is still right: 1e-5 in fp32, 2e-3 in fp16, 1e-2 in bf16."""
    baselines: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """Other ways to the same result, by name; one that raises is reported as not available."""
    bytes_moved: float = 0.0
    """Bytes that must be read and written at least."""
    flops: float = 0.0
    """Multiplications and additions that are needed."""
    matrix_dtype: torch.dtype = torch.float16
    """Whose matrix rate the FLOPs are compared with."""


@dataclass(frozen=True)
class CardRates:
    """What the card reaches on plain work, measured at the start."""

    copy_gbytes_per_s: float
    matrix_tflops: dict[torch.dtype, float]


def main() -> int:
    """Run every case; returns the exit status."""
    if not torch.cuda.is_available():
        sys.stderr.write("make gpu: torch sees no CUDA device, so nothing was checked or timed\n")
        return 1
    rates = measure_rates()
    print(f"{torch.cuda.get_device_name()}: copy {rates.copy_gbytes_per_s:.0f} GB/s, " + _matrix_line(rates))
    failed = 0
    for case in all_cases():
        try:
            rows = measure_case(case, rates)
        except (RuntimeError, ValueError, AssertionError, ImportError) as error:
            failed += 1
            sys.stderr.write(f"{case.name}: {error}\n{traceback.format_exc(limit=-3)}\n")
            continue
        append_rows(TABLE, rows)  # at once: what was measured stays if a later case stops the process
        for row in rows:
            print("  ".join(f"{key} {row[key]}" for key in COLUMNS[5:] if row[key] != ""), flush=True)
    return 1 if failed else 0


def all_cases() -> Iterable[GpuCase]:
    """The cases of all operations, made one after another, so that memory is free again before the next."""
    for op in OPS:
        yield from importlib.import_module(f"kinema.kernels.{op}.gpu_cases").cases()


def measure_case(case: GpuCase, rates: CardRates) -> list[dict[str, Any]]:
    """Rows of the table: one per baseline, or one without.

    Raises: AssertionError if the kernel's numbers are wrong.
    """
    error = case.check()
    if not error <= case.tolerance:
        raise AssertionError(f"relative error {error:.2e} is over {case.tolerance:.0e}")
    baselines: dict[str, Callable[[], Any] | None] = dict(case.baselines) or {"": None}
    rows = []
    for name, baseline in baselines.items():
        times = {"ours": [], "baseline": []}  # type: dict[str, list[float]]
        ours_mb, baseline_mb = _peak_mb(case.ours), 0.0
        if baseline is not None:
            try:
                baseline_mb = _peak_mb(baseline)
            except (RuntimeError, ImportError, NotImplementedError) as problem:
                reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
                print(f"{case.name}: {name} is not available here: {reason}")
                continue
        for _ in range(REPEATS):  # alternating, so that both see the same clocks
            times["ours"].append(_milliseconds(case.ours))
            if baseline is not None:
                times["baseline"].append(_milliseconds(baseline))
        ours_ms = statistics.median(times["ours"])
        baseline_ms = statistics.median(times["baseline"]) if baseline is not None else 0.0
        gbytes_per_s, tflops = case.bytes_moved / ours_ms / 1e6, case.flops / ours_ms / 1e9
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "version": kinema.__version__,
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": importlib.metadata.version("triton"),
                "case": case.name,
                "baseline": name,
                "ours_ms": round(ours_ms, 4),
                "baseline_ms": round(baseline_ms, 4) if baseline is not None else "",
                "ratio": round(baseline_ms / ours_ms, 3) if baseline is not None else "",
                "ours_mb": round(ours_mb, 1),
                "baseline_mb": round(baseline_mb, 1) if baseline is not None else "",
                "max_error": f"{error:.1e}",
                "gbytes_per_s": round(gbytes_per_s, 1),
                "of_copy_rate": round(gbytes_per_s / rates.copy_gbytes_per_s, 3),
                "tflops": round(tflops, 2),
                "of_matrix_rate": round(tflops / rates.matrix_tflops[case.matrix_dtype], 3),
            }
        )
    return rows


def measure_rates() -> CardRates:
    """Copy bandwidth of 1 GiB, and matrix products of 8192 x 8192 in each dtype (fp32 without TF32)."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = statistics.median(_milliseconds(lambda: target.copy_(source)) for _ in range(REPEATS))
    matrix = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        product = functools.partial(torch.matmul, a, a)
        product()
        matrix[dtype] = 2 * 8192**3 / statistics.median(_milliseconds(product) for _ in range(5)) / 1e9
    return CardRates(2 * 2**30 / copy_ms / 1e6, matrix)


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append to the CSV table, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _matrix_line(rates: CardRates) -> str:
    return ", ".join(f"{str(k).removeprefix('torch.')} {v:.0f} TFLOP/s" for k, v in rates.matrix_tflops.items())


def _milliseconds(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _peak_mb(function: Callable[[], Any]) -> float:
    """MiB above what was allocated before; the second call counts, the first compiles."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


if __name__ == "__main__":
    sys.exit(main())
