"""The table that `make gpu` writes: a row per measurement, on the disk at once."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "benchmarks" / "gpu.csv"
IDENTITY = ("date", "commit", "device", "torch", "triton")
COLUMNS = (
    *IDENTITY,
    *("task", "case", "way", "status", "timer", "warm_ms", "cold_ms", "per_second", "of_ours", "peak_mb"),
    *("error", "tolerance"),
    *("mbytes", "gflop", "gbytes_per_s", "of_copy_rate", "tflops", "of_matrix_rate", "of_roofline", "note"),
)
"""`way` is ours or a baseline; `status` is ok, wrong (over tolerance, still timed), checked, measured, missing (a
baseline, tool or package that is not there), skipped (no time left) or failed. `error` is to the reference in float64,
or, of a baseline, to ours; `per_second` counts samples or pairs of a model's step."""


def identity() -> dict[str, str]:
    """When, with what, and on what."""
    return {"date": datetime.date.today().isoformat(), **_identity()}


@functools.cache
def _identity() -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    try:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    except RuntimeError:  # a row that says what went wrong matters more than where
        device = "unknown"
    return {"commit": _commit(), "device": device, "torch": torch.__version__, "triton": triton}


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, with a header if the table is new; it survives whatever kills the process next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)
        handle.flush()
        os.fsync(handle.fileno())


def read(path: Path) -> list[dict[str, str]]:
    """All rows; none without a table."""
    if not path.exists():
        return []
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def collect(source: Path, table: Path = TABLE) -> int:
    """Copy the rows of a run into the project's table; returns their number.

    Raises: ValueError for rows that no CUDA device gave.
    """
    rows = read(source)
    if not rows:
        raise ValueError(f"{source} has no rows; run make gpu OUT={source.parent} on a machine with a CUDA device")
    if any(row["device"] in ("", "cpu") for row in rows):
        raise ValueError(f"{source} has rows without a CUDA device; {table.name} takes only those of a real run")
    for row in rows:
        append(table, row)
    return len(rows)


def _commit() -> str:
    """Short hash, with a + where files differ from it; `KINEMA_COMMIT` names it for a copy without a repository."""
    if named := os.environ.get("KINEMA_COMMIT"):
        return named
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
