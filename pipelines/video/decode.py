"""Decode a video file as a stream: the right video stream, frames in order of time, damage noticed, little memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction

import av

from kinema.pipelines.video.container_size import SeekableReader
from kinema.pipelines.video.errors import Corrupt, NoVideoStream, SourceError, Truncated, Undecodable

_REORDER = 4  # frames held back to put unordered timestamps in order
_TRUNCATED_SHARE, _TRUNCATED_S = 0.95, 1.0  # a file that ends earlier than both of these allow was cut
_HEADER_KNOWS_DURATION = ("mov", "mp4", "matroska", "webm", "avi")
_SEEKS_EXACTLY = ("mov", "mp4", "matroska", "webm")


class VideoFile:
    """One open video. Use as a context manager.

    Args:
        file: path, or a seekable reader.
        cut: what shows that the file ends too early (`missing_end`), if anything does.

    Attributes:
        time_base: seconds per tick of `pts`, of the chosen stream.
        start: ticks of the stream's start (subtract for times from the beginning).
        rates: frame rates the container states, best first.
        invented_pts: whether frames came without timestamps so far and were numbered instead.
    """

    def __init__(self, file: str | SeekableReader, cut: str | None = None):
        self._stack = ExitStack()
        self._file, self._cut = file, cut
        self._open()
        self._formats = self._container.format.name.split(",")
        assert self._stream.time_base is not None  # FFmpeg gives one to every stream it reads
        self.time_base = Fraction(self._stream.time_base)
        self.start = self._stream.start_time or 0
        stated = (self._stream.average_rate, self._stream.guessed_rate)
        self.rates = tuple(dict.fromkeys(Fraction(rate) for rate in stated if rate))
        self.invented_pts = False

    def _open(self) -> None:
        self._stack.close()
        if not isinstance(self._file, str):
            self._file.seek(0)
        try:
            self._container = self._stack.enter_context(av.open(self._file, "r", metadata_errors="replace"))
        except av.FFmpegError as error:
            if self._cut:
                raise Truncated(f"{self._cut}; it does not open") from None
            raise Undecodable(f"the file does not open as a video: {error.strerror}") from None
        try:
            self._stream = _best_stream(self._container)
        except NoVideoStream:
            self._stack.close()
            raise
        self._stream.thread_count = 1
        self._used = False

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

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
        """Width of a pixel over its height; 1 where the file says nothing."""
        return Fraction(self._stream.codec_context.sample_aspect_ratio or 1) or Fraction(1)

    @property
    def seeks(self) -> bool:
        """Whether the container has an index that finds keyframes exactly (MPEG program streams do not)."""
        return any(name in _SEEKS_EXACTLY for name in self._formats)

    @property
    def _starts_anywhere(self) -> bool:
        """Whether recordings usually begin between keyframes, with frames that refer to what was not recorded."""
        return any(name in ("mpegts", "mpeg") for name in self._formats)

    @property
    def _counts_frames(self) -> bool:
        """Whether the header's number of frames is exact (AVI's counts empty slots)."""
        return "mov" in self._formats

    def frames(self, from_pts: int | None = None) -> Iterator[av.VideoFrame]:
        """Frames in order of `pts`, which is never None.

        Args: from_pts: start at the last keyframe at or before this tick; None starts at the beginning.
        Raises: Corrupt, Truncated, Undecodable, each with what was seen.
        """
        if from_pts is not None:
            try:
                self._container.seek(from_pts, stream=self._stream, backward=True)
            except av.FFmpegError as error:
                raise Corrupt(f"seeking to tick {from_pts} fails: {error.strerror}") from None
        elif self._used:
            self._open()  # seeking back to the start is not exact in every container
        self._used = True
        yield from _in_order(self._with_pts(self._decoded(check_end=from_pts is None)))

    def _decoded(self, check_end: bool) -> Iterator[av.VideoFrame]:
        num_packets = num_frames = 0
        end_s = 0.0
        packets = self._container.demux()
        flushed = False
        while not flushed:
            try:
                packet = next(packets, None)
                flushed = packet is None
                if packet is not None:
                    if not packet.size:
                        continue  # a stream's end; the decoder is flushed once, after the last packet
                    if packet.pts is not None:
                        end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                    if packet.stream_index != self._stream.index:
                        continue
                    num_packets += 1
                frames = self._stream.codec_context.decode(packet)
            except av.FFmpegError as error:
                raise self._damage(num_frames, num_packets, error) from None
            for frame in frames:
                if frame.is_corrupt and num_frames == 0 and self._starts_anywhere:
                    continue
                if frame.is_corrupt and self._cut:
                    raise Truncated(f"{self._cut}; {num_frames} good frames")
                if frame.is_corrupt:
                    raise Corrupt(f"frame {num_frames} comes out damaged, after {num_frames} good frames")
                num_frames += 1
                yield frame
        if check_end:
            self._check_end(num_packets, num_frames, end_s)

    def _damage(self, num_frames: int, num_packets: int, error: av.FFmpegError) -> SourceError:
        declared = f" of {self._stream.frames} declared" if self._counts_frames else ""
        if self._cut:
            return Truncated(f"{self._cut}; {num_frames} good frames{declared}")
        if num_frames == 0:
            return Undecodable(f"no frame decodes: {error.strerror}")
        return Corrupt(f"{num_frames} good frames{declared}, then packet {num_packets - 1}: {error.strerror}")

    def _check_end(self, num_packets: int, num_frames: int, end_s: float) -> None:
        declared = self._stream.frames if self._counts_frames else 0
        complete = 0 < declared <= num_packets
        if self._cut and not complete:
            raise Truncated(f"{self._cut}; {num_frames} good frames")
        if num_frames == 0:
            raise Undecodable(f"no frame comes out of {num_packets} video packets")
        if num_packets < declared:
            raise Truncated(f"the file ends after {num_packets} of {declared} declared video packets")
        duration_s = (self._container.duration or 0) / av.time_base
        end_s -= (self._container.start_time or 0) / av.time_base
        if not complete and any(name in _HEADER_KNOWS_DURATION for name in self._formats):
            if end_s < min(duration_s * _TRUNCATED_SHARE, duration_s - _TRUNCATED_S):
                raise Truncated(f"the file ends at {end_s:.2f} s of {duration_s:.2f} s declared")

    def _with_pts(self, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """Frames without a timestamp follow the frame before by the nominal duration."""
        rate = self.rates[0] if self.rates else Fraction(25)
        nominal = max(1, round(1 / (rate * self.time_base)))
        expected = self.start
        for frame in frames:
            if frame.pts is None:
                self.invented_pts = True
                frame.pts = expected
            expected = frame.pts + (frame.duration or nominal)
            yield frame


def _in_order(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    held: list[tuple[int, int, av.VideoFrame]] = []
    last: int | None = None
    for count, frame in enumerate(frames):
        assert frame.pts is not None  # _with_pts sees to that
        if last is not None and frame.pts < last:
            raise Corrupt(f"timestamps go back from tick {last} to {frame.pts} at frame {count}")
        heapq.heappush(held, (frame.pts, count, frame))
        if len(held) > _REORDER:
            last, _, ready = heapq.heappop(held)
            yield ready
    while held:
        yield heapq.heappop(held)[2]


def _best_stream(container: av.container.InputContainer) -> av.VideoStream:
    pictures = [s for s in container.streams.video if s.disposition & av.stream.Disposition.attached_pic]
    moving = [s for s in container.streams.video if s not in pictures]
    if not moving:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        cover = " (a cover picture only)" if pictures else ""
        raise NoVideoStream(f"no video stream{cover}; the file holds {kinds}")
    best = container.streams.best("video")
    chosen = best if best in moving else max(moving, key=lambda s: (s.width or 0) * (s.height or 0))
    if chosen.codec_context is None:
        raise NoVideoStream("the video stream has a codec that FFmpeg does not know")
    return chosen
