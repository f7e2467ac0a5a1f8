"""Sources as they are found, and how each is opened: local file, staged copy of a remote one, tar member, pictures."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import fsspec

from kinema.pipelines.artifacts import remote
from kinema.pipelines.artifacts.object_store import RangeReader
from kinema.pipelines.video.container_size import SeekableReader, missing_end
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.errors import Empty, Missing
from kinema.pipelines.video.frame_folder import FrameFolder
from kinema.pipelines.video.part import VideoPart

Value = TypeVar("Value")
AnyVideo = VideoFile | VideoPart | FrameFolder
"""What a source is once it is open."""
_BLOCK_BYTES = 1 << 20
_CONTENT_NAMES = ("ETag", "etag", "md5Hash", "crc32c", "content_md5")  # as object stores call them


@dataclass(frozen=True)
class Source:
    """One video to be cut into clips."""

    id: str
    """Dataset-relative name, with `/` between folders; the same wherever the data set lies."""
    url: str
    """Path or URL of the file, of the tar that holds it, or of the folder of pictures."""
    offset: int = 0
    """Where the video starts inside a tar."""
    size: int | None = None
    """Bytes of the video inside a tar; None: the whole file."""
    labels: dict[str, Any] | None = None
    """What the data set says about it (manifest columns, other members of its tar sample)."""
    pictures: tuple[str, ...] = ()
    """Paths of a frame folder's pictures, in order."""
    packing: str = ""
    """How the file at `url` is compressed (gzip, bz2, xz), where a member of a compressed tar is meant."""
    segment: tuple[float, float | None] | None = None
    """Start and end in seconds of the part that is meant; None: the whole video."""
    masks: tuple[str | None, ...] = ()
    """Path of each picture's mask, None where it has none; empty without masks."""

    @property
    def is_frames(self) -> bool:
        """Whether it is a folder of pictures."""
        return bool(self.pictures)


def is_remote(url: str) -> bool:
    """Whether a URL needs fsspec; plain paths and file:// do not."""
    protocol, found, _ = url.partition("://")
    return bool(found) and protocol not in ("file", "local")


def local_path(url: str) -> str:
    """The absolute path of a local URL."""
    return os.path.abspath(os.path.expanduser(url.partition("://")[2] if "://" in url else url))


def read_all(url: str) -> bytes:
    """All bytes of a local or remote file. Raises: OSError."""
    if not is_remote(url):
        with open(local_path(url), "rb") as file:
            return file.read()
    return ask(url, lambda files, path: files.cat_file(path))


def open_bytes(url: str) -> BinaryIO:
    """A seekable reader of a local or remote file. Raises: OSError."""
    if not is_remote(url):
        return open(local_path(url), "rb")
    if url.startswith(("http://", "https://")):  # not every web server knows sizes and ranges
        return ask(url, lambda files, path: files.open(path, "rb"))
    return RangeReader(url, int(ask(url, lambda files, path: files.size(path))))  # type: ignore[return-value]


def ask(url: str, request: Callable[[fsspec.AbstractFileSystem, str], Value]) -> Value:
    """The answer of a URL's store, asked again while its failure may pass.

    Raises: FileNotFoundError, and OSError for what the store refuses, which concern this file; StageError when the
        store does not answer, which concerns the run.
    """
    try:
        return remote.call(url, lambda: request(*remote.filesystem(url)))
    except remote.Refused as error:
        raise OSError(str(error)) from None


_PACKINGS = {b"\x1f\x8b": "gzip", b"BZ": "bz2", b"\xfd7": "xz"}
_UNPACK: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}


@contextmanager
def open_unpacked(url: str, packing: str | None = None) -> Iterator[tuple[BinaryIO, str]]:
    """A reader of a file's bytes before compression, and how it is compressed ("" for not at all).

    Going back in a compressed file reads it again from the beginning.
    Args: packing, as found before; None looks at the first bytes.
    Raises: OSError.
    """
    with open_bytes(url) as file:
        if packing is None:
            packing = _PACKINGS.get(file.read(2), "")
            file.seek(0)
        yield (_UNPACK[packing](file) if packing else file), packing


class Window(io.RawIOBase):
    """Part of a file as a file of its own, for a video inside a tar."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._offset + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


@contextmanager
def open_source(source: Source, frames_fps: float, stream: int = -1, deinterlace: bool = True) -> Iterator[AnyVideo]:
    """Open a source for decoding.

    A remote file is copied to an anonymous temporary file, which the system removes however the process ends.
    Raises: SourceError (Missing, Empty, Undecodable, Truncated, NoVideoStream).
    """
    if source.is_frames:
        yield FrameFolder(source.pictures, frames_fps, read_all)
        return
    with _seekable(source) as (file, name):
        num_bytes = file.seek(0, io.SEEK_END)
        if num_bytes == 0:
            raise Empty("the file has 0 bytes")
        cut = missing_end(file, num_bytes)
        file.seek(0)
        with VideoFile(name or file, cut, stream, deinterlace) as video:
            yield VideoPart(video, *source.segment) if source.segment else video


@contextmanager
def _seekable(source: Source) -> Iterator[tuple[SeekableReader, str | None]]:
    """The source's bytes as a local reader, and a path that FFmpeg can open instead where there is one."""
    with ExitStack() as stack:
        try:
            file, packing = stack.enter_context(open_unpacked(source.url, source.packing))
        except OSError as error:
            raise Missing(f"cannot be read: {error.strerror or error}") from None
        part = _part_of(file, source)
        if not is_remote(source.url) and not packing:
            yield part, local_path(source.url) if source.size is None else None
            return
        with tempfile.TemporaryFile(prefix="kinema-") as staged:
            shutil.copyfileobj(part, staged, _BLOCK_BYTES)
            staged.seek(0)
            yield staged, f"/proc/self/fd/{staged.fileno()}" if sys.platform == "linux" else None


def _part_of(file: BinaryIO, source: Source) -> SeekableReader:
    """The source's own bytes of its open file."""
    return file if source.size is None else Window(file, source.offset, source.size)


def content_hash(source: Source, progress: Callable[[], None] | None = None) -> str:
    """blake2b (32 hex digits) of the source's bytes; of a frame folder: of names and bytes of pictures and masks.

    Raises: Missing.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        if source.is_frames:
            for path in (*source.pictures, *(m for m in source.masks if m)):
                data = hashlib.blake2b(read_all(path), digest_size=16).hexdigest()
                digest.update(f"{path.rpartition('/')[2]} {data}\n".encode())
        else:
            with open_unpacked(source.url, source.packing) as (file, _):
                part = _part_of(file, source)
                while block := part.read(_BLOCK_BYTES):
                    digest.update(block)
                    if progress:
                        progress()
    except (OSError, EOFError, ValueError) as error:
        raise Missing(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return digest.hexdigest()


def fingerprint(source: Source) -> str | None:
    """What an object store says about a remote object's content (ETag, checksum); None where it says nothing.

    Equal fingerprints mean equal content, so that the object need not be fetched to be compared.
    """
    if source.is_frames or not is_remote(source.url):
        return None
    try:
        info = ask(source.url, lambda files, path: files.info(path))
    except OSError:
        return None
    stated = next((str(info[name]) for name in _CONTENT_NAMES if info.get(name)), None)
    return f"{stated}:{info.get('size')}:{source.offset}:{source.size}" if stated else None
