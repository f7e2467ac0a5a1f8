"""Decode a video file as a stream: the right video stream, frames in order of time, damage noticed, little memory.

What a container says about lengths and counts is a claim: edit lists and stream-copied trims falsify it. A file is
called truncated only where bytes are missing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction

import av

from kinema.pipelines.video.container_size import SeekableReader, is_whole, own_position
from kinema.pipelines.video.copy import ClosedGroups, PacketCopier, closed_groups
from kinema.pipelines.video.decoded import Decoded
from kinema.pipelines.video.deinterlace import deinterlaced
from kinema.pipelines.video.errors import Corrupt, SourceError, Truncated, Undecodable
from kinema.pipelines.video.joints import JointDecoder
from kinema.pipelines.video.look import look_of
from kinema.pipelines.video.order import in_order
from kinema.pipelines.video.streams import choose_stream, need_codec

_TRUNCATED_SHARE, _TRUNCATED_S = 0.95, 1.0  # a file that ends earlier than both of these allow was cut
_HEADER_KNOWS_DURATION = ("mov", "mp4", "matroska", "webm", "avi")
_SEEKS_EXACTLY = ("mov", "mp4", "matroska", "webm")
_PACKETS_HELD = 256  # more than any decoder holds back
_NEARLY_SQUARE = Fraction(1, 200)
_PIXEL_ASPECTS = Fraction(1, 4), Fraction(4)  # what lies outside is a mistake of the tags


class VideoFile:
    """One open video. Use as a context manager.

    Args:
        file: path, or a seekable reader.
        cut: what shows that the file ends too early (`missing_end`), if anything does.
        stream: index of the video stream to take; -1 chooses.
        deinterlace: merge the fields of frames that are flagged as interlaced.

    Attributes:
        time_base: seconds per tick of `pts`, of the chosen stream.
        start: ticks of the stream's start (subtract for times from the beginning).
        rates: frame rates the container states, best first.
        invented_pts: whether frames came without timestamps so far and were numbered instead.
        num_dropped: damaged frames left out so far at the beginning of a recording that was cut between keyframes.
    """

    def __init__(self, file: str | SeekableReader, cut: str | None = None, stream: int = -1, deinterlace: bool = True):
        self._stack = ExitStack()
        self._file, self._cut, self._wanted, self._deinterlace = file, cut, stream, deinterlace
        self._skips_loop_filter = False
        self._for_packets = ExitStack()
        self._copier: PacketCopier | None = None
        self._open()
        self._formats = self._container.format.name.split(",")
        assert self._stream.time_base is not None  # FFmpeg gives one to every stream it reads
        self.time_base = Fraction(self._stream.time_base)
        self.start = self._stream.start_time or 0
        stated = (self._stream.average_rate, self._stream.guessed_rate)
        self.rates = tuple(dict.fromkeys(Fraction(rate) for rate in stated if rate))
        self.invented_pts = False
        self.num_dropped = 0

    def _open(self) -> None:
        self._stack.close()
        file = own_position(self._file)
        try:
            self._container = self._stack.enter_context(av.open(file, "r", metadata_errors="replace"))
        except av.FFmpegError as error:
            if self._cut:
                raise Truncated(f"{self._cut}; it does not open") from None
            raise Undecodable(f"the file does not open as a video: {error.strerror}") from None
        try:
            known = self._wanted
            several = len(self._container.streams.video) > 1
            self._wanted = choose_stream(self._container, known)
        except SourceError:
            self._stack.close()
            raise
        if several and known < 0:
            self._open()  # it may have been read through
            return
        self._stream = next(s for s in self._container.streams.video if s.index == self._wanted)
        need_codec(self._stream)
        self._stream.thread_count = 1
        self._set_loop_filter()
        self._used = self._moved = False

    def _set_loop_filter(self) -> None:
        if self._skips_loop_filter:
            self._stream.codec_context.options = {"skip_loop_filter": "all"}

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._for_packets.close()

    @property
    def format_name(self) -> str:
        """FFmpeg's name of the container, for example `mov`."""
        return self._formats[0]

    @property
    def codec_name(self) -> str:
        """FFmpeg's name of the stream's codec, for example `h264`."""
        return self._stream.codec.canonical_name

    @property
    def stream_index(self) -> int:
        """Index of the chosen video stream in the file."""
        return self._stream.index

    @property
    def aspect_ratio(self) -> Fraction:
        """Width of a pixel over its height: the container's word, else the codec's; 1 where neither says anything."""
        return _believed(Fraction(self._stream.sample_aspect_ratio or 0) or Fraction(1))

    @property
    def seeks(self) -> bool:
        """Whether the container has an index that finds keyframes exactly (MPEG program streams do not)."""
        return any(name in _SEEKS_EXACTLY for name in self._formats)

    @property
    def _starts_anywhere(self) -> bool:
        """Whether recordings usually begin between keyframes, with frames that refer to what was not recorded."""
        return any(name in ("mpegts", "mpeg") for name in self._formats)

    def frames(self, from_pts: int | None = None) -> Iterator[av.VideoFrame]:
        """The frames of `pictures`."""
        return (picture.frame for picture in self.pictures(from_pts))

    def pictures(self, from_pts: int | None = None) -> Iterator[Decoded]:
        """Frames in order of `pts`, which is never None and goes back only where the clock starts anew.

        Args: from_pts: start at the last keyframe at or before this tick; None starts at the beginning.
        Raises: Corrupt, Truncated, Undecodable, each with what was seen.
        """
        if from_pts is not None:
            try:
                self._container.seek(from_pts, stream=self._stream, backward=True)
            except av.FFmpegError as error:
                raise Corrupt(f"seeking to tick {from_pts} fails: {error.strerror}") from None
        elif self._used or self._moved:
            self._open()  # seeking back to the start is not exact in every container
        self._used = True
        decoded = self._with_pts(self._decoded(check_end=from_pts is None))
        ordered = in_order(decoded, self._nominal_step())
        placed = (replace(item, restarted=True) if restarted else item for item, restarted in ordered)
        yield from deinterlaced(placed) if self._deinterlace else placed

    def skip_loop_filter(self, skips: bool) -> None:
        """Frames from now on lack what smoothes the borders of blocks: good for small pictures, a quarter cheaper."""
        self._skips_loop_filter = skips
        if self._used or not skips:
            self._open()
        else:
            self._set_loop_filter()

    def closed_groups(self) -> ClosedGroups | None:
        """Where closed groups of pictures begin; None where packets cannot be taken over."""
        return closed_groups(self._file, self.stream_index)

    def copy(self, pts: Sequence[int], fps: Fraction) -> bytes:
        """An mp4 of the packets with these timestamps. Raises: Corrupt."""
        if self._copier is None and self._used:  # frames are read from this container: another one for packets
            file = own_position(self._file)
            container = self._for_packets.enter_context(av.open(file, "r", metadata_errors="replace"))
            stream = next(s for s in container.streams.video if s.index == self.stream_index)
            self._copier = PacketCopier(container, stream)
        self._moved = True
        return (self._copier or PacketCopier(self._container, self._stream)).clip(pts, fps)

    def _decoded(self, check_end: bool) -> Iterator[Decoded]:
        num_packets = num_frames = 0
        end_s = 0.0
        packets = self._container.demux()
        tick_s = {stream.index: float(stream.time_base or 0) for stream in self._container.streams}
        aspects = _PixelAspects(self)
        decoder = JointDecoder(
            self._stream.codec_context, self.time_base, self._nominal_step(), watches=self._starts_anywhere
        )
        part = good_in_part = 0
        flushed = False
        while not flushed:
            try:
                packet = next(packets, None)
                flushed = packet is None
                if packet is not None:
                    if not packet.size:
                        continue  # a stream's end; the decoder is flushed once, after the last packet
                    if packet.pts is not None:
                        end_s = max(end_s, (packet.pts + (packet.duration or 0)) * tick_s.get(packet.stream_index, 0.0))
                    if packet.stream_index != self._stream.index:
                        continue
                    num_packets += 1
                frames = decoder.decode(packet)
            except av.FFmpegError as error:
                raise self._damage(num_frames, num_packets, error) from None
            aspects.note(packet)
            for number, frame in frames:
                if number != part:
                    part, good_in_part = number, 0
                if frame.is_corrupt and good_in_part == 0 and (self._starts_anywhere or not frame.key_frame):
                    self.num_dropped += check_end
                    continue
                if frame.is_corrupt and self._cut:
                    raise Truncated(f"{self._cut}; {num_frames} good frames")
                if frame.is_corrupt:
                    raise Corrupt(f"frame {num_frames} comes out damaged, after {num_frames} good frames")
                num_frames, good_in_part = num_frames + 1, good_in_part + 1
                look, restarted = look_of(frame, aspects.of_frame(frame.pts)), part > 0 and good_in_part == 1
                yield Decoded(frame, look, bool(frame.interlaced_frame), restarted)
        if check_end:
            self.num_dropped += decoder.num_lost
            self._check_end(num_packets, num_frames, end_s)

    def _damage(self, num_frames: int, num_packets: int, error: av.FFmpegError) -> SourceError:
        declared = f" of {self._stream.frames} declared" if self._stream.frames and "mov" in self._formats else ""
        if self._cut:
            return Truncated(f"{self._cut}; {num_frames} good frames{declared}")
        if num_frames == 0:
            return Undecodable(f"no frame decodes: {error.strerror}")
        return Corrupt(f"{num_frames} good frames{declared}, then packet {num_packets - 1}: {error.strerror}")

    def _check_end(self, num_packets: int, num_frames: int, end_s: float) -> None:
        indexed = self._indexed_end() if num_packets <= self._stream.frames else None  # fragments have no index
        if self._cut and self._cut.startswith("the moof box"):
            indexed = None
        lacks_bytes = indexed is not None and indexed > self._container.size
        if self._cut and (lacks_bytes or indexed is None):
            raise Truncated(f"{self._cut}; {num_frames} good frames")
        if lacks_bytes:
            size = self._container.size
            raise Truncated(f"the index ends at byte {indexed}, the file at byte {size}; {num_frames} good frames")
        if num_frames == 0:
            raise Undecodable(f"no frame comes out of {num_packets} video packets")
        if indexed is not None or self._structure_is_whole():
            return
        duration_s = (self._container.duration or 0) / av.time_base
        end_s -= (self._container.start_time or 0) / av.time_base
        if any(name in _HEADER_KNOWS_DURATION for name in self._formats):
            if end_s < min(duration_s * _TRUNCATED_SHARE, duration_s - _TRUNCATED_S):
                raise Truncated(f"the file ends at {end_s:.2f} s of {duration_s:.2f} s declared")

    def _indexed_end(self) -> int | None:
        """Byte behind the last one that an MP4's index names for this stream; None without an index for all of it."""
        if "mov" not in self._formats or not self._stream.frames:
            return None
        ends = [entry.pos + entry.size for entry in self._stream.index_entries]
        return max(ends, default=None)

    def _structure_is_whole(self) -> bool:
        """Whether the outermost structure says how long the file is, and it is that long."""
        if self._cut:
            return False
        if not isinstance(self._file, str):
            return is_whole(self._file, self._container.size)
        with open(self._file, "rb") as file:
            return is_whole(file, self._container.size)

    def _nominal_step(self) -> int:
        rate = self.rates[0] if self.rates else Fraction(25)
        return max(1, round(1 / (rate * self.time_base)))

    def _with_pts(self, pictures: Iterator[Decoded]) -> Iterator[Decoded]:
        """Frames without a timestamp follow the frame before by the nominal duration."""
        nominal = self._nominal_step()
        expected = self.start
        for picture in pictures:
            frame = picture.frame
            if frame.pts is None:
                self.invented_pts = True
                frame.pts = expected
            expected = frame.pts + (frame.duration or nominal)
            yield picture


class _PixelAspects:
    """The pixels' aspect ratio of every frame. Frames come out later than the header that changed it was read."""

    def __init__(self, video: VideoFile):
        stream = video._stream
        self._context = stream.codec_context
        self._found = video.aspect_ratio
        # a container that says something else than the codec goes first, as in players
        stated = stream.sample_aspect_ratio
        self._fixed = bool(stated) and stated != self._of_codec()
        self._by_pts: dict[int, deque[Fraction]] = {}
        self._raw = self._context.sample_aspect_ratio
        self._believed = _believed(self._of_codec())

    def _of_codec(self) -> Fraction:
        return Fraction(self._context.sample_aspect_ratio or 1) or Fraction(1)

    def _now(self) -> Fraction:
        """Of the codec, as it is believed."""
        raw = self._context.sample_aspect_ratio
        if raw != self._raw:
            self._raw, self._believed = raw, _believed(self._of_codec())
        return self._believed

    def note(self, packet: av.Packet | None) -> None:
        """After each packet was decoded."""
        if self._fixed or packet is None or packet.pts is None:
            return
        if len(self._by_pts) > _PACKETS_HELD:
            self._by_pts.pop(next(iter(self._by_pts)))  # of a packet that shows no frame
        self._by_pts.setdefault(packet.pts, deque()).append(self._now())

    def of_frame(self, pts: int | None) -> Fraction:
        """Of a frame that came out by now; each is asked for once."""
        noted = self._by_pts.get(pts) if pts is not None else None
        if noted and pts is not None:
            self._found = noted.popleft()
            if not noted:
                del self._by_pts[pts]
        return self._found


def _believed(aspect: Fraction) -> Fraction:
    """What a stated ratio is taken for: square where it is nearly that (containers round sizes), or absurd."""
    if abs(aspect - 1) < _NEARLY_SQUARE:
        return Fraction(1)
    return aspect if _PIXEL_ASPECTS[0] <= aspect <= _PIXEL_ASPECTS[1] else Fraction(1)
