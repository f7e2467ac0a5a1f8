"""compute-sanitizer over the toy shapes, where it is installed."""

from __future__ import annotations

import importlib
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

TOYS = ("cosine_attention", "correlation_lookup", "local_correlation", "convex_upsampling")


def rows(tool: str) -> Iterator[dict[str, Any]]:
    """One row: what a tool of compute-sanitizer says of the first toy cases of every operation."""
    program = shutil.which("compute-sanitizer")
    name = f"compute-sanitizer {tool}"
    if program is None:
        yield {"case": name, "way": "ours", "status": "missing", "note": "compute-sanitizer is not installed"}
        return
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "kinema.kernels.gpu.sanitizer"]
    done = subprocess.run(command, capture_output=True, text=True)
    summary = next((x.strip("= ") for x in done.stdout.splitlines() if "SUMMARY" in x), done.stderr.strip()[-200:])
    yield {"case": name, "way": "ours", "status": "checked" if done.returncode == 0 else "failed", "note": summary}


def run_toys() -> None:
    """What runs inside: a forward and a backward of each operation."""
    for op in TOYS:
        for case in itertools.islice(importlib.import_module(f"kinema.kernels.{op}.gpu_cases").toys(None), 2):
            case.ours()


if __name__ == "__main__":
    run_toys()
