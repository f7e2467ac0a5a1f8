"""Faults for the chaos tests: a command in a forked child whose n-th file never becomes visible, and the table of all.

Commands run through `cli.main` with the serial engine, in a fork of a process that has everything imported, so that a
fault costs a fraction of a second. Every file of ours becomes visible by `os.replace`: that is where faults strike.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
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
def struck(fault: Fault, at: int) -> Iterator[list[int]]:
    """The fault at the `at`-th os.replace of this process; yields how many there were."""
    real, seen = os.replace, [0]

    def replace(source, target, **options):
        seen[0] += 1
        if seen[0] == at:
            fault(os.fspath(target))
        real(source, target, **options)

    os.replace = replace
    try:
        yield seen
    finally:
        os.replace = real


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


def command(arguments: list[str], folder: Path, around: contextlib.AbstractContextManager | None = None) -> Ended:
    """`kinema ARGUMENTS` in a fork of this process. Raises: AssertionError for one that hangs or shows a traceback."""
    said = folder / "said.txt"
    child = os.fork()
    if child == 0:
        _in_child(arguments, said, around)
    deadline = time.monotonic() + CHILD_S
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"{arguments} hangs: {said.read_text()[-2000:]}")
        time.sleep(0.005)
    text = said.read_text()
    assert "Traceback" not in text and "(details in" not in text, text[-3000:]
    if os.WIFSIGNALED(status):
        return Ended(KILLED, -os.WTERMSIG(status), text)
    code = os.WEXITSTATUS(status)
    return Ended(DONE if code == 0 else ERROR, code, text)


def _in_child(arguments: list[str], said: Path, around: contextlib.AbstractContextManager | None) -> None:
    code = 99
    try:
        os.environ["KINEMA_ENGINE"] = "serial"
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        import sys

        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        from kinema.pipelines import cli

        with around or contextlib.nullcontext():
            code = cli.main(arguments)
        sys.stderr.flush()
    finally:
        os._exit(code)


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, locks and temporary files of killed writers left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
