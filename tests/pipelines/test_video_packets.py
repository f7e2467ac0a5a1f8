"""One group of pictures decodes on its own, exactly as in the whole clip."""

import io
import itertools
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from kinema.pipelines.video.packets import (
    GroupDecoder,
    group_decoder,
    group_of_frame,
    packet_table,
    to_rgb,
)

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import CODECS, decode, encode, number_of, paint


def packets(mp4: bytes, table, first: int, last: int) -> list[tuple[bytes, int]]:
    return [(mp4[table.offset[i] : table.offset[i] + table.size[i]], table.frame[i]) for i in range(first, last)]


@pytest.mark.parametrize("codec", CODECS)
def test_each_group_decodes_alone_and_exactly(codec):
    mp4 = encode([paint(i, shift=i) for i in range(31)], codec=codec, gop=12, preset="medium")
    table, whole = packet_table(mp4), decode(mp4)
    assert len(whole) == 31 and [number_of(frame) for frame in whole] == list(range(31))
    for frame in (30, 5, 12, 23):
        first, last = group_of_frame(frame, table.frame, table.keyframe)
        alone = GroupDecoder(codec, table.extradata).decode(packets(mp4, table, first, last))
        assert frame in alone
        for index, picture in alone.items():
            np.testing.assert_array_equal(picture, whole[index])


@pytest.mark.parametrize("codec", CODECS)
def test_one_decoder_gives_every_group_as_its_own_would(codec):
    """Groups in any order, left before their end, and one that is damaged between them."""
    rng = np.random.default_rng(0)
    mp4 = encode([paint(i, shift=i) for i in range(31)], codec=codec, gop=6, preset="medium")
    table, whole = packet_table(mp4), decode(mp4)
    decoder = GroupDecoder(codec, table.extradata)
    for number in range(40):
        frame = int(rng.integers(31))
        first, last = group_of_frame(frame, table.frame, table.keyframe)
        group = packets(mp4, table, first, last)
        if number % 8 == 5:
            with pytest.raises(ValueError, match="did not come out|do not decode|is damaged"):
                decoder.decode([(bytes(len(data)), index) for data, index in group], {frame})
        wanted = {frame, int(rng.choice([index for _, index in group]))}
        found = decoder.decode(group, wanted)
        assert set(found) == wanted
        for index, picture in found.items():
            np.testing.assert_array_equal(picture, whole[index])


@pytest.mark.parametrize("codec", CODECS)
def test_a_threads_decoder_goes_from_clip_to_clip(codec):
    """Of other sizes and of the same."""
    clips = [
        encode([paint(i, seed=n, height=64 + n // 2 * 16) for i in range(9)], codec=codec, gop=3) for n in range(6)
    ]
    tables, whole = [packet_table(mp4) for mp4 in clips], [decode(mp4) for mp4 in clips]
    for frame in (0, 8, 4, 2):
        for number, (mp4, table) in enumerate(zip(clips, tables, strict=True)):
            group = packets(mp4, table, *group_of_frame(frame, table.frame, table.keyframe))
            decoder = group_decoder(codec, table.extradata)
            np.testing.assert_array_equal(decoder.decode(group, {frame})[frame], whole[number][frame])
            assert group_decoder(codec, table.extradata) is decoder
    others = []
    thread = threading.Thread(target=lambda: others.append(group_decoder(codec, tables[-1].extradata)))
    thread.start()
    thread.join()
    assert others[0] is not group_decoder(codec, tables[-1].extradata)


@pytest.mark.parametrize("codec", [c for c in CODECS if c != "mjpeg"])
@pytest.mark.parametrize("gop", [1, 5, 12])
def test_keyframes_lie_at_multiples_of_the_group(codec, gop):
    flashing = [paint(i, seed=i // 4) for i in range(26)]  # cuts must not add keyframes
    table = packet_table(encode(flashing, codec=codec, gop=gop))
    keys = [frame for frame, key in zip(table.frame, table.keyframe, strict=True) if key]
    assert keys == list(range(0, 26, gop))
    assert sorted(table.frame) == list(range(26))


def test_only_wanted_frames_are_returned():
    mp4 = encode([paint(i) for i in range(24)])
    table = packet_table(mp4)
    first, last = group_of_frame(15, table.frame, table.keyframe)
    found = GroupDecoder("h264", table.extradata).decode(packets(mp4, table, first, last), wanted={15, 17})
    assert {index: number_of(picture) for index, picture in found.items()} == {15: 15, 17: 17}


def test_a_frame_that_does_not_come_out_is_an_error():
    mp4 = encode([paint(i) for i in range(12)])
    table = packet_table(mp4)
    with pytest.raises(ValueError, match=r"frames \[40\] did not come out"):
        GroupDecoder("h264", table.extradata).decode(packets(mp4, table, 0, 12), wanted=[40])
    with pytest.raises(ValueError, match="outside of the clip's 12 frames"):
        group_of_frame(12, table.frame, table.keyframe)
    with pytest.raises(ValueError, match="codec 'vp9' is not known"):
        GroupDecoder("vp9", b"")


def test_damaged_packets_are_an_error():
    mp4 = encode([paint(i) for i in range(12)])
    table = packet_table(mp4)
    damaged = [(bytes(len(data)), index) for data, index in packets(mp4, table, 0, 12)]
    with pytest.raises(ValueError):
        GroupDecoder("h264", table.extradata).decode(damaged)


def test_offsets_are_those_of_the_payload():
    mp4 = encode([paint(i) for i in range(13)])
    table = packet_table(mp4)
    with av.open(io.BytesIO(mp4)) as container:
        expected = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    found = [mp4[start : start + size] for start, size in zip(table.offset, table.size, strict=True)]
    assert found == expected


def test_a_reformatter_used_again_follows_each_frames_colour_tags_and_size():
    reformatter = VideoReformatter()
    seen = set()
    for colorspace, color_range, width in itertools.product((1, 5, 9), (1, 2), (48, 64)):
        frame = av.VideoFrame(width, 32, "yuv420p")
        for plane in frame.planes:
            plane.update(np.random.default_rng(0).integers(16, 235, plane.buffer_size, dtype=np.uint8).tobytes())
        frame.colorspace, frame.color_range = colorspace, color_range
        found = to_rgb(frame, reformatter)
        np.testing.assert_array_equal(found, to_rgb(frame))
        seen.add(found.tobytes())
    assert len(seen) == 12
