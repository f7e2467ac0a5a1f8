"""The flow sidecar's blob: all stored flow of one clip, any pair of frames readable by itself.

Layout, little-endian:

    prelude   32 bytes: magic, version, header size, number of pairs, CRC-32 of header and table, blob size
    header    JSON: height, width, scale, teacher, weights_hash, frames
    table     a fixed-size row per pair, ordered by (t, gap): where its payload lies, sizes, CRC-32s, counts
    payloads  per pair: flow, packed occlusion, uncertainty, packed validity (each where stored), each one zstd frame

A flow payload is int16 fixed point (1/64 px), planar (u, then v), each row as differences in x. The
differences are folded to unsigned (0, -1, 1, -2 -> 0, 1, 2, 3), so that their high bytes are nearly all zero,
and low and high bytes are stored as two planes, which zstd packs a quarter smaller and unpacks twice as fast
as interleaved ones. Differences wrap modulo 2^16 and so does their sum: the integers come back exactly. The
rounding error is at most 1/128 px. A pair with values beyond +-512 px is stored at 1/16 px (error 1/32 px);
values beyond +-2048 px are clipped.

Uncertainty (the teacher's own expected error, px) is stored as one byte per pixel, 16 steps per octave from 2^-8 px:
to within 2.2 %, clipped at 2^-8 and 2^7.9 px. A blob that holds any has version 2 and two more fields in its table.

Validity (measured flow is not known everywhere) is one bit per pixel; flow is nan where it is not set. Stored numbers
go on there as to the left, which costs next to nothing. A blob that holds any has version 3 and two fields more.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float32, Int16

from kinema.configs.json_text import json_text

MAGIC = b"KINEFLOW"
VERSION = 1
UNCERTAIN_VERSION = 2
PARTIAL_VERSION = 3
SCALE = 64
COARSE_DIVISOR = 4

_PRELUDE = struct.Struct("<8sIIIIQ")
_ROW = np.dtype(
    [
        ("t", "<i4"),
        ("gap", "<i4"),
        ("offset", "<u8"),
        ("flow_size", "<u4"),
        ("occlusion_size", "<u4"),
        ("flow_crc", "<u4"),
        ("occlusion_crc", "<u4"),
        ("scale", "<u4"),
        ("num_saturated", "<u4"),
        ("num_clipped", "<u4"),
    ]
)
_UNCERTAIN_ROW = np.dtype([*_ROW.descr, ("uncertainty_size", "<u4"), ("uncertainty_crc", "<u4")])
_PARTIAL_ROW = np.dtype([*_UNCERTAIN_ROW.descr, ("valid_size", "<u4"), ("valid_crc", "<u4")])
_ROWS = {VERSION: _ROW, UNCERTAIN_VERSION: _UNCERTAIN_ROW, PARTIAL_VERSION: _PARTIAL_ROW}
_UNCERTAINTY_STEPS = 16
_UNCERTAINTY_OFFSET = 8
_FIRST_READ_BYTES = 16384
_LIKELY_HEADER_BYTES = 512
# Level 3 costs a fifth of level 6's time for 5 % more bytes; decoding takes the same time at every level.
CODEC = pa.Codec("zstd", compression_level=3)

ReadRange = Callable[[int, int], bytes]


@dataclass(frozen=True)
class FlowPair:
    """Flow from frame `t` to frame `t + gap` (gap is signed), in pixels of the flow's own size.

    `uncertainty_px`: the error that the teacher itself expects at each pixel. `valid`: where flow is known, it is nan
    elsewhere; None: everywhere.
    """

    t: int
    gap: int
    flow_px: Float32[np.ndarray, "2 H W"]
    occlusion: Bool[np.ndarray, "H W"] | None = None
    uncertainty_px: Float32[np.ndarray, "H W"] | None = None
    valid: Bool[np.ndarray, "H W"] | None = None


@dataclass(frozen=True)
class FlowHeader:
    """What the pairs of a blob share. `scale`: fixed-point steps per pixel; `frames`: frames of the clip."""

    height: int
    width: int
    scale: int
    teacher: str
    weights_hash: str
    frames: int


def encode_clip_flow(
    pairs: Iterable[FlowPair],
    *,
    height: int,
    width: int,
    teacher: str,
    weights_hash: str,
    frames: int,
    scale: int = SCALE,
) -> bytes:
    """Pack the flow of one clip; the bytes depend on the pairs, not on the order in which they come.

    Args: pairs, consumed one by one (only compressed payloads are held); height, width of every flow;
        frames of the clip; scale, steps per pixel.
    Raises: ValueError for a wrong shape, a non-finite value, a pair outside the clip, or a pair given twice.
    """
    if scale < COARSE_DIVISOR or scale % COARSE_DIVISOR:
        raise ValueError(f"flow scale {scale} is not a positive multiple of {COARSE_DIVISOR}; use {SCALE}")
    if height < 1 or width < 1 or frames < 1:
        raise ValueError(f"flow of {height}x{width} over {frames} frames is empty; all three must be positive")
    header = FlowHeader(height, width, scale, teacher, weights_hash, frames)
    encoded: dict[tuple[int, int], tuple[dict[str, int], bytes]] = {}
    for pair in pairs:
        _check_pair(pair, header)
        if (pair.t, pair.gap) in encoded:
            raise ValueError(f"flow pair t={pair.t} gap={pair.gap} was given twice; each pair is stored once")
        encoded[pair.t, pair.gap] = _encode_pair(pair, scale)

    header_json = json_text(asdict(header), sort_keys=True, separators=(",", ":")).encode()
    version = VERSION
    for needed, size in ((UNCERTAIN_VERSION, "uncertainty_size"), (PARTIAL_VERSION, "valid_size")):
        version = needed if any(fields[size] for fields, _ in encoded.values()) else version
    table = np.zeros(len(encoded), _ROWS[version])
    offset = _PRELUDE.size + len(header_json) + table.nbytes
    payloads = []
    for row, place in enumerate(sorted(encoded)):
        fields, payload = encoded[place]
        for name in set(fields) & set(table.dtype.names or ()):
            table[name][row] = fields[name]
        table["offset"][row] = offset
        offset += len(payload)
        payloads.append(payload)
    index = header_json + table.tobytes()
    prelude = _PRELUDE.pack(MAGIC, version, len(header_json), len(table), zlib.crc32(index), offset)
    return b"".join([prelude, index, *payloads])


class FlowBlob:
    """Reader of one blob; a pair costs one ranged read of its own bytes.

    Args: source, the blob's bytes, or a function (offset, size) -> bytes; size, the blob's size in bytes, and
        num_pairs, if known: they let header and table come in one read, of little more than their bytes.
    Raises: ValueError when the bytes are not a blob, are cut short or damaged; on reading a pair: KeyError
        for a pair that is not stored, ValueError when its bytes are damaged.
    """

    def __init__(self, source: bytes | ReadRange, size: int | None = None, num_pairs: int | None = None):
        if callable(source):
            self._read_range: ReadRange = source
        else:
            data, size = source, len(source)
            self._read_range = lambda offset, count: data[offset : offset + count]
        self._size = size
        self._first_read_bytes = _FIRST_READ_BYTES
        if num_pairs is not None:
            self._first_read_bytes = _PRELUDE.size + _LIKELY_HEADER_BYTES + num_pairs * _PARTIAL_ROW.itemsize
        self.header, self._table = self._read_index()
        places = zip(self._table["t"].tolist(), self._table["gap"].tolist(), strict=True)
        self._rows = {place: row for row, place in enumerate(places)}

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Stored pairs as (t, gap), ordered."""
        return list(self._rows)

    @property
    def num_saturated(self) -> int:
        """Elements beyond +-512 px, for which their pairs are stored at 1/16 px."""
        return int(self._table["num_saturated"].sum())

    @property
    def num_clipped(self) -> int:
        """Elements beyond +-2048 px, which come back clipped."""
        return int(self._table["num_clipped"].sum())

    @property
    def index_bytes(self) -> int:
        """Bytes of prelude, header and table, which every reader fetches."""
        return self._index_bytes

    def flow(self, t: int, gap: int) -> Float32[np.ndarray, "2 H W"]:
        """Flow t -> t + gap in pixels of the stored size, nan where it is not known."""
        if self._part_size(self._row(t, gap), "valid_size"):
            return self.pair(t, gap).flow_px
        row = self._row(t, gap)
        return self._decode_flow(row, self._read(int(row["offset"]), int(row["flow_size"])))

    def occlusion(self, t: int, gap: int) -> Bool[np.ndarray, "H W"] | None:
        """True where frame t's pixel is hidden in frame t + gap; None for a pair stored without occlusion."""
        row = self._row(t, gap)
        size = int(row["occlusion_size"])
        if size == 0:
            return None
        return self._decode_bits(row, "occlusion", self._read(int(row["offset"]) + int(row["flow_size"]), size))

    def uncertainty(self, t: int, gap: int) -> Float32[np.ndarray, "H W"] | None:
        """The teacher's expected error in pixels; None for a pair stored without it."""
        row = self._row(t, gap)
        size = self._part_size(row, "uncertainty_size")
        if size == 0:
            return None
        offset = int(row["offset"]) + int(row["flow_size"]) + int(row["occlusion_size"])
        return self._decode_uncertainty(row, self._read(offset, size))

    def pair(self, t: int, gap: int) -> FlowPair:
        """All that is stored of a pair, in one read."""
        row = self._row(t, gap)
        names = ("flow_size", "occlusion_size", "uncertainty_size", "valid_size")
        ends = np.cumsum([self._part_size(row, name) for name in names]).tolist()
        payload = self._read(int(row["offset"]), ends[-1])
        flow = self._decode_flow(row, payload[: ends[0]])
        occlusion = self._decode_bits(row, "occlusion", payload[ends[0] : ends[1]]) if ends[1] > ends[0] else None
        uncertainty = self._decode_uncertainty(row, payload[ends[1] : ends[2]]) if ends[2] > ends[1] else None
        valid = self._decode_bits(row, "valid", payload[ends[2] :]) if ends[3] > ends[2] else None
        if valid is not None:
            flow[:, ~valid] = np.nan
        return FlowPair(t, gap, flow, occlusion, uncertainty, valid)

    def _read(self, offset: int, size: int) -> bytes:
        payload = self._read_range(offset, size)
        if len(payload) != size:
            raise ValueError(f"flow blob is cut short: {len(payload)} bytes at {offset}, expected {size}")
        return payload

    def _read_index(self) -> tuple[FlowHeader, np.ndarray]:
        """Check the prelude, then parse header and table; the first read usually holds all of it."""
        if self._size is not None and self._size < _PRELUDE.size:
            raise ValueError(f"flow blob has {self._size} bytes, fewer than its {_PRELUDE.size} byte prelude")
        first_size = _PRELUDE.size if self._size is None else min(self._size, self._first_read_bytes)
        first = self._read(0, first_size)
        magic, version, header_size, num_pairs, crc, blob_size = _PRELUDE.unpack(first[: _PRELUDE.size])
        if magic != MAGIC:
            raise ValueError(f"not a flow blob: it starts with {magic!r}, expected {MAGIC!r}")
        if version not in _ROWS:
            raise ValueError(f"flow blob version {version} is not one of {sorted(_ROWS)}, which this code reads")
        row_type = _ROWS[version]
        if self._size is not None and self._size != blob_size:
            raise ValueError(f"flow blob has {self._size} bytes, its prelude says {blob_size}: cut or joined")
        self._index_bytes = end = _PRELUDE.size + header_size + num_pairs * row_type.itemsize
        if end > blob_size:
            raise ValueError(f"flow blob is damaged: its index ends at {end}, behind its {blob_size} bytes")
        rest = b"" if end <= len(first) else self._read(len(first), end - len(first))
        index = bytes(first[_PRELUDE.size : end]) + bytes(rest)
        if zlib.crc32(index) != crc:
            raise ValueError("flow blob is damaged: the checksum of its header and table does not match")
        header = FlowHeader(**json.loads(index[:header_size]))
        return header, np.frombuffer(index, row_type, offset=header_size)

    def _row(self, t: int, gap: int) -> np.void:
        row = self._rows.get((t, gap))
        if row is None:
            gaps = sorted({stored_gap for _, stored_gap in self._rows})
            raise KeyError(f"no flow for t={t} gap={gap}; stored: {len(self._rows)} pairs, gaps {gaps}")
        return self._table[row]

    def _decode_flow(self, row: np.void, payload: bytes) -> Float32[np.ndarray, "2 H W"]:
        height, width = self.header.height, self.header.width
        name = f"flow t={row['t']} gap={row['gap']}"
        packed = decompress(payload, 2 * height * width * 2, int(row["flow_crc"]), name)
        return unpack_differences(packed, height, width) * np.float32(1 / int(row["scale"]))

    def _decode_bits(self, row: np.void, part: str, payload: bytes) -> Bool[np.ndarray, "H W"]:
        height, width = self.header.height, self.header.width
        name = f"{part} t={row['t']} gap={row['gap']}"
        packed = decompress(payload, (height * width + 7) // 8, int(row[f"{part}_crc"]), name)
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=height * width)
        return bits.view(bool).reshape(height, width)

    def _part_size(self, row: np.void, name: str) -> int:
        """Bytes of a part of a pair; 0 where the blob's version has no such part."""
        return int(row[name]) if name in (self._table.dtype.names or ()) else 0

    def _decode_uncertainty(self, row: np.void, payload: bytes) -> Float32[np.ndarray, "H W"]:
        height, width = self.header.height, self.header.width
        name = f"uncertainty t={row['t']} gap={row['gap']}"
        packed = decompress(payload, height * width, int(row["uncertainty_crc"]), name)
        steps = np.frombuffer(packed, np.uint8).reshape(height, width).astype(np.float32)
        return np.exp2(steps / _UNCERTAINTY_STEPS - _UNCERTAINTY_OFFSET)


def _check_pair(pair: FlowPair, header: FlowHeader) -> None:
    name = f"flow pair t={pair.t} gap={pair.gap}"
    if pair.gap == 0 or not (0 <= pair.t < header.frames and 0 <= pair.t + pair.gap < header.frames):
        raise ValueError(f"{name} is not a pair of two frames of a clip with {header.frames} frames")
    if pair.flow_px.shape != (2, header.height, header.width):
        size = f"(2, {header.height}, {header.width})"
        raise ValueError(f"{name} has shape {pair.flow_px.shape}; the blob was opened for {size}")
    if pair.valid is not None and pair.valid.shape != (header.height, header.width):
        raise ValueError(f"{name} has validity of shape {pair.valid.shape}; expected ({header.height}, {header.width})")
    infinite = ~np.isfinite(pair.flow_px) & (True if pair.valid is None else pair.valid)
    if infinite.any():
        bad = int(infinite.sum())
        raise ValueError(f"{name} has {bad} values that are not finite; quarantine the clip or mend the teacher")
    if pair.occlusion is not None and pair.occlusion.shape != (header.height, header.width):
        size = f"({header.height}, {header.width})"
        raise ValueError(f"{name} has occlusion of shape {pair.occlusion.shape}; expected {size}")
    if pair.uncertainty_px is not None:
        if pair.uncertainty_px.shape != (header.height, header.width):
            size = f"({header.height}, {header.width})"
            raise ValueError(f"{name} has uncertainty of shape {pair.uncertainty_px.shape}; expected {size}")
        if not (pair.uncertainty_px >= 0).all():
            raise ValueError(
                f"{name} has an uncertainty that is negative or not a number; it is an expected error in px"
            )


def _encode_pair(pair: FlowPair, scale: int) -> tuple[dict[str, int], bytes]:
    """Table fields of one pair, offset left out, and its payload."""
    valid = None if pair.valid is None or pair.valid.all() else np.asarray(pair.valid, bool)
    flow_px = pair.flow_px if valid is None else _continued(pair.flow_px, valid)
    integers, used_scale, num_saturated, num_clipped = _quantise(flow_px, scale)
    flow = CODEC.compress(pack_differences(integers), asbytes=True)
    occlusion = b""
    if pair.occlusion is not None:
        occlusion = _pack_bits(pair.occlusion)
    uncertainty = b""
    if pair.uncertainty_px is not None:
        uncertainty = CODEC.compress(_pack_uncertainty(pair.uncertainty_px), asbytes=True)
    validity = b"" if valid is None else _pack_bits(valid)
    fields = {
        "t": pair.t,
        "gap": pair.gap,
        "flow_size": len(flow),
        "occlusion_size": len(occlusion),
        "flow_crc": zlib.crc32(flow),
        "occlusion_crc": zlib.crc32(occlusion),
        "scale": used_scale,
        "num_saturated": num_saturated,
        "num_clipped": num_clipped,
        "uncertainty_size": len(uncertainty),
        "uncertainty_crc": zlib.crc32(uncertainty),
        "valid_size": len(validity),
        "valid_crc": zlib.crc32(validity),
    }
    return fields, flow + occlusion + uncertainty + validity


def _pack_bits(mask: Bool[np.ndarray, "H W"]) -> bytes:
    return CODEC.compress(np.packbits(np.asarray(mask, bool).ravel()).tobytes(), asbytes=True)


def _continued(flow_px: Float32[np.ndarray, "2 H W"], valid: Bool[np.ndarray, "H W"]) -> Float32[np.ndarray, "2 H W"]:
    """Flow with the value to the left where none is known, 0 where there is none."""
    columns = np.where(valid, np.arange(valid.shape[1]), -1)
    nearest = np.maximum.accumulate(columns, axis=1)
    values = np.take_along_axis(flow_px, np.broadcast_to(np.maximum(nearest, 0), flow_px.shape), axis=2)
    return np.where(nearest >= 0, values, np.float32(0))


def _pack_uncertainty(uncertainty_px: Float32[np.ndarray, "H W"]) -> bytes:
    with np.errstate(divide="ignore"):
        steps = (np.log2(uncertainty_px) + _UNCERTAINTY_OFFSET) * _UNCERTAINTY_STEPS
    return np.rint(np.clip(steps, 0, 255)).astype(np.uint8).tobytes()


def _quantise(flow_px: Float32[np.ndarray, "2 H W"], scale: int) -> tuple[Int16[np.ndarray, "2 H W"], int, int, int]:
    """Fixed-point integers, the scale they have, elements beyond the fine range, elements clipped."""
    limits = np.iinfo(np.int16)
    with np.errstate(over="ignore"):
        steps = np.rint(np.multiply(flow_px, scale, dtype=np.float32))
    if limits.min <= steps.min() and steps.max() <= limits.max:
        return steps.astype(np.int16), scale, 0, 0
    num_saturated = int(((steps < limits.min) | (steps > limits.max)).sum())
    coarse = scale // COARSE_DIVISOR
    # float64, so that even the largest float32 cannot overflow before it is clipped.
    steps = np.rint(np.multiply(flow_px, coarse, dtype=np.float64))
    num_clipped = int(((steps < limits.min) | (steps > limits.max)).sum())
    return np.clip(steps, limits.min, limits.max).astype(np.int16), coarse, num_saturated, num_clipped


def pack_differences(integers: Int16[np.ndarray, "2 H W"]) -> bytes:
    """Differences in x (modulo 2^16), folded to unsigned, low bytes before high bytes."""
    values = integers.view(np.uint16)
    delta = values.copy()
    delta[..., 1:] -= values[..., :-1]
    signed = delta.view(np.int16)
    folded = (signed << 1) ^ (signed >> 15)
    return np.ascontiguousarray(folded.astype("<i2", copy=False).view(np.uint8).reshape(-1, 2).T).tobytes()


def unpack_differences(packed: bytes, height: int, width: int) -> Int16[np.ndarray, "2 H W"]:
    """Inverse of `pack_differences`."""
    low, high = np.frombuffer(packed, np.uint8).reshape(2, -1)
    folded = high.astype(np.uint16)
    folded <<= 8
    folded |= low
    sign = folded & 1
    folded >>= 1
    folded ^= np.negative(sign, out=sign)
    rows = torch.from_numpy(folded.view(np.int16).reshape(2, height, width))
    # numpy's sums along a row wait for the store before: 0.55 ms for 2 x 1024 x 96 where torch takes 0.14.
    return rows.cumsum_(2).numpy()


def decompress(payload: bytes, size: int, crc: int, name: str) -> bytes:
    if zlib.crc32(payload) != crc:
        raise ValueError(f"{name} is damaged: its checksum does not match")
    try:
        return CODEC.decompress(payload, decompressed_size=size, asbytes=True)
    except OSError as error:
        raise ValueError(f"{name} is damaged: {error}") from error
