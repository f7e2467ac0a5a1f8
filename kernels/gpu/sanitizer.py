"""compute-sanitizer over the toy shapes, where it is installed and done in time."""

from __future__ import annotations

import importlib
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

SECONDS = 11
"""Less than the task's limit: everything under a sanitizer takes many times as long, and that is no failure."""
TOYS = ("cosine_attention", "correlation_lookup", "local_correlation", "convex_upsampling")


def rows(tool: str) -> Iterator[dict[str, Any]]:
    """One row: what a tool of compute-sanitizer says of the first toy cases of every operation."""
    program = shutil.which("compute-sanitizer")
    name = f"compute-sanitizer {tool}"
    if program is None:
        yield {"case": name, "way": "ours", "status": "missing", "note": "compute-sanitizer is not installed"}
        return
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "kinema.kernels.gpu.sanitizer"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        note = f"not done within {SECONDS} s; run {' '.join(command[:-1])} kinema.kernels.gpu.sanitizer"
        yield {"case": name, "way": "ours", "status": "skipped", "note": note}
        return
    lines = (done.stdout + done.stderr).splitlines()
    summary = next((x.strip("= ") for x in lines if "SUMMARY" in x), " ".join(lines)[-200:])
    yield {"case": name, "way": "ours", "status": "checked" if done.returncode == 0 else "failed", "note": summary}


def run_toys() -> None:
    """What runs inside: a forward and a backward of each operation."""
    for op in TOYS:
        for case in itertools.islice(importlib.import_module(f"kinema.kernels.{op}.gpu_cases").toys(None), 2):
            case.ours()


if __name__ == "__main__":
    run_toys()
