"""`make gpu`: check and time the kernels on a CUDA device, and append the rows to benchmarks/gpu.csv.

Without a device nothing is run and nothing is written: the exit status is 1 and one line says so.
"""

from __future__ import annotations

import csv
import datetime
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kinema
from kinema.kernels.correlation_lookup import (
    correlation_lookup,
    correlation_pyramid,
    feature_pyramid,
    volume_lookup,
)

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.csv"
COLUMNS = (
    *("date", "version", "device", "torch", "case"),
    *("ours_ms", "baseline_ms", "ratio", "ours_mb", "baseline_mb", "max_error"),
)
RADIUS, CHANNELS = 4, 256


def main() -> int:
    """Run every case; returns the exit status."""
    if not torch.cuda.is_available():
        sys.stderr.write("make gpu: torch sees no CUDA device, so nothing was checked or timed\n")
        return 1
    device = torch.cuda.get_device_name()
    rows = []
    for height, width in ((55, 128), (90, 160), (135, 240)):
        row = lookup_case(height, width)
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "version": kinema.__version__,
                "device": device,
                "torch": torch.__version__,
                **row,
            }
        )
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    append_rows(TABLE, rows)
    return 0


def lookup_case(height: int, width: int) -> dict[str, Any]:
    """On-demand lookup against lookup in the all-pairs volume (volume made once, not counted in its time)."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, CHANNELS, height, width)
    fmap1, fmap2 = (torch.randn(shape, device="cuda", generator=generator) for _ in range(2))
    y, x = torch.meshgrid(torch.arange(height, device="cuda"), torch.arange(width, device="cuda"), indexing="ij")
    shift = 8 * torch.randn(1, 2, height, width, device="cuda", generator=generator)
    coords = torch.stack([x, y])[None] + shift
    torch.backends.cuda.matmul.allow_tf32 = False
    pooled = feature_pyramid(fmap2)
    ours_ms, ours_mb, ours = _measure(lambda: correlation_lookup(fmap1, pooled, coords, RADIUS))
    before = torch.cuda.memory_allocated()
    pyramid = correlation_pyramid(fmap1, fmap2)
    volume_mb = (torch.cuda.memory_allocated() - before) / 2**20
    base_ms, base_mb, base = _measure(lambda: volume_lookup(pyramid, coords, RADIUS))
    error = (ours - base).abs().max().item()
    limit = 1e-4 * base.abs().max().item()
    if not error <= limit:
        raise AssertionError(f"lookup at {height}x{width} differs from the volume by {error:.2e}, over {limit:.2e}")
    return {
        "case": f"lookup C{CHANNELS} {height}x{width} r{RADIUS} fp32",
        "ours_ms": round(ours_ms, 3),
        "baseline_ms": round(base_ms, 3),
        "ratio": round(base_ms / ours_ms, 3),
        "ours_mb": round(ours_mb, 1),
        "baseline_mb": round(base_mb + volume_mb, 1),
        "max_error": f"{error:.1e}",
    }


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append to the CSV table, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _measure(function: Callable[[], torch.Tensor], repeats: int = 20) -> tuple[float, float, torch.Tensor]:
    """Median milliseconds, peak MiB above what was allocated before, and the result."""
    result = function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**20, result


if __name__ == "__main__":
    sys.exit(main())
