"""The tracks sidecar's blob: all stored point tracks of one clip; header and queries are readable by themselves.

Layout, little-endian:

    prelude   40 bytes: magic, version, header size, number of tracks, CRC-32 of header and queries, then size and
              CRC-32 of each payload
    header    JSON: height, width, scale, tracker, weights_hash, frames, num_saturated
    queries   float32 [N, 3]: (t, x, y), the frame and place each track was started from
    points    int16 fixed point from the middle of the frame, one zstd frame
    visible   packed bits [T, N], one zstd frame

Points are stored planar (all x, then all y), each track as differences in time, folded to unsigned and split into low
and high bytes as in flow_codec. Differences wrap modulo 2^16 and so does their sum: the integers come back exactly.
`scale`, steps per pixel, follows from the clip's size: points up to a side's length outside of the frame fit (1/64 px
up to 341 px, 1/25 px at 864, 1/11 px at 1920). Points beyond are clipped and counted.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int16

from kinema.configs.json_text import json_text
from kinema.pipelines.sidecars.flow_codec import CODEC, ReadRange, decompress, pack_differences, unpack_differences

MAGIC = b"KINETRKS"
VERSION = 1
FINEST_SCALE = 64

# Half a frame from its middle to its edge, and a whole one outside.
_REACH_IN_SIDES = 1.5
_PRELUDE = struct.Struct("<8s8I")
_QUERY_BYTES = 12
_FIRST_READ_BYTES = 16384
_LIKELY_HEADER_BYTES = 512

Frames = slice | Sequence[int]
_ALL = slice(None)


@dataclass(frozen=True)
class Tracks:
    """Point tracks of one clip. Positions are known in every frame; where not visible, they are the tracker's guess."""

    points_px: Float32[np.ndarray, "T N 2"]
    """(x, y) in pixels of `size`, centres at integers; may lie outside of the frame."""
    visible: Bool[np.ndarray, "T N"]
    size: tuple[int, int]
    """(height, width) of the frames that the tracker saw."""
    queries: Float32[np.ndarray, "N 3"]
    """(t, x, y) each track was started from."""


@dataclass(frozen=True)
class StoredTracks:
    """The same with positions as they are stored: those of a few frames cost little of what all would."""

    steps: Int16[np.ndarray, "T N 2"]
    """(x, y) from the middle of the frame, in steps of 1 / scale pixels."""
    scale: int
    visible: Bool[np.ndarray, "T N"]
    size: tuple[int, int]

    def points_px(self, frames: Frames = _ALL) -> Float32[np.ndarray, "t N 2"]:
        """(x, y) in pixels of `size`, as in `Tracks`."""
        return (self.steps[frames] / self.scale + _middle(*self.size)).astype(np.float32)


@dataclass(frozen=True)
class TracksHeader:
    """What a blob's tracks share. `scale`: steps per pixel; `num_saturated`: coordinates that were clipped."""

    height: int
    width: int
    scale: int
    tracker: str
    weights_hash: str
    frames: int
    num_saturated: int


def scale_for(height: int, width: int) -> int:
    """Steps per pixel at which every point up to a side's length outside of the frame fits into int16."""
    return max(1, min(FINEST_SCALE, int(np.iinfo(np.int16).max / (_REACH_IN_SIDES * max(height, width)))))


def encode_tracks(tracks: Tracks, *, tracker: str, weights_hash: str) -> bytes:
    """Pack the tracks of one clip; equal tracks give equal bytes.

    Raises: ValueError for shapes that disagree, an empty size, or values that are not finite.
    """
    _check(tracks)
    height, width = tracks.size
    num_frames, num_tracks = tracks.visible.shape
    scale = scale_for(height, width)
    limits = np.iinfo(np.int16)
    steps = np.rint((np.asarray(tracks.points_px, np.float64) - _middle(height, width)) * scale)
    num_saturated = int(((steps < limits.min) | (steps > limits.max)).sum())
    integers = np.clip(steps, limits.min, limits.max).astype(np.int16)
    header = TracksHeader(height, width, scale, tracker, weights_hash, num_frames, num_saturated)
    header_json = json_text(asdict(header), sort_keys=True, separators=(",", ":")).encode()
    index = header_json + np.ascontiguousarray(tracks.queries, "<f4").tobytes()
    points = CODEC.compress(pack_differences(np.ascontiguousarray(integers.transpose(2, 1, 0))), asbytes=True)
    visible = CODEC.compress(np.packbits(np.asarray(tracks.visible, bool).ravel()).tobytes(), asbytes=True)
    prelude = _PRELUDE.pack(
        MAGIC,
        VERSION,
        len(header_json),
        num_tracks,
        zlib.crc32(index),
        len(points),
        zlib.crc32(points),
        len(visible),
        zlib.crc32(visible),
    )
    return b"".join([prelude, index, points, visible])


class TracksBlob:
    """Reader of one blob: header and queries at once, the tracks when asked for.

    Args: source, the blob's bytes, or a function (offset, size) -> bytes; size, the blob's size in bytes, and
        num_tracks, if known: they let header and queries come in one read, of little more than their bytes.
    Raises: ValueError when the bytes are not a blob, are cut short or damaged.
    """

    def __init__(self, source: bytes | ReadRange, size: int | None = None, num_tracks: int | None = None):
        if callable(source):
            self._read_range: ReadRange = source
        else:
            data, size = source, len(source)
            self._read_range = lambda offset, count: data[offset : offset + count]
        first_bytes = _FIRST_READ_BYTES
        if num_tracks is not None:
            first_bytes = _PRELUDE.size + _LIKELY_HEADER_BYTES + num_tracks * _QUERY_BYTES
        self._read_index(size, first_bytes)

    @property
    def num_tracks(self) -> int:
        """Tracks in the blob."""
        return len(self.queries)

    def tracks(self) -> Tracks:
        """All tracks, in one read."""
        stored = self.stored_tracks()
        return Tracks(stored.points_px(), stored.visible, stored.size, self.queries)

    def stored_tracks(self) -> StoredTracks:
        """All tracks, in one read, their positions not yet in pixels."""
        header, (points_size, points_crc, visible_size, visible_crc) = self.header, self._payloads
        payload = self._read(self._start, points_size + visible_size)
        num = header.frames * self.num_tracks
        points = decompress(payload[:points_size], 4 * num, points_crc, "points of tracks")
        packed = decompress(payload[points_size:], (num + 7) // 8, visible_crc, "visibility of tracks")
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=num).view(bool)
        steps = unpack_differences(points, self.num_tracks, header.frames).transpose(2, 1, 0)
        visible = bits.reshape(header.frames, self.num_tracks)
        return StoredTracks(steps, header.scale, visible, (header.height, header.width))

    def _read(self, offset: int, size: int) -> bytes:
        data = self._read_range(offset, size)
        if len(data) != size:
            raise ValueError(f"tracks blob is cut short: {len(data)} bytes at {offset}, expected {size}")
        return bytes(data)

    def _read_index(self, size: int | None, first_bytes: int) -> None:
        """Check the prelude, then parse header and queries; the first read usually holds all of them."""
        if size is not None and size < _PRELUDE.size:
            raise ValueError(f"tracks blob has {size} bytes, fewer than its {_PRELUDE.size} byte prelude")
        first = self._read(0, _PRELUDE.size if size is None else min(size, first_bytes))
        fields = _PRELUDE.unpack(first[: _PRELUDE.size])
        magic, version, header_size, num_tracks, crc, *self._payloads = fields
        if magic != MAGIC:
            raise ValueError(f"not a tracks blob: it starts with {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise ValueError(f"tracks blob version {version} is not {VERSION}, the one this code reads")
        self._start = _PRELUDE.size + header_size + num_tracks * _QUERY_BYTES
        blob_size = self._start + self._payloads[0] + self._payloads[2]
        if size is not None and size != blob_size:
            raise ValueError(f"tracks blob has {size} bytes, its prelude says {blob_size}: cut or joined")
        rest = b"" if self._start <= len(first) else self._read(len(first), self._start - len(first))
        index = first[_PRELUDE.size : self._start] + rest
        if zlib.crc32(index) != crc:
            raise ValueError("tracks blob is damaged: the checksum of its header and queries does not match")
        self.header = TracksHeader(**json.loads(index[:header_size]))
        self.queries: Float32[np.ndarray, "N 3"] = np.frombuffer(index, "<f4", offset=header_size).reshape(-1, 3).copy()


def _check(tracks: Tracks) -> None:
    height, width = tracks.size
    shape = tracks.visible.shape
    if min(height, width) < 1 or len(shape) != 2 or shape[0] < 1:
        raise ValueError(f"tracks over {shape} frames and points of {height}x{width} are empty or misshapen")
    if tracks.points_px.shape != (*shape, 2) or tracks.queries.shape != (shape[1], 3):
        raise ValueError(
            f"tracks disagree: points {tracks.points_px.shape}, visible {shape}, queries {tracks.queries.shape}; "
            "use [T, N, 2], [T, N] and [N, 3]"
        )
    for name, values in (("points", tracks.points_px), ("queries", tracks.queries)):
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise ValueError(f"tracks have {bad} {name} that are not finite; quarantine the clip or mend the tracker")


def _middle(height: int, width: int) -> Float[np.ndarray, "2"]:
    return np.array([(width - 1) / 2, (height - 1) / 2])
