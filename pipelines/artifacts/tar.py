"""Deterministic tar shards with known payload offsets, and their strict reader.

USTAR headers with mtime 0, uid and gid 0, mode 0644; members of a sample sorted by extension; two zero blocks end the
file. Nothing but keys and payloads reaches the bytes.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 512
MODE = 0o644
END_OF_TAR = bytes(2 * BLOCK_BYTES)
LARGEST_MEMBER_BYTES = 8**11 - 1  # eleven octal digits of a USTAR header
_KEY = re.compile(r"[0-9a-f]{32}")
_EXTENSION = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """One file inside a shard: `offset` and `size` are those of its payload, in bytes from the start of the tar."""

    name: str
    offset: int
    size: int
    sha256: str

    @property
    def key(self) -> str:
        """The sample's key."""
        return self.name.partition(".")[0]

    @property
    def extension(self) -> str:
        """Everything after the first dot, as WebDataset reads it."""
        return self.name.partition(".")[2]


def check_key(key: str) -> str:
    """The key itself. Raises: ValueError unless it is 32 lower-case hex digits."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"sample key {key!r} is not 32 lower-case hex digits; use artifacts.sample_key")
    return key


def check_extension(extension: str) -> str:
    """The extension itself. Raises: ValueError unless it is lower-case letters, digits, `_`, with inner dots."""
    if not _EXTENSION.fullmatch(extension):
        raise ValueError(
            f"member extension {extension!r} must be lower-case letters, digits and _, like mp4 or masks.npz"
        )
    return extension


def _header(name: str, size: int) -> bytes:
    if size > LARGEST_MEMBER_BYTES:
        raise ValueError(f"{name} has {size} bytes, more than the 8 GiB a tar member can hold; use shorter clips")
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = MODE
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except ValueError as error:
        raise ValueError(f"{name} cannot be the name of a tar member: {error}; use a shorter extension") from None


class TarBuilder:
    """Appends samples to an open file through `write` and remembers where every payload lies.

    The bytes are those of WebDataset's TarWriter up to the two zero blocks that end a tar; the zeros with which
    tarfile fills its last record of 10 KiB are left out. A builder that is not finished must be discarded.
    """

    def __init__(self, write: Callable[[bytes | memoryview], object]):
        from webdataset.writer import TarWriter  # brings torch along, which planning and reading do without

        self._sink = _Sink(write)
        self._writer = TarWriter(self._sink, user="", group="", mode=MODE, mtime=0, encoder=False)
        self.members: list[Member] = []

    @property
    def num_bytes(self) -> int:
        """Bytes written so far, those that still wait in a buffer included."""
        return self._sink.limit or self._writer.tarstream.offset

    def add(self, key: str, payloads: Mapping[str, bytes | memoryview]) -> dict[str, Member]:
        """Append one sample, members in order of extension.

        Returns: the member of every extension. Raises: ValueError for a bad key, extension or size.
        """
        check_key(key)
        if not payloads:
            raise ValueError(f"sample {key} has no members")
        for ext in payloads:
            _header(f"{key}.{check_extension(ext)}", len(payloads[ext]))
        added, position = {}, self.num_bytes
        for ext in sorted(payloads):
            size = len(payloads[ext])
            digest = hashlib.sha256(payloads[ext]).hexdigest()
            added[ext] = Member(f"{key}.{ext}", position + BLOCK_BYTES, size, digest)
            position += BLOCK_BYTES + size + -size % BLOCK_BYTES
        self._writer.write({"__key__": key, **payloads})
        assert self.num_bytes == position, "a tar member is a header block and whole blocks of payload"
        self.members += added.values()
        return added

    def finish(self) -> str:
        """Write the two zero blocks; returns the sha256 of the whole tar."""
        self._sink.limit = self.num_bytes + len(END_OF_TAR)
        self._writer.close()
        return self._sink.digest.hexdigest()

    def discard(self) -> None:
        """Nothing that still waits in a buffer is written any more."""
        self._sink.limit = self._sink.position


class _Sink:
    """The file object that TarWriter sees: hashes what it passes on, and passes on nothing behind `limit`."""

    def __init__(self, write: Callable[[bytes | memoryview], object]):
        self._write = write
        self.digest = hashlib.sha256()
        self.position = 0
        self.limit: int | None = None

    def write(self, data: bytes) -> int:
        """As of any binary file."""
        kept = data if self.limit is None else data[: max(0, self.limit - self.position)]
        if kept:
            self._write(kept)
            self.digest.update(kept)
            self.position += len(kept)
        return len(data)


def read_members(file: BinaryIO) -> Iterator[Member | str]:
    """Every member of a tar in one pass, hashed; the last item is the sha256 of all its bytes.

    Raises: ValueError when the tar is cut, damaged, not as TarBuilder writes it, or does not end with exactly two
    zero blocks.
    """
    digest = hashlib.sha256()
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        data = file.read(size)
        if len(data) != size:
            raise ValueError(f"cut at byte {position + len(data)}")
        digest.update(data)
        position += size
        return data

    while (block := take(BLOCK_BYTES)) != bytes(BLOCK_BYTES):
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise ValueError(f"bad member header at byte {position - BLOCK_BYTES}: {error}") from None
        if block != _header(info.name, info.size):
            raise ValueError(f"member header of {info.name!r} is not one this program writes")
        start, payload, left = position, hashlib.sha256(), info.size
        while left:
            data = take(min(left, _READ_BYTES))
            payload.update(data)
            left -= len(data)
        if any(take(-info.size % BLOCK_BYTES)):
            raise ValueError(f"padding after {info.name!r} is not zero")
        yield Member(info.name, start, info.size, payload.hexdigest())
    if any(take(BLOCK_BYTES)) or file.read(1):
        raise ValueError(f"the tar does not end with two zero blocks at byte {position}")
    yield digest.hexdigest()
