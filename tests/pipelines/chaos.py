"""Faults for the chaos tests: a command in a forked child whose n-th file never becomes visible, and the table of all.

Commands run through `cli.main` with the serial engine, in a fork of a server process that has everything imported and
no threads (a fork of the test process itself hangs in native code), so that a fault costs a fraction of a second. Every
file of ours becomes visible by `os.replace`: that is where faults strike.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHILD_S = 240
KILLED, ERROR, DONE = "killed", "clear error", "done"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    how: str
    status: int
    said: str


ROWS_FILE = "KINEMA_CHAOS_ROWS"
"""Variable with the file that chaos tests, in whatever process, enter their faults into (conftest.py)."""

Rows = Counter[tuple[str, str, str, str]]
"""(engine, stage, fault, outcome) -> faults."""

KINDS = (
    "kill -9 of the driver", "kill -9 of a worker", "kill -9 of an actor", "kill -9 of a node", "SIGTERM", "disk full",
    "read-only", "object store", "cut tar", "cut parquet", "wrong magic", "clock jumps", "NaN gradients",
)  # fmt: skip
"""Each begins the name of a fault that must have occurred."""
FEWEST, FEWEST_UNDER_RAY = 200, 100


def note(engine: str, stage: str, fault: str, outcome: str, count: int = 1) -> None:
    """Enter faults that ended well into the table."""
    file = os.environ.get(ROWS_FILE)
    if file and count:
        with open(file, "a") as rows:
            rows.write(json.dumps([[engine, stage, fault, outcome], count]) + "\n")


def read_rows(file: str) -> Rows:
    """What was entered."""
    rows: Rows = Counter()
    for line in Path(file).read_text().splitlines():
        row, count = json.loads(line)
        rows[tuple(row)] += count
    return rows


def table(rows: Rows) -> list[str]:
    """Lines of the table, faults counted by engine, stage and kind."""
    lines = ["| engine | stage | fault | outcome | faults |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} | {count} |" for row, count in sorted(rows.items())]
    return [*lines, "", f"{sum(rows.values())} faults, {under_ray(rows)} of them under Ray"]


def under_ray(rows: Rows) -> int:
    return sum(count for (engine, *_), count in rows.items() if engine == "ray")


def missing(rows: Rows) -> list[str]:
    """What a whole `make chaos` must have injected and has not."""
    lacks = [f"no fault of the kind: {kind}" for kind in KINDS if not any(row[2].startswith(kind) for row in rows)]
    for number, fewest, where in (
        (sum(rows.values()), FEWEST, "in all"),
        (under_ray(rows), FEWEST_UNDER_RAY, "under Ray"),
    ):
        if number < fewest:
            lacks.append(f"{number} faults {where}, fewer than {fewest}")
    return lacks


Fault = Callable[[str], None]
"""Called with the path of the file that is about to become visible."""


def kill(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(path: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def refuse(number: int) -> Fault:
    """The system call fails with this errno."""

    def fail(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return fail


FAULTS: dict[str, Fault] = {
    "kill -9 of the driver": kill,
    "SIGTERM": terminate,
    "disk full": refuse(errno.ENOSPC),
    "read-only": refuse(errno.EROFS),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(600, len(data), 997):
        data[place] ^= 0xFF
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def wrong_magic(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(b"NOTWHATITWAS" + data[12:])


DAMAGE: dict[str, Callable[[Path], None]] = {"flipped": flip, "cut": cut, "wrong magic": wrong_magic}


@contextlib.contextmanager
def struck(fault: str, at: int) -> Iterator[None]:
    """The fault of that name at the `at`-th os.replace of this process."""
    real, seen = os.replace, [0]

    def replace(source, target, **options):
        seen[0] += 1
        if seen[0] == at:
            FAULTS[fault](os.fspath(target))
        real(source, target, **options)

    os.replace = replace
    try:
        yield
    finally:
        os.replace = real


@contextlib.contextmanager
def counted(file: str) -> Iterator[None]:
    """Writes down how many os.replace there were."""
    real, seen = os.replace, [0]

    def replace(source, target, **options):
        seen[0] += 1
        real(source, target, **options)

    os.replace = replace
    yield
    Path(file).write_text(str(seen[0]))


@contextlib.contextmanager
def poisoned(step: int) -> Iterator[None]:
    """A gradient is NaN in that step of the training."""
    from kinema.pipelines.train import loop

    real, seen = loop.gradient_norm, [0]

    def norm(module):
        seen[0] += 1
        if seen[0] == step:
            next(p for p in module.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return real(module)

    loop.gradient_norm = norm
    yield


@contextlib.contextmanager
def jumping_clock(seconds: float, every: int) -> Iterator[None]:
    """The wall clock jumps by so much at every `every`-th look at it."""
    real, state = time.time, [0, 0.0]

    def jumped() -> float:
        state[0] += 1
        if state[0] % every == 0:
            state[1] += seconds
        return real() + state[1]

    time.time = jumped
    try:
        yield
    finally:
        time.time = real


PRELOADED = ["kinema.pipelines.cli", "mlflow.tracking", "s3fs", "cv2", "webdataset"]
PRELOADED += [f"kinema.pipelines.{name}" for name in ("shard", "teach", "track", "train", "embed", "tracking")]
PRELOADED += ["kinema.pipelines.train.recipes.flowfeat", "kinema.models.flowfeat"]

Around = Callable[[], contextlib.AbstractContextManager]


def command(arguments: list[str], folder: Path, around: Around = contextlib.nullcontext) -> Ended:
    """`kinema ARGUMENTS` in a process of its own.

    Args: around, makes the context it runs in; pickled. Raises: AssertionError for a hang or a traceback.
    """
    said = folder / "said.txt"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_in_child, args=(arguments, str(said), around, dict(os.environ)))
    process.start()
    process.join(CHILD_S)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{arguments} hangs: {said.read_text()[-2000:]}")
    text = said.read_text()
    assert "Traceback" not in text and "(details in" not in text, text[-3000:]
    code = process.exitcode
    return Ended(KILLED if code < 0 else DONE if code == 0 else ERROR, code, text)


def _in_child(arguments: list[str], said: str, around: Around, environment: dict[str, str]) -> None:
    import torch

    os.environ.update(environment, KINEMA_ENGINE="serial")
    torch.set_num_threads(1)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    from kinema.pipelines import cli

    with around():
        code = cli.main(arguments)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, locks and temporary files of killed writers left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def but_for_scans(found: dict[str, str]) -> dict[str, str]:
    """Scans of sources hold the store's own mark of the file's content, which a folder has not."""
    return {name: value for name, value in found.items() if not name.startswith("_scan/")}
