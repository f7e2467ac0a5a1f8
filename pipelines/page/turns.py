"""One prediction at a time, and only those that somebody still waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

MAX_WAITING = 32
POLL_S = 0.2


class Stale(Exception):
    """Nobody waits for the answer: a newer request has come, the client has gone, or the page closes."""


class Busy(Exception):
    """Too many requests wait already."""


class Turns:
    """Runs work in one thread, in order of arrival, so that the event loop stays responsive.

    A newer request of the same client and kind takes the place of the older ones: those still waiting are not
    computed, the one being computed is told to give up.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._alone = asyncio.Lock()
        self._latest: dict[tuple[str, str], threading.Event] = {}
        self._waiting = 0
        self._closed = False

    async def run(
        self,
        client: str,
        kind: str,
        work: Callable[[Callable[[], bool]], T],
        gone: Callable[[], Awaitable[bool]],
    ) -> T:
        """`work(abandoned)` when its turn comes; `gone()` tells whether the client has closed the connection.

        Raises: Stale if nobody waits any more; Busy if too many do.
        """
        if self._waiting >= MAX_WAITING:
            raise Busy
        who, dropped = (client, kind), threading.Event()
        if who in self._latest:
            self._latest[who].set()
        self._latest[who] = dropped
        self._waiting += 1
        try:
            async with self._alone:
                if dropped.is_set() or self._closed or await gone():
                    raise Stale
                running = asyncio.get_running_loop().run_in_executor(self._worker, work, dropped.is_set)
                while not running.done():
                    await asyncio.wait({running}, timeout=POLL_S)
                    if not running.done() and await gone():
                        dropped.set()
                return running.result()
        finally:
            self._waiting -= 1
            if self._latest.get(who) is dropped:
                del self._latest[who]

    def close(self) -> None:
        """Give up what runs and what waits."""
        self._closed = True
        for dropped in self._latest.values():
            dropped.set()
        self._worker.shutdown(wait=False)
