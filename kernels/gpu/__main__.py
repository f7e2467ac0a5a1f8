"""python -m kinema.kernels.gpu [--out DIR] [--minutes 9] [--only attention,lookup] [--wheels DIR] [--collect]

Exit status: 0 if all is right, or if there is no CUDA device (said on stderr; nothing is run, nothing written);
1 if a row is wrong or failed; 2 for arguments that do not fit. Rows go to DIR/rows.csv, as they are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from kinema.kernels.gpu import rows
from kinema.kernels.gpu.cases import Task
from kinema.kernels.gpu.worker import ROWS_WRONG, TASKS, tasks_of

PYTHON_PATH = str(Path(__file__).resolve().parents[2] / "src")
LONGEST = 2
"""Times its limit that a task may take where earlier ones left time over."""
_COMPILED = Path(tempfile.gettempdir()) / f"kinema-gpu-{os.getuid()}"
CACHES = {"TRITON_CACHE_DIR": str(_COMPILED / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(_COMPILED / "inductor")}
"""Where compiled code goes unless told: a home folder, and a name for the user, are not on every machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tasks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make gpu", description="Check and time the kernels on a CUDA device.")
    parser.add_argument("--out", type=Path, default=Path("workspace/gpu"), help="folder for rows.csv and logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop starting tasks so that all ends by then")
    parser.add_argument("--only", default="", help="stages or task names, by their beginnings, with commas between")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of baselines, such as localcorr's")
    parser.add_argument("--tasks", default=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--without-device", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--collect", action="store_true", help="copy DIR/rows.csv into benchmarks/gpu.csv, run nothing")
    options = parser.parse_args(arguments)
    try:
        if options.collect:
            print(f"{rows.collect(options.out / 'rows.csv')} rows into {rows.TABLE}")
            return 0
        chosen = select(tasks_of(options.tasks), options.only)
        wheels = unpack(options.wheels, options.out) if options.wheels else None
    except ValueError as error:
        sys.stderr.write(f"make gpu: {error}\n")
        return 2
    if not torch.cuda.is_available() and not options.without_device:
        sys.stderr.write("make gpu: torch sees no CUDA device, so nothing was checked or timed (status 0)\n")
        return 0
    return run(chosen, options.out, 60 * options.minutes, options.tasks, wheels)


def select(tasks: Sequence[Task], only: str) -> list[Task]:
    """Tasks whose stage or name begins with one of the given words. Raises: ValueError if a word selects none."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    for word in words:
        if not any(task.stage.startswith(word) or task.name.startswith(word) for task in tasks):
            stages = ", ".join(dict.fromkeys(task.stage for task in tasks))
            raise ValueError(f"ONLY={word} names no task; stages are {stages}")
    return [t for t in tasks if not words or any(t.stage.startswith(w) or t.name.startswith(w) for w in words)]


def run(tasks: Sequence[Task], out: Path, seconds: float, source: str, wheels: Path | None = None) -> int:
    """Each task in a process of its own, while time is left for its whole limit; returns the exit status.

    A task that wrote no row of its own, whatever ended it, gets one here.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    bad, later = 0, sum(task.limit_s for task in tasks)
    for number, task in enumerate(tasks, 1):
        left = deadline - time.monotonic()
        later -= task.limit_s
        if left < task.limit_s:
            note = f"not run: {left:.0f} s left, and it may take {task.limit_s}"
            rows.append(out / "rows.csv", {**_own(task), "status": "skipped", "note": note})
            print(f"[{number}/{len(tasks)}] {task.name}: {note}", flush=True)
            continue
        # What earlier tasks did not need is there for this one, as far as the later ones keep their own.
        limit_s = int(max(task.limit_s, min(LONGEST * task.limit_s, left - later)))
        print(f"[{number}/{len(tasks)}] {task.name} (at most {limit_s} s, {left:.0f} s left)", flush=True)
        status = _start(task, out, source, wheels, limit_s)
        if status not in (0, ROWS_WRONG):
            note = _ending(status, limit_s)
            rows.append(out / "rows.csv", {**_own(task), "status": "failed", "note": note})
            print(f"{task.name}: {note}; see {out / _log_name(task)}", flush=True)
        bad += status != 0
    print(f"{len(tasks) - bad} of {len(tasks)} tasks right; rows in {out / 'rows.csv'}", flush=True)
    return 1 if bad else 0


def unpack(wheels: Path, out: Path) -> Path:
    """Wheels laid out as Python can import them, without pip. Raises: ValueError if there are none."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise ValueError(f"WHEELS={wheels} holds no .whl file; fetch one with pip download --no-deps localcorr")
    folder = out / "wheels"
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder.resolve()


def _start(task: Task, out: Path, source: str, wheels: Path | None, limit_s: int) -> int | None:
    """Exit status of a task's process; None if it ran past its limit. Its children end with it."""
    command = [sys.executable, "-m", "kinema.kernels.gpu.worker", task.name, "--out", str(out), "--tasks", source]
    command += ["--until", str(time.monotonic() + limit_s), "--driver", str(os.getpid())]
    paths = [PYTHON_PATH, *([str(wheels)] if wheels else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**CACHES, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with (out / _log_name(task)).open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _own(task: Task) -> dict[str, str]:
    return {**rows.identity(), "task": task.name, "case": task.name}


def _log_name(task: Task) -> str:
    return f"{task.name.replace(' ', '_')}.log"


def _ending(status: int | None, limit_s: int) -> str:
    if status is None:
        return f"ended after its limit of {limit_s} s"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


if __name__ == "__main__":
    sys.exit(main())
