"""Clips without encoding: the packets of a source's own closed groups of pictures, put into an mp4 of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from jaxtyping import Int64

from kinema.pipelines.video.container_size import SeekableReader, own_position
from kinema.pipelines.video.encode import ScratchFile
from kinema.pipelines.video.errors import Corrupt

COPIED_CODECS = ("h264", "hevc", "av1")
_LENGTH_PREFIXED = ("mov", "matroska")  # containers whose packets an mp4 takes as they are
_IDR = {"h264": frozenset({5}), "hevc": frozenset({19, 20})}


@dataclass(frozen=True)
class ClosedGroups:
    """Groups of pictures of a source whose packets can be copied."""

    starts: Int64[np.ndarray, "G"]
    """Timestamps of the keyframes at which they begin, ascending."""
    longest: int
    """Ticks from one start to the next, or to the last frame, at most."""
    bytes_per_frame: int
    """Mean size of the stream's packets."""


def closed_groups(file: str | SeekableReader, stream_index: int) -> ClosedGroups | None:
    """Where closed groups of pictures begin; None where packets cannot be copied.

    A group is closed when its keyframe resets the decoder (IDR), no packet behind it is shown before it, and none
    before it is shown after it. Reads packets only; decodes nothing.
    """
    with av.open(own_position(file), "r", metadata_errors="replace") as container:
        stream = next(s for s in container.streams.video if s.index == stream_index)
        codec = stream.codec.canonical_name
        known = codec in COPIED_CODECS and container.format.name.split(",")[0] in _LENGTH_PREFIXED
        if not known or not stream.codec_context.extradata:
            return None
        prefix = _length_size(codec, bytes(stream.codec_context.extradata))
        pts, is_start, num_bytes = [], [], 0
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.pts is None or packet.has_sidedata("new_extradata"):
                return None
            pts.append(packet.pts)
            num_bytes += packet.size
            is_start.append(packet.is_keyframe and _resets(codec, bytes(packet), prefix))
    ticks = np.array(pts, np.int64)
    if not len(ticks):
        return None
    latest_before = np.concatenate([[np.iinfo(np.int64).min], np.maximum.accumulate(ticks)[:-1]])
    earliest_after = np.minimum.accumulate(ticks[::-1])[::-1]
    starts = ticks[np.array(is_start) & (latest_before < ticks) & (earliest_after == ticks)]
    if not len(starts):
        return None
    return ClosedGroups(starts, int(np.diff([*starts, ticks.max()]).max()), num_bytes // len(ticks))


def _length_size(codec: str, extradata: bytes) -> int:
    """Bytes that say how long a unit is (avcC, hvcC)."""
    return {"h264": (extradata[4] & 3) + 1, "hevc": (extradata[21] & 3) + 1}[codec] if codec in _IDR else 0


def _resets(codec: str, data: bytes, prefix: int) -> bool:
    """Whether the packet's first picture unit is that of an IDR picture; AV1's keyframes always are like one."""
    if codec not in _IDR:
        return True
    position = 0
    while position + prefix < len(data):
        size = int.from_bytes(data[position : position + prefix], "big")
        kind = data[position + prefix] & 31 if codec == "h264" else data[position + prefix] >> 1 & 63
        if kind in _IDR[codec]:
            return True
        if (1 <= kind <= 4) if codec == "h264" else kind <= 31:
            return False
        position += prefix + size
    return False


class PacketCopier:
    """Cuts clips out of an open container, which nobody else reads in the meantime."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream):
        self._container, self._stream = container, stream

    def clip(self, pts: Sequence[int], fps: Fraction) -> bytes:
        """An mp4 of the packets whose frames have these timestamps, at a constant rate.

        Args: pts, ascending, of whole closed groups.
        Raises: Corrupt if the file does not hold these packets (it did when it was scanned).
        """
        wanted = {tick: rank for rank, tick in enumerate(pts)}
        self._container.seek(int(pts[0]), stream=self._stream, backward=True)
        packets = []
        for packet in self._container.demux(self._stream):
            if packet.pts in wanted and packet.size:
                packets.append(packet)
                if len(packets) == len(wanted):
                    break
        if len(packets) != len(wanted) or packets[0].pts != pts[0]:
            raise Corrupt(f"{len(packets)} of the {len(wanted)} packets from tick {pts[0]} on are where they were")
        ranks = [wanted[packet.pts] for packet in packets if packet.pts is not None]
        with ScratchFile() as target:
            _write(target, self._stream, packets, ranks, fps)
            return target.read()


def _write(target: ScratchFile, stream: av.VideoStream, packets: list, ranks: list[int], fps: Fraction) -> None:
    options = {"movflags": "+faststart", "fflags": "+bitexact", "use_editlist": "1"}
    delay = max(index - rank for index, rank in enumerate(ranks))
    with av.open(target.name, "w", format="mp4", options=options) as output:
        if stream.codec.canonical_name == "av1":  # no encoder has the decoder's name, which the template asks for
            copied = output.add_mux_stream("av1", rate=fps, width=stream.width, height=stream.height)
        else:
            copied = output.add_stream_from_template(stream)
        copied.time_base = 1 / fps
        for index, (packet, rank) in enumerate(zip(packets, ranks, strict=True)):
            packet.time_base = 1 / fps
            packet.pts, packet.dts, packet.duration = rank, index - delay, 1
            packet.stream = copied
            output.mux(packet)
