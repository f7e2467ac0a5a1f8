"""What a task that decodes may use: memory, of which a damaged header can ask for any amount, and one thread."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2


def needs_more(what: str, limit_bytes: int) -> str:
    """Why `what` ended in a MemoryError, for the quarantine."""
    has = f"source_memory_gb={limit_bytes / 2**30:g}" if limit_bytes else "this machine has"
    return f"{what} needs more memory than {has}"


@contextmanager
def memory_limited(limit_bytes: int) -> Iterator[None]:
    """Meanwhile this process may allocate at most `limit_bytes` more than it has; beyond that allocations fail.

    Counted are private writable pages (RLIMIT_DATA), so that Ray's shared object store does not matter. Decoders report
    the failed allocation, Python raises MemoryError; a library that does neither ends the worker process, which the
    engine reports. 0: no limit. Systems without /proc have none either.
    """
    status = Path("/proc/self/status")
    if not limit_bytes or not status.exists():
        yield
        return
    in_use = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmData"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = in_use + limit_bytes
    for bound in (soft, hard):
        wanted = wanted if bound == resource.RLIM_INFINITY else min(wanted, bound)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def one_thread() -> Iterator[None]:
    """Meanwhile OpenCV uses this thread only: a task has one core, and small pictures do not gain by more."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
