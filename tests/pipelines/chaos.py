"""Faults for the chaos tests: a command in a forked child whose n-th file never becomes visible, and the table of all.

Commands run through `cli.main` with the serial engine, in a fork of a server process that has everything imported and
no threads (a fork of the test process itself hangs in native code), so that a fault costs a fraction of a second. Every
file of ours becomes visible by `os.replace`: that is where faults strike.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
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


ROWS: Counter[tuple[str, str, str, str]] = Counter()
"""(engine, stage, fault, outcome) -> faults, over all chaos tests of this process."""


def note(engine: str, stage: str, fault: str, outcome: str, count: int = 1) -> None:
    """Enter faults that ended well into the table."""
    ROWS[engine, stage, fault, outcome] += count


def table() -> list[str]:
    """Lines of the table, faults counted by engine, stage and kind."""
    total = sum(ROWS.values())
    under_ray = sum(count for (engine, *_), count in ROWS.items() if engine == "ray")
    lines = [f"| engine | stage | fault | outcome | faults |  ({total} in all, {under_ray} under Ray)"]
    return lines + [f"| {' | '.join(row)} | {count} |" for row, count in sorted(ROWS.items())]


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
    "kill -9": kill,
    "SIGTERM": terminate,
    "disk full": refuse(errno.ENOSPC),
    "read-only": refuse(errno.EROFS),
}


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
    yield


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
