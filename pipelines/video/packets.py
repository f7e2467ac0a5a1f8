"""Packets of a finished clip: a table that lets one group of pictures be fetched and decoded on its own.

The table is read once, when the clip is written, and stored in `samples.parquet`. A reader then needs the codec's
name, its `extradata` and the bytes of one group: no container is opened.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

DECODERS = {
    "h264": "h264",
    "h264_lossless": "h264",
    "hevc": "hevc",
    "av1": "libdav1d",
    "mjpeg": "mjpeg",
    "mpeg4": "mpeg4",
}
"""FFmpeg decoder for each value of `clip.codec`."""

_of_thread = threading.local()


@dataclass(frozen=True)
class PacketTable:
    """Where each packet of a clip lies, in decoding order."""

    extradata: bytes
    """Codec configuration (for example avcC), which the decoder needs before the first packet."""
    offset: list[int]
    """Offset of each packet in bytes, relative to the start of the mp4."""
    size: list[int]
    """Size of each packet in bytes."""
    frame: list[int]
    """Presentation index of each packet's frame."""
    keyframe: list[bool]
    """Whether the packet starts a closed group of pictures."""


def packet_table(mp4: bytes) -> PacketTable:
    """Read the packet table of a clip.

    Args: mp4: a whole clip with one video stream, as written by `ClipEncoder`.
    Raises: ValueError if a packet has no timestamp or position, or two packets share a timestamp.
    """
    offset: list[int] = []
    size: list[int] = []
    pts: list[int] = []
    keyframe: list[bool] = []
    # the index says all: nothing has to be decoded to find out what the streams are
    with av.open(io.BytesIO(mp4), "r", format="mp4", options={"probesize": "32"}) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.pts is None or packet.pos is None or packet.pos < 0:
                raise ValueError(f"packet {len(pts)} of the clip has no timestamp or position; encode the clip again")
            offset.append(packet.pos)
            size.append(packet.size)
            pts.append(packet.pts)
            keyframe.append(packet.is_keyframe)
        extradata = bytes(stream.codec_context.extradata or b"")
    if len(set(pts)) != len(pts):
        raise ValueError("two packets of the clip share a timestamp; encode the clip again")
    rank = {value: index for index, value in enumerate(sorted(pts))}
    return PacketTable(extradata, offset, size, [rank[value] for value in pts], keyframe)


def group_of_frame(frame: int, packet_frame: Sequence[int], packet_keyframe: Sequence[bool]) -> tuple[int, int]:
    """Packets [first, last) of the closed group of pictures that holds presentation index `frame`.

    Raises: ValueError if the clip has no such frame.
    """
    starts = [i for i, key in enumerate(packet_keyframe) if key]
    ends = [*starts[1:], len(packet_frame)]
    for first, last in zip(starts, ends, strict=True):
        if packet_frame[first] <= frame < packet_frame[first] + last - first:
            return first, last
    raise ValueError(f"frame {frame} is outside of the clip's {len(packet_frame)} frames")


class GroupDecoder:
    """Decodes groups of pictures without a container, with one decoder that keeps its memory from group to group.

    Args: codec, value of `clip.codec` (a key of DECODERS); extradata, of the clips' packet tables.
    Raises: ValueError for an unknown codec.
    """

    def __init__(self, codec: str, extradata: bytes):
        if codec not in DECODERS:
            raise ValueError(f"codec {codec!r} is not known; use one of {', '.join(DECODERS)}")
        self._codec, self._extradata = codec, extradata
        self._clean: av.VideoCodecContext | None = None
        self._reformatter = VideoReformatter()

    def decode(
        self, packets: Sequence[tuple[bytes, int]], wanted: Collection[int] | None = None
    ) -> dict[int, UInt8[np.ndarray, "H W 3"]]:
        """Decode the packets of one or several whole groups of pictures.

        Args:
            packets: (bytes, presentation index) in decoding order, starting at a keyframe.
            wanted: presentation indices to convert to RGB; None means all.
        Returns: presentation index -> uint8 RGB [H, W, 3]. Equal to decoding the whole clip.
        Raises: ValueError for damaged packets, or a wanted frame that did not come out; the next group gets a decoder
            of its own.
        """
        decoder = self._clean or self._new()
        self._clean = None
        missing = {index for _, index in packets} if wanted is None else set(wanted)
        pictures: dict[int, np.ndarray] = {}
        try:
            for data, index in packets:
                # FFmpeg's own memory, with zeros behind: it reads there. Of bytes PyAV would make a packet in place.
                packet = av.Packet(len(data))
                packet.update(data)
                packet.pts = packet.dts = index
                self._collect(decoder.decode(packet), missing, pictures)
                if not missing:
                    break
            else:
                self._collect(decoder.decode(None), missing, pictures)
        except av.FFmpegError as error:
            raise ValueError(f"packets of {self._codec} do not decode: {error.strerror}") from error
        if missing:
            raise ValueError(f"frames {sorted(missing)} did not come out of {len(packets)} packets of {self._codec}")
        decoder.flush_buffers()
        self._clean = decoder
        return pictures

    def _collect(
        self, frames: Sequence[av.VideoFrame], missing: set[int], pictures: dict[int, UInt8[np.ndarray, "H W 3"]]
    ) -> None:
        for frame in frames:
            if frame.is_corrupt:
                raise ValueError(f"frame {frame.pts} is damaged")
            if frame.pts in missing:
                missing.discard(frame.pts)
                pictures[frame.pts] = to_rgb(frame, self._reformatter)

    def _new(self) -> av.VideoCodecContext:
        decoder = av.CodecContext.create(DECODERS[self._codec], "r")
        assert isinstance(decoder, av.VideoCodecContext)  # DECODERS names no others
        if self._extradata:
            decoder.extradata = self._extradata
        decoder.thread_count = 1
        return decoder


def group_decoder(codec: str, extradata: bytes) -> GroupDecoder:
    """This thread's decoder if the last clip was such a one too, else one of its own.

    Opening one takes a sixth of decoding a frame. Only one is kept: large pictures make it tens of megabytes.
    Raises: ValueError for an unknown codec.
    """
    key, decoder = getattr(_of_thread, "last", (None, None))
    if decoder is None or key != (codec, extradata):
        decoder = GroupDecoder(codec, extradata)
        _of_thread.last = (codec, extradata), decoder
    return decoder


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """RGB of a decoded frame by its own colour tags (BT.601 where there are none).

    Args: reformatter, one to use again: setting one up takes as long as a third of the conversion of 512 x 512.
    """
    reformatter = reformatter or VideoReformatter()
    return reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
