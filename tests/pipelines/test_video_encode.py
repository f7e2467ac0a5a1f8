"""Encoded clips: same bytes every time, right colours, odd sizes, a lossless setting, a file that streams."""

import io
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from kinema.configs import ClipConfig
from kinema.pipelines.video.encode import ClipEncoder
from kinema.pipelines.video.errors import Unencodable
from kinema.pipelines.video.orient import Orientation
from kinema.pipelines.video.packets import to_rgb
from kinema.pipelines.video.picture import PictureMaker, picture_spec

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import CODECS, decode, encode, number_of, paint, texture

BT709, BT601, BT2020 = 1, 6, 9
LIMITED, FULL = 1, 2


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_frames_give_the_same_bytes(codec):
    frames = [paint(i, shift=i) for i in range(15)]
    assert encode(frames, codec=codec) == encode(frames, codec=codec)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="scheduling policies are Linux's")
def test_encoding_leaves_the_threads_priority_alone():
    """SVT-AV1 makes its caller a real-time thread where it may, which would starve the rest of the machine."""
    before = os.sched_getscheduler(0)
    encode([paint(i, shift=i) for i in range(3)], codec="av1")
    assert os.sched_getscheduler(0) == before


ENCODE_IN_A_FRESH_PROCESS = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from made_videos import encode, paint
frames = [paint(i, height=180, width=320, shift=3 * i) for i in range(24)]
print(hashlib.sha256(encode(frames, codec=sys.argv[2], preset="medium")).hexdigest())
"""


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_do_not_depend_on_what_memory_held_before(codec):
    command = [sys.executable, "-c", ENCODE_IN_A_FRESH_PROCESS, str(Path(__file__).parent), codec]
    hashes = {
        subprocess.run(
            command, env={**os.environ, "MALLOC_PERTURB_": fill}, capture_output=True, text=True, check=True
        ).stdout
        for fill in ("85", "170")
    }
    assert len(hashes) == 1


def test_the_index_comes_before_the_data():
    mp4 = encode([paint(i) for i in range(5)])
    assert 0 < mp4.index(b"moov") < mp4.index(b"mdat")


@pytest.mark.parametrize("size", [(48, 64), (49, 65)])
def test_lossless_is_lossless_in_rgb(size):
    frames = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i in range(7)]
    np.testing.assert_array_equal(decode(encode(frames, codec="h264_lossless")), frames)


COLOURS = ((200, 30, 40), (30, 180, 60), (40, 60, 210), (230, 220, 40), (240, 240, 240), (15, 15, 15))
SIDE = 48


def tagged(matrix: int, color_range: int, pix_fmt: str = "yuv420p") -> av.VideoFrame:
    """Flat patches of COLOURS as YUV of this matrix and range, tagged so (2 and 0: BT.601 limited, no tags)."""
    rgb = np.repeat(np.repeat(np.array([COLOURS], np.uint8), SIDE, 0), SIDE, 1)
    source = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    swscale_matrix = {BT709: 1, BT2020: 9}.get(matrix, 5)
    frame = VideoReformatter().reformat(
        source, format=pix_fmt, dst_colorspace=swscale_matrix, dst_color_range=color_range or LIMITED, threads=1
    )
    frame.colorspace, frame.color_range = matrix, color_range
    return frame


def patch_colours(picture: np.ndarray) -> np.ndarray:
    """Mean colour [6, 3] of the inside of each patch."""
    inside = picture[8:-8].reshape(SIDE - 16, len(COLOURS), SIDE, 3)[:, :, 8:-8]
    return inside.mean((0, 2))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "matrix, color_range, pix_fmt",
    [
        (BT709, LIMITED, "yuv420p"),
        (BT601, LIMITED, "yuv420p"),
        (2, 0, "yuv420p"),
        (BT709, FULL, "yuv420p"),
        (BT601, FULL, "yuvj420p"),
        (BT2020, LIMITED, "yuv420p10le"),
        (BT709, LIMITED, "yuv422p"),
        (BT709, LIMITED, "yuv444p10le"),
    ],
)
def test_colours_survive(codec, matrix, color_range, pix_fmt):
    """Reading the patches by another matrix or range moves some of them by more than 8."""
    frame = tagged(matrix, color_range, pix_fmt)
    config = ClipConfig(codec=codec, crf=6, preset="ultrafast")
    spec = picture_spec(frame, Orientation(), codec, 0)
    maker = PictureMaker(spec)
    with ClipEncoder(config, spec, Fraction(24)) as encoder:
        for _ in range(3):
            encoder.add(maker.make(frame))
        found = decode(encoder.finish())
    assert np.abs(patch_colours(found[1]) - COLOURS).max() < 5
    if codec == "h264_lossless":
        np.testing.assert_array_equal(found[1], to_rgb(tagged(matrix, color_range, pix_fmt)))


@pytest.mark.parametrize("codec", ["h264", "hevc", "mjpeg", "mpeg4"])
def test_odd_sizes_are_padded_by_copies_and_lose_nothing(codec):
    frame = texture(4, 97, 131)
    found = decode(encode([frame] * 3, codec=codec, crf=4))[0]
    assert found.shape == (98, 132, 3)
    assert psnr(found[:97, :131], frame) > 35
    assert np.abs(found[97].astype(int) - found[96]).mean() < 6


@pytest.mark.parametrize("height, width", [(97, 131), (96, 131), (96, 128)])
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirror", [False, True])
def test_turning_equals_turning_the_rgb_picture(height, width, turns, mirror):
    frame = av.VideoFrame.from_ndarray(texture(5, height, width), format="rgb24").reformat(format="yuv444p", threads=1)
    frame = frame.reformat(format="yuv420p", threads=1)
    orientation = Orientation(turns, mirror)
    spec = picture_spec(frame, orientation, "h264", 0)
    turned = to_rgb(PictureMaker(spec).make(frame))
    wanted = orientation.apply(to_rgb(frame))
    assert (spec.height - spec.pad_bottom, spec.width - spec.pad_right) == wanted.shape[:2]
    assert psnr(turned[: wanted.shape[0], : wanted.shape[1]], wanted) > 34


@pytest.mark.parametrize("turns", [0, 1])
def test_shrinking_keeps_the_shape_and_never_enlarges(turns):
    frame = av.VideoFrame.from_ndarray(texture(6, 270, 480), format="rgb24")
    spec = picture_spec(frame, Orientation(turns), "h264", 90)
    assert (spec.width, spec.height) == ((160, 90) if turns == 0 else (90, 160))
    picture = to_rgb(PictureMaker(spec).make(frame))
    assert picture.shape == (spec.height, spec.width, 3)
    same = picture_spec(frame, Orientation(turns), "h264", 4000)
    assert min(same.width, same.height) == 270


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
@pytest.mark.parametrize(
    "fps",
    [Fraction(4500000, 223723), Fraction(30000, 1001), Fraction(1000000, 33367), Fraction(100000), Fraction(1, 3)],
)
def test_the_rate_is_exact(codec, fps):
    """Also where MPEG-4's own clock, with at most 65535 ticks a second, is not."""
    with av.open(io.BytesIO(encode([paint(i) for i in range(9)], fps=fps, codec=codec))) as container:
        assert container.streams.video[0].average_rate == fps
        frames = list(container.decode(video=0))
        assert [frame.pts * frame.time_base for frame in frames] == [i / fps for i in range(9)]
        assert [number_of(to_rgb(frame)) for frame in frames] == list(range(9))


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "h264_lossless"])
def test_a_higher_crf_costs_quality_and_saves_bytes(codec):
    frames = [paint(i, height=240, width=320, shift=2 * i) for i in range(13)]
    clips = [encode(frames, codec=codec, crf=crf) for crf in (6, 24, 42)]
    quality = [np.mean([psnr(a, b) for a, b in zip(decode(clip), frames, strict=True)]) for clip in clips]
    assert len(clips[0]) > 1.1 * len(clips[1]) > 1.2 * len(clips[2])
    assert quality[0] > quality[1] + 0.3 > quality[2] + 0.6


@pytest.mark.parametrize("codec, side", [("h264", 16386), ("mpeg4", 8192)])
def test_pictures_too_large_for_the_codec_are_called_that(codec, side):
    with pytest.raises(Unencodable, match=f"{side} x 16 are larger or smaller than clip.codec={codec} encodes; set"):
        encode([np.zeros((16, side, 3), np.uint8)] * 2, codec=codec)


def test_settings_that_the_encoder_refuses_are_no_fault_of_the_size():
    with pytest.raises(av.FFmpegError):
        encode([paint(0)], preset="nonsense")


def test_encoding_does_not_change_the_decoders_frame():
    frame = tagged(BT709, LIMITED)
    frame.pts = 77
    spec = picture_spec(frame, Orientation(), "h264", 0)
    with ClipEncoder(ClipConfig(), spec, Fraction(24)) as encoder:
        encoder.add(PictureMaker(spec).make(frame))
        encoder.finish()
    assert frame.pts == 77
