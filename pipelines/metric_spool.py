"""What a run tells MLflow, on disk until it has arrived: sent in order, by a thread, for as long as it takes.

A server that is away or slow never holds up whoever logs. Entries are JSON lines; a process that is killed leaves them
in the file, and the next one that opens it sends them first. What was sent twice is the same point twice, which MLflow
keeps once.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kinema.configs.json_text import json_text

Entry = dict[str, Any]
"""{"name", "value", "time_ms", "step"} of a metric (null on disk: nan or infinity), or {"file", "folder"} of a
file to copy."""
ENTRIES_PER_CALL = 500
SEND_EVERY_S = 10.0
_LONGEST_WAIT_S = 60.0
_IMPATIENT_WAIT_S = 1.0
_jitter = random.Random()  # its own: a thread that draws from the shared one changes the numbers of the step under way


class Spool:
    """Entries in order, in memory and, with a path, in a file that is emptied when all have arrived."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.entries: deque[Entry] = deque(_left_behind(path))
        self.on_disk = path is not None
        """Whether the file holds all that waits; not after the disk has refused some, until all have arrived."""

    def add(self, entries: list[Entry]) -> None:
        """Append, in memory and on disk.

        Raises: OSError, once, for a disk that cannot take them: what waits is then in memory only.
        """
        self.entries += entries
        if self.path is None or not self.on_disk:
            return  # behind a line that was cut off nothing could be read
        try:
            with self.path.open("a") as file:
                file.write("".join(json_text(entry) + "\n" for entry in entries))
        except OSError:
            self.on_disk = False
            raise

    def first(self) -> list[Entry]:
        """The oldest entries that go in one call: up to ENTRIES_PER_CALL metrics, or one file."""
        if not self.entries or "file" in self.entries[0]:
            return [self.entries[0]] if self.entries else []
        found: list[Entry] = []
        for entry in self.entries:
            if "file" in entry or len(found) == ENTRIES_PER_CALL:
                break
            found.append(entry)
        return found

    def drop(self, count: int) -> None:
        """The oldest have arrived."""
        for _ in range(count):
            self.entries.popleft()
        if not self.entries and self.path is not None:
            self.path.unlink(missing_ok=True)
            self.on_disk = True


def _left_behind(path: Path | None) -> list[Entry]:
    """Entries of a process that ended before they had arrived; a line that was cut off is removed."""
    if path is None or not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


class Sender:
    """Hands a spool's entries to `send` from a thread, oldest first, again and again until they are taken."""

    def __init__(
        self,
        spool: Spool,
        send: Callable[[list[Entry]], None],
        failures: Callable[[], tuple[type[Exception], ...]],
        on_trouble: Callable[[Exception], None],
        on_refusal: Callable[[OSError], None],
    ):
        """Args: failures, what `send` raises when the other side is away; on_trouble, told of every failed try;
        on_refusal, told of a disk that does not take entries.
        """
        self.spool, self.send, self.failures = spool, send, failures
        self.on_trouble, self.on_refusal = on_trouble, on_refusal
        self.changed = threading.Condition()
        self.hurry = bool(spool.entries)
        self.closed = False
        self.tries = 0
        self.thread: threading.Thread | None = None
        if spool.entries:
            self._start()

    def add(self, entries: list[Entry]) -> None:
        """Queue entries; does not wait for anybody. A disk that cannot take them is told, and holds nobody up."""
        with self.changed:
            try:
                self.spool.add(entries)
            except OSError as error:
                self.on_refusal(error)
            self.hurry |= len(self.spool.entries) >= ENTRIES_PER_CALL
            self.changed.notify_all()
        self._start()

    def _start(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="kinema-metrics", daemon=True)
            self.thread.start()

    def flush(self, timeout_s: float) -> int:
        """Wait until everything has arrived, but not for ever. Returns: entries that have not."""
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while self.spool.entries and (left_s := deadline - time.monotonic()) > 0:
                self.hurry = True
                self.changed.notify_all()
                self.changed.wait(min(left_s, _IMPATIENT_WAIT_S))
            return len(self.spool.entries)

    def close(self, timeout_s: float) -> int:
        """Flush and end the thread. Returns: entries that have not arrived; with a path, they are on disk."""
        left = self.flush(timeout_s)
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        return left

    def _work(self) -> None:
        while True:
            with self.changed:
                if not self.hurry and not self.closed:
                    self.changed.wait(SEND_EVERY_S)
                if self.closed:
                    return
                part, self.hurry = self.spool.first(), False
            if part:
                self._send(part)

    def _send(self, part: list[Entry]) -> None:
        try:
            self.send(part)
        except self.failures() as error:
            self.tries += 1
            self.on_trouble(error)
            wait_s = _jitter.uniform(0, min(_LONGEST_WAIT_S, 2.0 ** min(self.tries, 20)))
            with self.changed:
                self.changed.wait_for(lambda: self.hurry or self.closed, wait_s)
                if self.hurry:
                    self.changed.wait(min(wait_s, _IMPATIENT_WAIT_S))
            return
        with self.changed:
            self.tries = 0
            self.spool.drop(len(part))
            self.hurry |= bool(self.spool.entries)
            self.changed.notify_all()
