"""Recordings put together without care, and fragmented files that were cut: no frame that nobody filmed, none lost."""

import io
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import pytest

from kinema.pipelines.video.container_size import missing_end
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.errors import Truncated
from kinema.pipelines.video.packets import to_rgb

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import number_of, paint, write_video

GROUP = 20
"""Frames from one keyframe to the next."""


def transport_stream(
    folder: Path, first: int, num_frames: int, *, start_s: float = 0, keep: Callable[[int], bool] = lambda _: True
) -> bytes:
    """Frames that carry `first`, `first + 1`, ...; packets in decoding order that `keep` refuses are left out."""
    frames = [paint(first + i, shift=i) for i in range(num_frames)]
    path = write_video(folder / "part.mp4", frames, options={"g": str(GROUP), "bf": "2", "sc_threshold": "0"})
    with av.open(str(path)) as source, av.open(str(folder / "part.ts"), "w", format="mpegts") as target:
        stream = source.streams.video[0]
        out = target.add_stream_from_template(stream)
        for index, packet in enumerate(source.demux(stream)):
            if packet.size and keep(index):
                shift = round(start_s / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = out
                target.mux(packet)
    return (folder / "part.ts").read_bytes()


def seen(data: bytes) -> tuple[list[list[int]], int]:
    """Numbers of the frames of every recording, and how many frames were left out."""
    parts: list[list[int]] = [[]]
    with VideoFile(io.BytesIO(data), missing_end(io.BytesIO(data), len(data))) as video:
        for picture in video.pictures():
            if picture.restarted:
                parts.append([])
            parts[-1].append(number_of(to_rgb(picture.frame)))
        return parts, video.num_dropped


def test_what_refers_to_frames_before_a_joint_is_left_out(tmp_path):
    """FFmpeg's own decode shows frames there that mix two recordings."""
    one = transport_stream(tmp_path, 0, 40)
    two = transport_stream(tmp_path, 40, 60, keep=lambda packet: packet >= 7)
    with av.open(io.BytesIO(one + two)) as container:
        plain = [number_of(to_rgb(frame)) for frame in container.decode(video=0)]
    assert plain != sorted(set(plain)) or len(plain) > 80
    parts, num_dropped = seen(one + two)
    assert parts == [list(range(40)), list(range(40 + GROUP, 100))]
    assert num_dropped == GROUP - 7


def test_a_joint_at_a_keyframe_loses_nothing(tmp_path):
    data = b"".join(transport_stream(tmp_path, first, 24) for first in (0, 24, 48))
    assert seen(data) == ([list(range(0, 24)), list(range(24, 48)), list(range(48, 72))], 0)


def test_a_clock_that_goes_far_back_has_not_run_over(tmp_path):
    """FFmpeg adds 2^33 ticks to it: a pause of 26 hours that never was."""
    data = transport_stream(tmp_path, 0, 24, start_s=100) + transport_stream(tmp_path, 24, 24, start_s=3)
    assert seen(data) == ([list(range(24)), list(range(24, 48))], 0)


def test_a_clock_that_runs_over_goes_on(tmp_path):
    data = transport_stream(tmp_path, 0, 48, start_s=float(Fraction(2**33, 90000)) - 1.5)
    assert seen(data) == ([list(range(48))], 0)


def boxes(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(data):
        found.append((at, data[at + 4 : at + 8]))
        at += int.from_bytes(data[at : at + 4], "big")
    return found


@pytest.mark.parametrize("flags", ["frag_keyframe+empty_moov+default_base_moof", "frag_keyframe", "dash+frag_keyframe"])
def test_a_file_cut_between_fragments_is_whole(tmp_path, flags):
    path = tmp_path / "f.mp4"
    with av.open(str(path), "w", options={"movflags": flags}) as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "10", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(60):
            frame = av.VideoFrame.from_ndarray(paint(index, shift=index), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    starts = [at for at, kind in boxes(data) if kind == b"moof"]
    missing_first = 0 if "empty" in flags or "dash" in flags else 10  # else the first ten lie outside of fragments
    parts, _ = seen(data[: starts[3]])
    assert parts == [list(range(30 + missing_first))]
    for cut in (starts[3] + 20, starts[4] - 30):  # inside of a fragment's head and of its data
        with pytest.raises(Truncated, match=f"byte {cut}"):
            seen(data[:cut])
