"""What a pair of frames costs a teacher on this machine's CPU: processor seconds and peak memory.

Each teacher runs in a fresh process, with random weights, which changes neither. Seconds are the process's own, so
that other load hardly counts; a small pair goes first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

from kinema.pipelines.errors import StageError

_ONE_PAIR = """
import json, sys, time, torch
from pathlib import Path
from kinema.configs.models.table import MODELS
name, height, width, iters = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
torch.set_num_threads(1)
row = MODELS[name]
network = row.make()
def run(height, width):
    pair = torch.rand(2, 1, 3, height, width)
    if row.kind == "tracks":
        return network(255 * pair.transpose(0, 1), iters=iters or None)
    return network(*pair, iters=iters or None)
with torch.inference_mode():
    run(128, 128)
    started = time.process_time()
    run(height, width)
    seconds = time.process_time() - started
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps([seconds, peak / 2**30]))
"""


class PairCost(NamedTuple):
    """Of one direction of one pair, frames encoded anew."""

    cpu_s: float
    """Processor seconds on one thread."""
    peak_gib: float
    """Peak memory of the process, libraries and weights included."""


def pair_cost(teacher: str, height: int, width: int, iters: int = 0) -> PairCost:
    """Args: iters, refinements; 0 for the network's own number. Raises: StageError when the process fails."""
    command = [sys.executable, "-c", _ONE_PAIR, teacher, str(height), str(width), str(iters)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        last = (found.stderr.strip().splitlines() or [f"exit status {found.returncode}"])[-1]
        raise StageError(f"measuring {teacher} at {height}x{width} failed ({last}); fewer pixels may fit the memory")
    return PairCost(*json.loads(found.stdout))
