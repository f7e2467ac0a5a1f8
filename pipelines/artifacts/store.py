"""Where artifacts live: a local folder or any fsspec URL, with atomic writes and ranged reads.

Both stores publish all or nothing. Locally: a locked temporary file in the same folder, fsync, replace, fsync of
the folder. On an object store a put is atomic by itself; shards are put with "create only" where the store knows it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import fsspec

from kinema.pipelines.artifacts import object_store, remote
from kinema.pipelines.artifacts.temporary import (
    TEMPORARY_PREFIX,
    TemporaryFile,
    disk_full_is_clear,
    sweep_folder,
)

__all__ = [
    "TEMPORARY_PREFIX",
    "Store",
    "TemporaryFile",
    "disk_full_is_clear",
    "open_store",
    "read_range",
    "read_ranges",
]

# Two ranges of a local file closer than this are read as one.
_MERGE_GAP_BYTES = 32768


class Store(Protocol):
    """Named byte strings under one URL; names are relative, with `/` between folders."""

    url: str

    def url_of(self, name: str) -> str:
        """The URL (or absolute path) of `name`."""

    def read(self, name: str) -> bytes:
        """All bytes of `name`. Raises: FileNotFoundError."""

    def write(self, name: str, data: bytes) -> None:
        """Replace `name` by `data`, all or nothing."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file directly in `folder`, by bare file name; temporary files are left out."""

    def times(self, folder: str = "") -> dict[str, float]:
        """When every file directly in `folder` was written (seconds since 1970), where the store says so."""

    def num_building(self, suffix: str) -> int | None:
        """Files of this ending that are being written; None where that cannot be seen from here."""

    def remove(self, name: str) -> None:
        """Delete `name` if it exists."""

    def open(self, name: str) -> BinaryIO:
        """A seekable reader of `name`. Raises: FileNotFoundError."""

    def build(self, name: str) -> TemporaryFile:
        """A temporary local file that will become `name`."""

    def publish(self, temporary: TemporaryFile, name: str, sha256: str) -> None:
        """Make the temporary file visible as `name`."""

    def sweep(self) -> int:
        """Remove temporary files of writers that are gone; returns how many."""


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store behind a local path, `file://` URL or any other fsspec URL."""
    text = os.fspath(url)
    if not text:
        raise ValueError("the artifact's folder is empty; set it, for example out=workspace/clips")
    protocol, _, rest = text.partition("://")
    if not rest:
        return LocalStore(text)
    if protocol in ("file", "local"):
        return LocalStore(rest)
    remote.check_url(text)
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text} cannot be opened: {error}") from None
    return object_store.ObjectStore(text)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStore:
    """A folder of the local file system (or a shared mount)."""

    def __init__(self, path: str):
        self.root = Path(path).expanduser().absolute()
        self.url = str(self.root)

    def url_of(self, name: str) -> str:
        return str(self.root / name)

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from None

    def open(self, name: str) -> BinaryIO:
        return open(self.root / name, "rb")

    def sizes(self, folder: str = "") -> dict[str, int]:
        path = self.root / folder
        if not path.is_dir():
            return {}
        found = {}
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_file() and not entry.name.startswith(TEMPORARY_PREFIX):
                    found[entry.name] = entry.stat().st_size
        return dict(sorted(found.items()))

    def times(self, folder: str = "") -> dict[str, float]:
        path = self.root / folder
        return {name: (path / name).stat().st_mtime for name in self.sizes(folder)}

    def num_building(self, suffix: str) -> int | None:
        return sum(suffix in path.name for path in self.root.glob(f"{TEMPORARY_PREFIX}*"))

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def build(self, name: str) -> TemporaryFile:
        target = self.root / name
        with disk_full_is_clear(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
        return TemporaryFile(target.parent, target.name, str(target))

    def publish(self, temporary: TemporaryFile, name: str, sha256: str) -> None:
        temporary.sync()
        with disk_full_is_clear(self.url_of(name)):
            os.replace(temporary.path, self.root / name)
            _sync_folder((self.root / name).parent)

    def write(self, name: str, data: bytes) -> None:
        with self.build(name) as temporary:
            temporary.write(data)
            self.publish(temporary, name, "")

    def sweep(self) -> int:
        if not self.root.is_dir():
            return 0
        folders = [self.root, *(p for p in self.root.iterdir() if p.is_dir() and p.name.startswith("_"))]
        return sum(sweep_folder(folder) for folder in folders)


class _OpenFiles:
    """Descriptors of recently read local files; a file that was replaced since is opened again."""

    def __init__(self, capacity: int = 64):
        self.capacity = capacity
        self.lock = threading.Lock()
        self.entries: OrderedDict[str, tuple[int, tuple[int, int]]] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        with self.lock:
            descriptor = os.dup(self._descriptor(path))  # stays open if the entry is evicted meanwhile
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def _descriptor(self, path: str) -> int:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        known = self.entries.get(path)
        if known is not None and known[1] == identity:
            self.entries.move_to_end(path)
            return known[0]
        if known is not None:
            os.close(self.entries.pop(path)[0])
        while len(self.entries) >= self.capacity:
            os.close(self.entries.popitem(last=False)[1][0])
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.entries[path] = (descriptor, identity)
        return descriptor


_open_files = _OpenFiles()


def is_local(url: str) -> bool:
    """Whether a URL is a path, or file://."""
    protocol, _, rest = url.partition("://")
    return not rest or protocol in ("file", "local")


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of the file at `url` from `offset`, by one ranged read.

    Raises: ValueError when the file is missing or ends before offset + size; StageError when an object store does
        not answer.
    """
    try:
        if is_local(url):
            data = _open_files.read(url.rpartition("://")[2], offset, size)
        else:
            data = object_store.read_object_range(url, offset, size)
    except FileNotFoundError:
        raise ValueError(f"{url} does not exist; run `kinema verify` on its artifact") from None
    return _whole(url, data, offset, size)


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
    """Blocks (offset, bytes) that hold all the ranges (offset, size) of one file, ascending.

    Ranges that lie near each other come in one block; of an object store, blocks are fetched at the same time.
    Raises: as read_range.
    """
    gap = _MERGE_GAP_BYTES if is_local(url) else object_store.MERGE_GAP_BYTES
    joined: list[list[int]] = []
    for offset, size in sorted(ranges):
        if joined and offset - joined[-1][1] <= gap:
            joined[-1][1] = max(joined[-1][1], offset + size)
        else:
            joined.append([offset, offset + size])
    wanted = [(start, stop - start) for start, stop in joined]
    if is_local(url):
        return [(start, read_range(url, start, size)) for start, size in wanted]
    try:
        blocks = object_store.read_object_ranges(url, wanted)
    except FileNotFoundError:
        raise ValueError(f"{url} does not exist; run `kinema verify` on its artifact") from None
    return [(start, _whole(url, data, start, size)) for (start, size), data in zip(wanted, blocks, strict=True)]


def _whole(url: str, data: bytes, offset: int, size: int) -> bytes:
    if len(data) != size:
        raise ValueError(
            f"{url} ends early: {size} bytes were expected at {offset}, {len(data)} are there; "
            "run `kinema verify` on its artifact"
        )
    return data
