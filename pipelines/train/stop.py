"""Stopping on request: a signal in this process, or a message of the process that got the signal.

`ray job stop` gives the driver SIGTERM and, three seconds later, SIGKILL. A training step may take longer, and
Python runs signal handlers between byte codes only. So the signal arrives through a wake-up pipe in a thread of
its own, which can save the state of the last finished step while the next one is still being computed.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_S = 0.2


class Stop:
    """A request to end, with its reason. `watch` calls back once, in a thread, as soon as the request arrives."""

    def __init__(self, look: Callable[[], str | None] | None = None):
        """Args: look, where somebody else's request is found: its reason, or None."""
        self.look = look
        self.reason: str | None = None
        self._event = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def requested(self) -> bool:
        """Whether the run should end; looks for others' requests too."""
        if not self._event.is_set() and self.look is not None and (reason := self.look()) is not None:
            self.request(reason.strip() or "a request")
        return self._event.is_set()

    def request(self, reason: str) -> None:
        """Ask for the end; the first reason stays."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def watch(self, callback: Callable[[], None]) -> None:
        """Call `callback` in a thread when the request arrives; never after `close`."""

        def wait() -> None:
            while not self._closed.is_set():
                if self.requested:
                    callback()
                    return
                self._event.wait(POLL_S) if self.look is None else self._closed.wait(POLL_S)

        self._thread = threading.Thread(target=wait, name="kinema-stop", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; waits for a callback that is running."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()


class Notice:
    """Word that a machine of the run will soon be taken away: checkpoints then come as fast as they may.

    Asking takes all ranks (`ask` is called on each of them at the same step), so rank 0 says when: every two seconds,
    and once there is a notice not before four times as long as the last checkpoint took.
    """

    def __init__(self, ask: Callable[[], bool], every_s: float = 2.0):
        """Args: ask, whether there is a notice now."""
        self.ask, self.every_s = ask, every_s
        self._next = time.monotonic() + every_s

    @property
    def due(self) -> bool:
        """Whether it is time to ask."""
        return time.monotonic() >= self._next

    def answered(self, took_s: float) -> None:
        """Asked, and saved if there was a notice, which took so long."""
        self._next = time.monotonic() + max(self.every_s, 4 * took_s)


class CatchSignals:
    """While entered (in the main thread), SIGTERM and SIGINT call `on_signal(name)` from a thread, once.

    A second signal acts as if nothing had been caught. In any other thread nothing is caught.
    """

    def __init__(self, on_signal: Callable[[str], None]):
        self.on_signal = on_signal
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> CatchSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous = {number: signal.signal(number, self._second) for number in SIGNALS}
        self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._count = 0
        self._thread = threading.Thread(target=self._listen, name="kinema-signals", daemon=True)
        self._thread.start()
        return self

    def _listen(self) -> None:
        while received := self._read.recv(1):
            if received[0] in SIGNALS:
                self.on_signal(signal.Signals(received[0]).name)
                return

    def _second(self, number: int, frame: object) -> None:
        self._count += 1
        if self._count > 1:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *exc: object) -> None:
        if not self._previous:
            return
        self._restore()
        self._write.close()
        self._thread.join()
        self._read.close()
