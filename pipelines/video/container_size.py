"""How many bytes a container says it has: tells a file that was cut off from one that is damaged inside."""

from __future__ import annotations

from typing import Protocol

_MP4_FIRST = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067


class SeekableReader(Protocol):
    """What is asked of a file of bytes that a video is read from."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; all that are left when negative."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move as files do; returns the new position."""


class _OwnPosition:
    """A view of a reader that does not mind where others move it: several containers read one file in turn."""

    def __init__(self, file: SeekableReader):
        self._file, self._position = file, 0

    def read(self, size: int = -1, /) -> bytes:
        self._file.seek(self._position)
        data = self._file.read(size)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if whence == 1:
            offset, whence = offset + self._position, 0
        self._position = self._file.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position


def own_position(file: str | SeekableReader) -> str | SeekableReader:
    """The same file for one more container, from its beginning."""
    return file if isinstance(file, str) else _OwnPosition(file)


def missing_end(file: SeekableReader, num_bytes: int) -> str | None:
    """What shows that the file ends too early, or None when nothing does.

    Reads the outermost structure of MP4 and QuickTime (boxes), Matroska and WebM (segment), AVI and WAV (RIFF).

    Args: file: seekable; its position changes. num_bytes: its size.
    """
    file.seek(0)
    head = file.read(12)
    if head[4:8] in _MP4_FIRST:
        return _check_boxes(file, num_bytes)
    if head[:4] == _EBML.to_bytes(4, "big"):
        return _check_segment(file, num_bytes)
    if head[:4] == b"RIFF":
        return _too_short(8 + int.from_bytes(head[4:8], "little"), num_bytes, "RIFF chunk")
    return None


def is_whole(file: SeekableReader, num_bytes: int) -> bool:
    """Whether the file's outermost structure says where it ends, and it goes that far.

    MP4 and QuickTime: boxes up to the last byte and an index; Matroska and WebM: a segment of known size; AVI: a RIFF
    chunk. False where the structure says nothing (streams that were written without going back).
    """
    if missing_end(file, num_bytes) is not None:
        return False
    file.seek(0)
    head = file.read(12)
    if head[4:8] in _MP4_FIRST:
        return _walk_boxes(file, num_bytes)[1] >= {b"moov", b"mdat"}
    if head[:4] == _EBML.to_bytes(4, "big"):
        return _segment_end(file, num_bytes) is not None
    return head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") > 0


def _too_short(end: int, num_bytes: int, what: str) -> str | None:
    return f"the {what} ends at byte {end}, the file at byte {num_bytes}" if end > num_bytes else None


def _check_boxes(file: SeekableReader, num_bytes: int) -> str | None:
    beyond, seen = _walk_boxes(file, num_bytes)
    if beyond is not None:
        return beyond
    if b"moov" not in seen and b"mdat" in seen:
        return "the file has no moov box: it was cut off before its index was written"
    return None


def _walk_boxes(file: SeekableReader, num_bytes: int) -> tuple[str | None, set[bytes]]:
    """What shows that the last box is cut, and the kinds of boxes before the first damaged one."""
    position, seen = 0, set()
    while position + 8 <= num_bytes:
        file.seek(position)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        elif size == 0:
            size = num_bytes - position
        if size < 8 or not kind.isascii():
            return None, set()  # damaged rather than cut
        seen.add(kind)
        if position + size > num_bytes:
            name = kind.decode("ascii", "replace")
            return _too_short(position + size, num_bytes, f"{name} box"), seen
        position += size
    return None, seen


def _check_segment(file: SeekableReader, num_bytes: int) -> str | None:
    end = _segment_end(file, num_bytes)
    return None if end is None else _too_short(end, num_bytes, "Matroska segment")


def _segment_end(file: SeekableReader, num_bytes: int) -> int | None:
    """Where the segment ends; None when it was written as a stream, or there is none."""
    position = 0
    while position < num_bytes:
        file.seek(position)
        head = file.read(12)
        id_length = _vint_length(head[:1])
        size_length = _vint_length(head[id_length : id_length + 1])
        if not id_length or not size_length:
            return None
        number = int.from_bytes(head[:id_length], "big")
        mask = (1 << (7 * size_length)) - 1
        size = int.from_bytes(head[id_length : id_length + size_length], "big") & mask
        if size == mask:
            return None  # written as a stream: the size is unknown
        position += id_length + size_length + size
        if number == _SEGMENT:
            return position
    return None


def _vint_length(first: bytes) -> int:
    """Bytes of an EBML number by its first byte; 0 for an impossible one."""
    return 9 - first[0].bit_length() if first and first[0] else 0
