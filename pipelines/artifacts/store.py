"""Where artifacts live: a local folder or any fsspec URL, with atomic writes and ranged reads.

Both stores publish all or nothing. Locally: a locked temporary file in the same folder, fsync, replace, fsync of
the folder. On an object store a put is atomic by itself; shards are put with "create only" where the store knows it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import fsspec

from kinema.pipelines.errors import StageError

TEMPORARY_PREFIX = ".kinema-tmp-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COPY_BYTES = 1 << 20


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
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{text} cannot be opened: {error}") from None
    return ObjectStore(text)


@contextmanager
def disk_full_is_clear(what: str, needed_bytes: int = 0) -> Iterator[None]:
    """Turn "no space left" into one line that says what to do. Raises: StageError."""
    try:
        yield
    except OSError as error:
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


def _sweep_folder(folder: Path, label: str = "") -> int:
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
        return sum(_sweep_folder(folder) for folder in folders)


class ObjectStore:
    """Any fsspec URL. Files are built in the local temporary folder and put whole."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    @property
    def _filesystem(self) -> fsspec.AbstractFileSystem:
        return fsspec.core.url_to_fs(self.url)[0]  # cached by fsspec, and made anew in another process

    def _path(self, name: str) -> str:
        return f"{fsspec.core.url_to_fs(self.url)[1].rstrip('/')}/{name}".rstrip("/")

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        return self._filesystem.cat_file(self._path(name))

    def open(self, name: str) -> BinaryIO:
        return self._filesystem.open(self._path(name), "rb")

    def sizes(self, folder: str = "") -> dict[str, int]:
        self._filesystem.invalidate_cache()
        try:
            entries = self._filesystem.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        files = ((e["name"].rpartition("/")[2], e["size"]) for e in entries if e["type"] == "file")
        return dict(sorted((name, int(size)) for name, size in files))

    def remove(self, name: str) -> None:
        try:
            self._filesystem.rm_file(self._path(name))
        except FileNotFoundError:
            return

    @property
    def _label(self) -> str:
        return hashlib.blake2b(self.url.encode(), digest_size=8).hexdigest()

    def build(self, name: str) -> TemporaryFile:
        folder = Path(tempfile.gettempdir())
        return TemporaryFile(folder, f"{self._label}-{name.replace('/', '-')}", f"{folder}, on the way to {self.url}")

    def publish(self, temporary: TemporaryFile, name: str, sha256: str) -> None:
        """Create-only put. An object that is already there and differs has no commit record, else its shard
        would not be built again: it is what a killed run left, and is replaced."""
        temporary.sync()
        path = self._path(name)
        try:
            self._filesystem.put_file(str(temporary.path), path, mode="create")
        except FileExistsError:
            if self._sha256(path) != sha256:
                self._filesystem.put_file(str(temporary.path), path)

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._filesystem.open(path, "rb") as file:
            while block := file.read(_COPY_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def write(self, name: str, data: bytes) -> None:
        self._filesystem.pipe_file(self._path(name), data)

    def sweep(self) -> int:
        return _sweep_folder(Path(tempfile.gettempdir()), self._label)


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


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of the file at `url` from `offset`, by one ranged read.

    Raises: ValueError when the file is missing or ends before offset + size.
    """
    protocol, _, rest = url.partition("://")
    try:
        if not rest or protocol in ("file", "local"):
            data = _open_files.read(rest or url, offset, size)
        else:
            filesystem, path = fsspec.core.url_to_fs(url)
            data = filesystem.cat_file(path, start=offset, end=offset + size)
    except FileNotFoundError:
        raise ValueError(f"{url} does not exist; run `kinema verify` on its artifact") from None
    if len(data) != size:
        raise ValueError(
            f"{url} ends early: {size} bytes were expected at {offset}, {len(data)} are there; "
            "run `kinema verify` on its artifact"
        )
    return data
