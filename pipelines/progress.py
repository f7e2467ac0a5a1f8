"""Progress on stderr with rate and time left: a bar on a terminal, plain lines elsewhere; and no long silence."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from kinema.pipelines.figures import Figures, tell

SILENCE_S = 10.0


def format_seconds(seconds: float) -> str:
    """`95.2` -> `1m35s`."""
    whole = int(round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """One line per update: `teach 12/80 clips  3.1 clips/s  22s left`.

    On a terminal it is a bar (rich); elsewhere (job logs) a new line is printed every `every_s` seconds.
    """

    def __init__(self, label: str, total: int, unit: str, stream: TextIO | None = None, every_s: float = 5.0):
        self.label, self.total, self.unit = label, total, unit
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.every_s = 0.1 if self.terminal else every_s
        self.done = self.first = 0
        self.started = time.monotonic()
        self.printed = float("-inf")
        self._bar: Any = None
        self._task: Any = None

    def start_at(self, done: int) -> None:
        """Items finished by an earlier run: they count as done but not towards the rate."""
        self.done = self.first = done

    def update(self, done: int, note: str = "") -> None:
        """Report that `done` items are finished."""
        self.done = done
        now = time.monotonic()
        if now - self.printed < self.every_s and done < self.total:
            return
        self.printed = now
        rate = (done - self.first) / max(now - self.started, 1e-9)
        eta_s = (self.total - done) / rate if rate > 0 else None
        tell(Figures(self.label, self.unit, done, self.total, rate, eta_s))
        left = f"{format_seconds((self.total - done) / rate)} left" if rate > 0 and done < self.total else ""
        speed = f"{rate:.2f} {self.unit}/s"
        if self.terminal:
            self._show_bar(done, "  ".join(part for part in (speed, left, note) if part))
            return
        parts = [f"{self.label} {done}/{self.total} {self.unit}", speed, left, note]
        self.stream.write("  ".join(p for p in parts if p) + "\n")
        self.stream.flush()

    def _show_bar(self, done: int, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Bar(*columns, console=Console(file=self.stream), auto_refresh=False)
            self._bar.start()
            self._task = self._bar.add_task(f"{self.label}, {self.unit}", total=self.total, text="")
        self._bar.update(self._task, completed=done, text=text)
        self._bar.refresh()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextlib.contextmanager
def never_silent(what: str, after_s: float = SILENCE_S) -> Iterator[None]:
    """Meanwhile, a line on stderr whenever nothing has been written to it for so long: `teach: at work, 20s`."""
    outer = sys.stderr
    heard = _Heard(outer)
    stop = threading.Event()
    started = time.monotonic()

    def speak() -> None:
        while not stop.wait(min(1.0, after_s / 4)):
            if time.monotonic() - heard.last >= after_s:
                heard.write(f"{what}: at work, {format_seconds(time.monotonic() - started)}\n")
                heard.flush()

    sys.stderr = heard  # type: ignore[assignment]
    thread = threading.Thread(target=speak, name="kinema-never-silent", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if sys.stderr is heard:
            sys.stderr = outer


class _Heard:
    """A stream that remembers when it was written to last."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.last = time.monotonic()

    def write(self, text: str) -> int:
        self.last = time.monotonic()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
