"""Artifacts behind any fsspec URL: files are built in the local temporary folder and put whole."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from kinema.pipelines.artifacts import remote
from kinema.pipelines.artifacts.temporary import TemporaryFile, sweep_folder

Value = TypeVar("Value")

# Two ranges closer than this are read as one: a request costs some 30 ms, in which about so many bytes come.
MERGE_GAP_BYTES = 256 * 1024
# Files of two parts or more are put part by part, several at once.
PART_BYTES = 32 << 20
_RANGES_AT_ONCE = 8
# What s3fs, gcsfs, adlfs, hdfs and fsspec's memory store call the time of the last change.
_TIME_KEYS = ("LastModified", "updated", "last_modified", "mtime", "created")
_HASH_BYTES = 8 << 20


class ObjectStore:
    """A bucket prefix. A put is atomic by itself; shards are put with "create only" where the store knows it."""

    def __init__(self, url: str):
        self.url = remote.check_url(url.rstrip("/"))

    def _call(self, name: str, request: Callable[[], Value]) -> Value:
        return remote.call(self.url_of(name), request)

    @property
    def _filesystem(self) -> Any:
        return remote.filesystem(self.url)[0]

    def _path(self, name: str) -> str:
        return f"{remote.filesystem(self.url)[1].rstrip('/')}/{name}".rstrip("/")

    def url_of(self, name: str) -> str:
        """URL of a file."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """All bytes of `name`. Raises: FileNotFoundError."""
        return self._call(name, lambda: self._filesystem.cat_file(self._path(name)))

    def open(self, name: str) -> BinaryIO:
        """A seekable reader, every block of which is a ranged read with retries. Raises: FileNotFoundError."""
        size = self._call(name, lambda: self._filesystem.size(self._path(name)))
        return RangeReader(self.url_of(name), int(size))  # type: ignore[return-value]

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file directly in `folder`: one listing."""
        return {name: int(entry["size"]) for name, entry in self._listed(folder).items()}

    def times(self, folder: str = "") -> dict[str, float]:
        """When every file directly in `folder` was written, where the store says so: one listing."""
        found = {}
        for name, entry in self._listed(folder).items():
            written = next((entry[key] for key in _TIME_KEYS if entry.get(key)), None)
            if isinstance(written, str):
                written = datetime.fromisoformat(written)
            if written is not None:
                found[name] = written.timestamp() if isinstance(written, datetime) else float(written)
        return found

    def num_building(self, suffix: str) -> None:
        """Shards are built in the workers' own folders, out of sight."""
        return None

    def _listed(self, folder: str) -> dict[str, dict[str, Any]]:
        try:
            entries = self._call(folder, lambda: self._filesystem.ls(self._path(folder), detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        files = {entry["name"].rpartition("/")[2]: entry for entry in entries if entry["type"] == "file"}
        return {name: files[name] for name in sorted(files) if name}

    def remove(self, name: str) -> None:
        """Delete `name` if it exists."""
        try:
            self._call(name, lambda: self._filesystem.rm_file(self._path(name)))
        except FileNotFoundError:
            return

    @property
    def _label(self) -> str:
        return hashlib.blake2b(self.url.encode(), digest_size=8).hexdigest()

    def build(self, name: str) -> TemporaryFile:
        """A local file on its way to `name`."""
        folder = Path(tempfile.gettempdir())
        return TemporaryFile(folder, f"{self._label}-{name.replace('/', '-')}", f"{folder}, on the way to {self.url}")

    def publish(self, temporary: TemporaryFile, name: str, sha256: str) -> None:
        """Create-only put, in parts where the file is large.

        An object that is there already is compared: equal bytes are an earlier try whose answer was lost, or another
        worker that was quicker. Other bytes have no commit record, else the shard would not be built again: they are
        what a killed run left, and are replaced.
        """
        temporary.sync()
        self.put_file(temporary.path, name, sha256)

    def put_file(self, source: Path, name: str, sha256: str) -> None:
        """A whole local file as `name`, which others see complete or not at all."""
        try:
            self._call(name, lambda: self._put(source, name, mode="create"))
        except FileExistsError:
            if self._sha256(name) != sha256:
                self._call(name, lambda: self._put(source, name))

    def _put(self, source: Path, name: str, **options: Any) -> None:
        if self.url.partition("://")[0] in ("s3", "s3a"):
            options["chunksize"] = PART_BYTES
        try:
            self._filesystem.put_file(str(source), self._path(name), **options)
        except FileNotFoundError as error:
            if "upload" not in str(error):
                raise
            # The answer to the last request of an upload in parts was lost, and the upload is finished or gone.
            raise remote.Unfinished(str(error)) from None

    def _sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self.open(name) as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def write(self, name: str, data: bytes) -> None:
        """Replace `name` by `data`, all or nothing."""
        self._call(name, lambda: self._filesystem.pipe_file(self._path(name), data))

    def sweep(self) -> int:
        """Remove this machine's temporary files of writers that are gone."""
        return sweep_folder(Path(tempfile.gettempdir()), self._label)


def read_object_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`; fewer where the object ends. Raises: FileNotFoundError, StageError."""
    short: list[bytes] = []

    def request() -> bytes:
        files, path = remote.filesystem(url)
        data = files.cat_file(path, start=offset, end=offset + size)
        if len(data) < size and len(short) < 2:  # a body that was cut; the object's real end says so every time
            short.append(data)
            raise remote.Unfinished(f"{len(data)} of {size} bytes came")
        return data

    return remote.call(url, request) if size else b""


def read_object_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Several (offset, size), at once."""
    if len(ranges) < 2:
        return [read_object_range(url, *one) for one in ranges]
    with ThreadPoolExecutor(min(_RANGES_AT_ONCE, len(ranges))) as pool:
        return list(pool.map(lambda one: read_object_range(url, *one), ranges))


class RangeReader:
    """A seekable file of known size over ranged reads of `block_bytes`, the next of which is fetched meanwhile."""

    def __init__(self, url: str, size: int, block_bytes: int = _HASH_BYTES):
        self.url, self.size, self.block_bytes = url, size, block_bytes
        self._place = 0
        self._blocks: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(2)

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is being fetched."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._blocks.clear()

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of files."""
        self._place = max(0, (0, self._place, self.size)[whence] + offset)
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; all that are left for -1. Raises: ValueError when the object has become shorter."""
        end = self.size if size < 0 else min(self.size, self._place + size)
        parts = []
        while self._place < end:
            number, start = divmod(self._place, self.block_bytes)
            block = self._block(number)
            part = block[start : start + end - self._place]
            if not part:
                raise ValueError(f"{self.url} ends at byte {self._place}, not at {self.size}")
            parts.append(part)
            self._place += len(part)
        return b"".join(parts)

    def _block(self, number: int) -> bytes:
        for wanted in (number, number + 1):
            start = wanted * self.block_bytes
            if wanted not in self._blocks and start < self.size:
                length = min(self.block_bytes, self.size - start)
                self._blocks[wanted] = self._pool.submit(read_object_range, self.url, start, length)
        for old in [known for known in self._blocks if known < number]:
            del self._blocks[old]
        return self._blocks[number].result()
