"""Temporary files that are known to be abandoned once their writer is gone, and full disks told in one line."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kinema.pipelines.errors import StageError

TEMPORARY_PREFIX = ".kinema-tmp-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_LOST = (errno.EROFS, errno.EIO, errno.ESTALE)


@contextmanager
def disk_full_is_clear(what: str, needed_bytes: int = 0) -> Iterator[None]:
    """Turn what a disk refuses, full, read-only or broken, into one line that says what to do. Raises: StageError.

    It concerns the run: an item that is being worked on is not to blame.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_LOST:
            raise StageError(
                f"cannot write {what}: {error.strerror}; make the disk writable again or set out= to another, and run "
                "the same command"
            ) from None
        if error.errno not in _DISK_FULL:
            raise
        needed_mb = max(1, -(-needed_bytes // 1_000_000))
        raise StageError(
            f"disk full while writing {what}: free at least {needed_mb} MB there or set out= to another disk"
        ) from None


def _lock(file: BinaryIO, wait: bool = True) -> bool:
    """Lock a file; False when another process holds it, or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise
    return True


class TemporaryFile:
    """A file under a temporary name, locked for as long as its writer lives.

    A sweep may remove it once the lock is gone, which a killed process cannot prevent. Leaving the `with` block
    removes the file unless it was published.
    """

    def __init__(self, folder: Path, label: str, target: str):
        self.target = target
        self.num_bytes = 0
        while True:
            self.path = folder / f"{TEMPORARY_PREFIX}{label}-{secrets.token_hex(6)}"
            with disk_full_is_clear(target):
                self.file: BinaryIO = open(self.path, "xb")
            _lock(self.file)
            if os.fstat(self.file.fileno()).st_nlink:  # a sweep may have come between creation and lock
                break
            self.file.close()

    def __enter__(self) -> TemporaryFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`. Raises: StageError when the disk is full."""
        self.num_bytes += len(data)
        with disk_full_is_clear(self.target, self.num_bytes):
            self.file.write(data)

    def sync(self) -> None:
        """Everything written so far reaches the disk."""
        with disk_full_is_clear(self.target, self.num_bytes):
            self.file.flush()
            os.fsync(self.file.fileno())

    def discard(self) -> None:
        """Remove the file; nothing happens when it was published."""
        self.path.unlink(missing_ok=True)
        try:
            self.file.close()
        except OSError as error:  # buffered bytes of a file on a full disk, which is gone already
            if error.errno not in _DISK_FULL:
                raise


def sweep_folder(folder: Path, label: str = "") -> int:
    """Remove temporary files whose writers are gone; returns how many."""
    removed = 0
    for path in sorted(folder.glob(f"{TEMPORARY_PREFIX}{label}*")):
        try:
            with open(path, "rb") as file:
                if _lock(file, wait=False):
                    path.unlink()
                    removed += 1
        except FileNotFoundError:
            continue  # its writer has just published it
    return removed
