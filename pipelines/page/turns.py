"""One prediction at a time, and only those that somebody still waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

MAX_WAITING = 32


class Stale(Exception):
    """A newer request of the same page and kind has come."""


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

    async def run(self, client: str, kind: str, work: Callable[[Callable[[], bool]], T]) -> T:
        """`work(abandoned)` when its turn comes.

        Raises: Stale if a newer request came first; Busy if too many wait.
        """
        who, dropped = (client, kind), threading.Event()
        earlier = self._latest.get(who)
        if earlier is not None:
            earlier.set()
        elif self._waiting >= MAX_WAITING:
            raise Busy
        self._latest[who] = dropped
        self._waiting += 1
        try:
            async with self._alone:
                if dropped.is_set():
                    raise Stale
                return await asyncio.get_running_loop().run_in_executor(self._worker, work, dropped.is_set)
        finally:
            self._waiting -= 1
            if self._latest.get(who) is dropped:
                del self._latest[who]

    def close(self) -> None:
        """Give up what runs and what waits."""
        for dropped in self._latest.values():
            dropped.set()
        self._worker.shutdown(wait=False, cancel_futures=True)
