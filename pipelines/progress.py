"""Progress lines on stderr with rate and time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO


def format_seconds(seconds: float) -> str:
    """`95.2` -> `1m35s`."""
    whole = int(round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """One line per update: `teach 12/80 clips  3.1 clips/s  22s left`.

    On a terminal the line is rewritten; elsewhere (job logs) a new one is printed every `every_s` seconds.
    """

    def __init__(self, label: str, total: int, unit: str, stream: TextIO | None = None, every_s: float = 5.0):
        self.label, self.total, self.unit = label, total, unit
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.every_s = 0.1 if self.terminal else every_s
        self.done = self.first = 0
        self.started = time.monotonic()
        self.printed = float("-inf")

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
        left = f"{format_seconds((self.total - done) / rate)} left" if rate > 0 and done < self.total else ""
        parts = [f"{self.label} {done}/{self.total} {self.unit}", f"{rate:.2f} {self.unit}/s", left, note]
        line = "  ".join(p for p in parts if p)
        self.stream.write(f"\r\x1b[K{line}" if self.terminal else line + "\n")
        self.stream.flush()

    def close(self) -> None:
        """End the rewritten line."""
        if self.terminal and self.printed > float("-inf"):
            self.stream.write("\n")
            self.stream.flush()
