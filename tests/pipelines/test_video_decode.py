"""Opening and decoding: the right stream, upright, in order, and a true reason for what cannot be used."""

import io
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from kinema.pipelines.video.container_size import missing_end
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.errors import Corrupt, NoVideoStream, SourceError, Truncated, Undecodable
from kinema.pipelines.video.orient import orientation_of
from kinema.pipelines.video.packets import to_rgb

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import number_of, numbered, paint, set_display_matrix, write_sound, write_video


def decode(data: bytes) -> list[av.VideoFrame]:
    """All frames, opened as the stage opens a file."""
    with VideoFile(io.BytesIO(data), missing_end(io.BytesIO(data), len(data))) as video:
        return list(video.frames())


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov", "a.ts"])
def test_all_frames_come_in_order(tmp_path, name):
    path = numbered(tmp_path / name, 30, audio=True)
    with VideoFile(str(path)) as video:
        frames = list(video.frames())
        assert [number_of(to_rgb(frame)) for frame in frames] == list(range(30))
        assert float(video.rates[0]) == pytest.approx(24)
        again = list(video.frames())
    assert [frame.pts for frame in again] == [frame.pts for frame in frames]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_seeking_starts_at_the_keyframe_before(tmp_path, name):
    path = numbered(tmp_path / name, 60, options={"g": "10", "bf": "2", "preset": "medium"})
    with VideoFile(str(path)) as video:
        assert video.seeks
        pts = [frame.pts for frame in video.frames()]
        for target in (47, 10, 3, 59):
            found = [number_of(to_rgb(frame)) for frame in video.frames(from_pts=pts[target])]
            assert target - 10 < found[0] <= target
            assert found == list(range(found[0], 60))


@pytest.mark.parametrize(
    "matrix, turn",
    [
        ((1, 0, 0, 1), lambda p: p),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: np.transpose(p, (1, 0, 2))),
        ((0, -1, -1, 0), lambda p: np.transpose(p[::-1, ::-1], (1, 0, 2))),
    ],
)
def test_the_display_matrix_turns_and_mirrors(tmp_path, matrix, turn):
    """A matrix (a, b, c, d) shows the stored pixel (x, y) at (a x + c y, b x + d y), up to a shift."""
    path = set_display_matrix(numbered(tmp_path / "a.mp4", 2), matrix)
    with VideoFile(str(path)) as video:
        frame = next(video.frames())
        stored = to_rgb(frame)
        np.testing.assert_array_equal(orientation_of(frame).apply(stored), turn(stored))


def test_truncated_files_are_called_truncated(tmp_path):
    for name in ("a.mp4", "a.mkv", "a.avi"):
        data = numbered(tmp_path / name, 60).read_bytes()
        for share in (0.4, 0.7, 0.99):
            with pytest.raises(Truncated, match="byte|declared"):
                decode(data[: int(len(data) * share)])


def test_a_recording_without_its_index_is_truncated(tmp_path):
    data = numbered(tmp_path / "a.mp4", 30).read_bytes()
    assert data.index(b"mdat") < data.index(b"moov"), "the index is at the end"
    with pytest.raises(Truncated, match="no moov box"):
        decode(data[: data.index(b"moov") - 4])


def test_damaged_data_is_corrupt_and_says_where(tmp_path):
    data = bytearray(numbered(tmp_path / "a.mp4", 60, options={"g": "10", "crf": "1"}).read_bytes())
    box = data.index(b"mdat")
    middle = box + int.from_bytes(data[box - 4 : box], "big") // 2
    data[middle : middle + 400] = bytes(b ^ 0x5A for b in data[middle : middle + 400])
    with pytest.raises(Corrupt, match=r"\d+ good frames"):
        decode(bytes(data))


def test_sound_alone_is_no_video(tmp_path):
    with pytest.raises(NoVideoStream, match="holds audio"):
        decode(write_sound(tmp_path / "a.mp4").read_bytes())


@pytest.mark.parametrize("data", [b"hello" * 500, bytes(3000), b"\x00\x00\x00\x18ftypmp42" + bytes(100)])
def test_what_is_no_video_does_not_open(data):
    with pytest.raises(SourceError):
        decode(data)
    with pytest.raises(Undecodable, match="does not open"):
        decode(b"hello" * 500)


def test_ten_bits_decode(tmp_path):
    path = numbered(
        tmp_path / "a.mkv", 6, codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": "log-level=0"}
    )
    with VideoFile(str(path)) as video:
        frames = list(video.frames())
    assert frames[0].format.name == "yuv420p10le"
    assert [number_of(to_rgb(frame)) for frame in frames] == list(range(6))


def test_variable_timestamps_are_kept(tmp_path):
    pts = np.cumsum([0, *[1001, 2002, 1501] * 5]).tolist()
    frames = [paint(i) for i in range(16)]
    path = write_video(tmp_path / "a.mp4", frames, pts=pts, time_base=Fraction(1, 30000), fps=30)
    with VideoFile(str(path)) as video:
        found = [(frame.pts * video.time_base, number_of(to_rgb(frame))) for frame in video.frames()]
    assert found == [(Fraction(tick, 30000), i) for i, tick in enumerate(pts)]


def test_the_best_of_two_streams(shared_data):
    with VideoFile(str(shared_data / "videos" / "torchcodec_nasa_13013.mp4")) as video:
        frame = next(video.frames())
        assert (video.stream_index, frame.width, frame.height) == (3, 480, 270)


def test_the_corrupt_file_says_how_much_was_good(shared_data):
    data = (shared_data / "videos" / "decord_corrupted.mp4").read_bytes()
    with pytest.raises(Corrupt, match="^28 good frames of 50 declared, then packet 30: Invalid data"):
        decode(data)


def test_complete_files_are_not_called_cut(shared_data):
    for path in sorted((shared_data / "videos").iterdir()):
        data = path.read_bytes()
        assert missing_end(io.BytesIO(data), len(data)) is None, path.name
