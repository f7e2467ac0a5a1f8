"""One clip of an artifact: the frames and flow pairs that are asked for, and only their bytes.

A frame costs one ranged read of its group of pictures, up to the last packet it needs, and decoding those packets
with a bare decoder; no container is opened. A flow pair costs one ranged read, after the blob's index was read once;
all point tracks together cost one, and another for their header and queries.
"""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import av
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from kinema.pipelines.artifacts import read_range
from kinema.pipelines.artifacts.store import read_ranges
from kinema.pipelines.loader._h264 import is_unreferenced, length_size
from kinema.pipelines.loader.flows import AveragedFlow
from kinema.pipelines.sidecars.flow_codec import FlowBlob, FlowPair
from kinema.pipelines.sidecars.tracks_codec import StoredTracks, Tracks, TracksBlob
from kinema.pipelines.video.packets import DECODERS, PacketTable, group_decoder, packet_table

_AVERAGE = -1


class DamagedClip(ValueError):
    """The stored bytes of a clip or of its sidecar cannot be read or decoded; names key and cause."""


@dataclass
class ReadCounter:
    """What reading has cost so far in this process."""

    bytes_read: int = 0
    frames_decoded: int = 0


class Clip:
    """A clip, its frames as uint8 RGB, and what belongs to it.

    Args: row, the clip's row of the index; shard_url, flow_shard_url and tracks_shard_url, where its tars are;
        counter, what adds up the cost of reads.
    Every reader raises DamagedClip when stored bytes are damaged, ValueError or KeyError for a request that the
    clip cannot meet.
    """

    def __init__(
        self,
        row: Mapping[str, Any],
        shard_url: str,
        flow_shard_url: str | None,
        counter: ReadCounter,
        tracks_shard_url: str | None = None,
    ):
        self.row = row
        self._shard_url, self._flow_shard_url, self._counter = shard_url, flow_shard_url, counter
        self._tracks_shard_url = tracks_shard_url
        self._other_flows: Sequence[tuple[Mapping[str, Any], str]] = ()
        self._flow_use = 0
        self.local: Callable[[str], str] = str
        """Where a shard is read: at its URL, or at a copy of it."""
        self._blobs: dict[int, FlowBlob | AveragedFlow] = {}
        self.key: str = row["key"]
        self.num_frames: int = row["num_frames"]
        self.height: int = row["height"]
        self.width: int = row["width"]
        self.fps: float = row["fps_num"] / row["fps_den"]

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The sample's json, as written by `shard`: source, pts of every frame, labels, ..."""
        with self._damage_named("json"):
            return json.loads(self._read("json_offset", "json_size"))

    def frames(self, indices: Sequence[int] | None = None) -> UInt8[np.ndarray, "n H W 3"]:
        """Frames in the order asked for, all by default; an index may come twice."""
        indices = range(self.num_frames) if indices is None else indices
        if not len(indices):
            return np.zeros((0, self.height, self.width, 3), np.uint8)
        pictures = self.pictures(indices)
        if len(indices) == 1:
            return pictures[int(indices[0])][None]
        return np.stack([pictures[int(index)] for index in indices])

    def pictures(self, indices: Iterable[int]) -> dict[int, UInt8[np.ndarray, "H W 3"]]:
        """The same by index, for who needs no array of them all: copying them into one takes a tenth of decoding."""
        wanted = {int(index) for index in indices}
        for index in wanted:
            if not 0 <= index < self.num_frames:
                raise ValueError(f"clip {self.key} has frames 0..{self.num_frames - 1}, not {index}")
        with self._damage_named("mp4"):
            return self._decode(wanted) if wanted else {}

    def add_flows(self, flows: Sequence[tuple[Mapping[str, Any], str]]) -> None:
        """Flow of further teachers: the columns of the clip's row that say where it lies, and the tar."""
        self._other_flows = flows

    @property
    def num_flows(self) -> int:
        """Teachers whose flow is at hand."""
        return 0 if self._flow_shard_url is None else 1 + len(self._other_flows)

    def with_flow(self, teacher: int | Literal["average"]) -> Clip:
        """The same clip, with the flow of another teacher (the index's order), or the mean of all."""
        if teacher != "average" and not 0 <= teacher < self.num_flows:
            raise ValueError(f"clip {self.key} has the flow of {self.num_flows} teachers, not number {teacher}")
        clip = copy.copy(self)
        clip._flow_use = _AVERAGE if teacher == "average" else teacher
        return clip

    @property
    def flow_pairs(self) -> list[tuple[int, int]]:
        """Stored pairs (t, gap) that passed the index's filter, ordered; empty when it was opened without flow."""
        if self._flow_shard_url is None:
            return []
        pairs = self._flow_blob.pairs
        for number in range(self.num_flows) if self._flow_use == _AVERAGE else [self._flow_use]:
            usable = self._flow_places[number][0].get("flow_usable")
            if usable is not None:
                stored = self._blob(number).pairs
                fit = {pair for pair, kept in zip(stored, usable, strict=True) if kept}
                pairs = [pair for pair in pairs if pair in fit]
        return pairs

    @property
    def flow_size(self) -> tuple[int, int]:
        """(height, width) of the stored flow, whose pixels its values are in."""
        return self._flow_blob.header.height, self._flow_blob.header.width

    def flow(self, t: int, gap: int) -> Float32[np.ndarray, "2 h w"]:
        """Flow from frame t to frame t + gap, in pixels of `flow_size`."""
        blob = self._flow_blob
        with self._damage_named("flow"):
            return blob.flow(t, gap)

    def occlusion(self, t: int, gap: int) -> Bool[np.ndarray, "h w"] | None:
        """True where frame t's pixel is hidden in frame t + gap; None when the teacher stored none."""
        blob = self._flow_blob
        with self._damage_named("flow"):
            return blob.occlusion(t, gap)

    def flow_pair(self, t: int, gap: int) -> FlowPair:
        """Flow and occlusion together, in one read."""
        blob = self._flow_blob
        with self._damage_named("flow"):
            return blob.pair(t, gap)

    def tracks(self) -> Tracks:
        """All stored point tracks: positions in pixels of their `size`, visibility, queries."""
        blob = self._tracks_blob
        with self._damage_named("tracks"):
            return blob.tracks()

    def stored_tracks(self) -> StoredTracks:
        """The same, for who needs the positions of a few frames only."""
        blob = self._tracks_blob
        with self._damage_named("tracks"):
            return blob.stored_tracks()

    @property
    def track_queries(self) -> Float32[np.ndarray, "N 3"]:
        """(t, x, y) that each stored track was started from, without reading the tracks."""
        return self._tracks_blob.queries

    def masks(self) -> UInt8[np.ndarray, "T H W"] | None:
        """Object masks that came with the frames (0 is background), or None."""
        if not self.row.get("masks_size"):
            return None
        with self._damage_named("masks"), np.load(io.BytesIO(self._read("masks_offset", "masks_size"))) as arrays:
            return arrays["masks"]

    @property
    def _flow_places(self) -> list[tuple[Mapping[str, Any], str]]:
        assert self._flow_shard_url is not None
        return [(self.row, self._flow_shard_url), *self._other_flows]

    @property
    def _flow_blob(self) -> FlowBlob | AveragedFlow:
        if self._flow_shard_url is None:
            raise ValueError(f"clip {self.key} was opened without flow; give the index a flow artifact")
        if self._flow_use != _AVERAGE:
            return self._blob(self._flow_use)
        if _AVERAGE not in self._blobs:
            self._blobs[_AVERAGE] = AveragedFlow([self._blob(number) for number in range(self.num_flows)])
        return self._blobs[_AVERAGE]

    def _blob(self, number: int) -> FlowBlob:
        """The blob of one teacher; its index is read once, for all views of the clip."""
        found = self._blobs.get(number)
        if found is None:
            place, url = self._flow_places[number]
            start = place["flow_offset"]
            with self._damage_named("flow"):
                found = self._blobs[number] = FlowBlob(
                    lambda offset, size: self._range(url, start + offset, size),
                    size=place["flow_size"],
                    num_pairs=place["num_pairs"],
                )
        assert isinstance(found, FlowBlob)
        return found

    @cached_property
    def _tracks_blob(self) -> TracksBlob:
        if self._tracks_shard_url is None:
            raise ValueError(f"clip {self.key} was opened without tracks; give the index a tracks artifact")
        url, start = self._tracks_shard_url, self.row["tracks_offset"]
        with self._damage_named("tracks"):
            return TracksBlob(
                lambda offset, size: self._range(url, start + offset, size),
                size=self.row["tracks_size"],
                num_tracks=self.row["num_tracks"],
            )

    @cached_property
    def _packets(self) -> tuple[PacketTable, Callable[[list[tuple[int, int]]], list[tuple[int, bytes]]]]:
        """The packet table, and a reader of ranges (offset, size) of the mp4, which gives blocks (offset, bytes).

        Samples written without a table cost one read of the whole mp4, from which it is made.
        """
        row = self.row
        if row.get("packet_offset"):
            start = row["mp4_offset"]
            table = PacketTable(
                extradata=row["extradata"] or b"",
                offset=row["packet_offset"],
                size=row["packet_size"],
                frame=row["packet_frame"],
                keyframe=row["packet_keyframe"],
            )
            return table, lambda ranges: self._ranges(self._shard_url, start, ranges)
        mp4 = self._read("mp4_offset", "mp4_size")
        return packet_table(mp4), lambda _: [(0, mp4)]

    def _decode(self, wanted: set[int]) -> dict[int, UInt8[np.ndarray, "H W 3"]]:
        table, read = self._packets
        spans = _needed_packets(table, wanted)
        blocks = read([_byte_range(table, span) for span in spans])
        decoder = group_decoder(self.row["codec"], table.extradata)
        pictures: dict[int, np.ndarray] = {}
        for first, last in spans:
            here = wanted.intersection(table.frame[first:last])
            packets = [(_cut(blocks, table.offset[i], table.size[i]), table.frame[i]) for i in range(first, last)]
            packets = self._without_unreferenced(packets, here, table.extradata)
            self._counter.frames_decoded += len(packets)
            pictures.update(decoder.decode(packets, here))
        return pictures

    def _without_unreferenced(
        self, packets: list[tuple[bytes, int]], wanted: set[int], extradata: bytes
    ) -> list[tuple[bytes, int]]:
        """Packets without the pictures that are neither wanted nor referred to: about half of them in H.264."""
        length_bytes = length_size(extradata) if DECODERS.get(self.row["codec"]) == "h264" else 0
        if not length_bytes:
            return packets
        return [(data, i) for data, i in packets if i in wanted or not is_unreferenced(data, length_bytes)]

    def _read(self, offset_column: str, size_column: str) -> bytes:
        return self._range(self._shard_url, self.row[offset_column], self.row[size_column])

    def _range(self, url: str, offset: int, size: int) -> bytes:
        self._counter.bytes_read += size
        return read_range(self.local(url), offset, size)

    def _ranges(self, url: str, start: int, ranges: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
        blocks = read_ranges(self.local(url), [(start + offset, size) for offset, size in ranges])
        self._counter.bytes_read += sum(len(data) for _, data in blocks)
        return [(offset - start, data) for offset, data in blocks]

    @contextmanager
    def _damage_named(self, member: str) -> Iterator[None]:
        try:
            yield
        except DamagedClip:
            raise
        except (ValueError, OSError, EOFError, av.FFmpegError, zipfile.BadZipFile) as error:
            raise DamagedClip(f"{self.key}.{member}: {error}") from error


def _needed_packets(table: PacketTable, wanted: set[int]) -> list[tuple[int, int]]:
    """Packets [first, last) to decode for the wanted frames, one span for each group of pictures.

    A frame refers only to packets decoded before it, so each span ends at the last packet that holds a wanted one.
    """
    spans: list[tuple[int, int]] = []
    keyframe = 0
    for packet, frame in enumerate(table.frame):
        if table.keyframe[packet]:
            keyframe = packet
        if frame in wanted:
            if spans and spans[-1][0] == keyframe:
                spans.pop()
            spans.append((keyframe, packet + 1))
    found = sum(frame in wanted for first, last in spans for frame in table.frame[first:last])
    if found != len(wanted):
        raise ValueError(f"the packet table lacks {len(wanted) - found} of {len(wanted)} frames")
    return spans


def _byte_range(table: PacketTable, span: tuple[int, int]) -> tuple[int, int]:
    """(offset, size) of the packets."""
    packets = range(*span)
    start = min(table.offset[i] for i in packets)
    return start, max(table.offset[i] + table.size[i] for i in packets) - start


def _cut(blocks: list[tuple[int, bytes]], offset: int, size: int) -> bytes:
    for start, data in blocks:
        if start <= offset and offset + size <= start + len(data):
            return data[offset - start : offset - start + size]
    raise ValueError(f"packet at {offset} lies outside of what was read")
