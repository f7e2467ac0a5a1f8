"""Which video stream of a file is the video."""

from __future__ import annotations

from fractions import Fraction

import av

from kinema.pipelines.video.errors import NoVideoStream, Undecodable

_NEARLY_LONGEST = 0.9  # of the longest stream's length: FFmpeg's choice among these stands


def choose_stream(container: av.container.InputContainer, wanted: int) -> int:
    """Index of the video stream to decode. Reads through the file where several could be it; open it again then.

    Pictures (attached, or streams of one frame beside a longer one) are never the video. Of several videos it is the
    one FFmpeg prefers among the longest.

    Args: wanted: index of the stream in the file; -1 chooses.
    Raises: NoVideoStream, Undecodable.
    """
    videos = list(container.streams.video)
    if wanted >= 0:
        return _wanted_stream(videos, wanted)
    pictures = [s for s in videos if s.disposition & av.stream.Disposition.attached_pic]
    moving = [s for s in videos if s not in pictures]
    if not moving:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        cover = " (a cover picture only)" if pictures else ""
        raise NoVideoStream(f"no video stream{cover}; the file holds {kinds}")
    if len(moving) == 1:
        return moving[0].index
    best = container.streams.best("video")
    order = [s for s in moving if s == best] + sorted((s for s in moving if s != best), key=lambda s: -_num_pixels(s))
    lengths = _lengths(container, moving)
    longest = max(length for length, _ in lengths.values())
    several = [s for s in order if lengths[s.index][1] > 1] or order
    return next((s for s in several if lengths[s.index][0] >= _NEARLY_LONGEST * longest), several[0]).index


def _num_pixels(stream: av.VideoStream) -> int:
    """Of a picture; 0 for a codec that FFmpeg does not know, whose streams have no size."""
    return 0 if stream.codec_context is None else (stream.width or 0) * (stream.height or 0)


def _wanted_stream(videos: list[av.VideoStream], wanted: int) -> int:
    if all(stream.index != wanted for stream in videos):
        there = ", ".join(str(stream.index) for stream in videos) or "none"
        raise NoVideoStream(f"stream={wanted} is no video stream of this file; its video streams: {there}")
    return wanted


def _lengths(container: av.container.InputContainer, streams: list[av.VideoStream]) -> dict[int, tuple[float, int]]:
    """Seconds and packets of every stream: as indexed, else counted."""
    if all(stream.frames and stream.duration for stream in streams):
        return {s.index: (float((s.duration or 0) * Fraction(s.time_base or 1)), s.frames) for s in streams}
    seen: dict[int, list[float]] = {stream.index: [] for stream in streams}
    counts = dict.fromkeys(seen, 0)
    try:
        for packet in container.demux(streams):
            if not packet.size:
                continue
            counts[packet.stream_index] += 1
            if packet.pts is not None and packet.time_base is not None:
                times = seen[packet.stream_index]
                now = float(packet.pts * packet.time_base)
                times[:] = [min([*times, now]), max([*times, now])]
    except av.FFmpegError as error:
        if not any(counts.values()):
            raise Undecodable(f"the file cannot be read: {error.strerror}") from None
    return {index: (times[-1] - times[0] if times else 0.0, counts[index]) for index, times in seen.items()}


def need_codec(stream: av.VideoStream) -> None:
    """Raises: NoVideoStream where FFmpeg has no decoder."""
    if stream.codec_context is None:
        raise NoVideoStream("the video stream has a codec that FFmpeg does not know")
