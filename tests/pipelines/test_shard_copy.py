"""`clip.codec=copy`: clips of the source's own packets, frame by frame the source's own pictures."""

import json
import sys
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from kinema.configs import ClipConfig, ShardConfig
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.shard import ShardSummary, run
from kinema.pipelines.video.packets import GroupDecoder, group_of_frame, to_rgb

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import decode, numbered, set_display_matrix, write_video


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")


def copied(folder: Path, out: Path, **clip) -> tuple[ShardSummary, list[dict]]:
    """Summary, and rows with the mp4 and the json."""
    config = ClipConfig(**{"codec": "copy", "cuts": "none", "preset": "ultrafast", "seconds": 2.0, **clip})
    summary = run(ShardConfig(videos=str(folder), out=str(out), clip=config, min_shards=1), report=lambda _: None)
    artifact = Artifact.read(str(out))
    assert artifact.verify() == []
    rows = artifact.samples().to_pylist()
    for row in rows:
        url = artifact.shard_url(row["shard"])
        row["mp4"] = read_range(url, row["mp4_offset"], row["mp4_size"])
        row["json"] = json.loads(read_range(url, row["json_offset"], row["json_size"]))
    return summary, rows


def source_pictures(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [to_rgb(frame) for frame in container.decode(video=0)]


H264 = {"options": {"g": "12", "bf": "2", "crf": "16", "preset": "veryfast"}}
HEVC = {"codec": "libx265", "options": {"x265-params": "keyint=12:open-gop=0:bframes=2:log-level=error"}}
AV1 = {"codec": "libsvtav1", "options": {"preset": "10", "g": "12", "svtav1-params": "irefresh-type=2"}}


@pytest.mark.parametrize(
    "name, codec, how",
    [("a.mp4", "h264", H264), ("a.mkv", "h264", H264), ("a.mp4", "hevc", HEVC), ("a.mkv", "av1", AV1)],
)
def test_copied_clips_hold_the_sources_pictures(tmp_path, name, codec, how):
    path = numbered(tmp_path / "v" / name, 60, speed=1, **how)
    summary, rows = copied(tmp_path / "v", tmp_path / "out")
    assert (summary.copied, summary.clips) == (len(rows), len(rows)) and len(rows) == 2
    originals = source_pictures(path)
    shown = [picture for row in rows for picture in decode(row["mp4"])]
    assert len(shown) == len(originals) == 60
    for picture, original in zip(shown, originals, strict=True):
        np.testing.assert_array_equal(picture, original)
    for row in rows:
        assert (row["codec"], row["fps_num"], row["fps_den"], row["json"]["gop"]) == (codec, 24, 1, 12)
        assert row["packet_keyframe"][0] and row["motion_score"] is not None
        for frame in (0, row["num_frames"] - 1):
            first, last = group_of_frame(frame, row["packet_frame"], row["packet_keyframe"])
            packets = [
                (row["mp4"][row["packet_offset"][i] :][: row["packet_size"][i]], row["packet_frame"][i])
                for i in range(first, last)
            ]
            picture = GroupDecoder(row["codec"], row["extradata"]).decode(packets)[frame]
            np.testing.assert_array_equal(picture, decode(row["mp4"])[frame])
    assert rows[1]["start_s"] == pytest.approx(float(Fraction(rows[0]["num_frames"], 24)))


@pytest.mark.parametrize("why", ["open groups", "long groups", "turned", "shrunk", "another codec", "odd size"])
def test_what_does_not_qualify_is_encoded(tmp_path, why):
    options = {"g": "12", "bf": "2", "crf": "16", "preset": "veryfast"}
    how: dict = {"options": options}
    clip: dict = {}
    if why == "open groups":
        options["x264-params"] = "open-gop=1:b-adapt=0:scenecut=0"
    if why == "long groups":
        options["g"] = "60"
    if why == "shrunk":
        clip["short_side"] = 64
    if why == "odd size":
        how |= {"width": 131, "pix_fmt": "yuv444p"}
    if why == "another codec":
        how = {"codec": "mpeg4"}
    path = numbered(tmp_path / "v" / "a.mp4", 60, **how)
    if why == "turned":
        set_display_matrix(path, (-1, 0, 0, -1))
    summary, rows = copied(tmp_path / "v", tmp_path / "out", **clip)
    assert (summary.copied, summary.quarantined) == (0, 0)
    assert {row["codec"] for row in rows} == {"h264"} and sum(row["num_frames"] for row in rows) == 60


def test_motion_of_copied_clips_is_that_of_encoded_ones(tmp_path):
    """It is sampled: three frames of every group, at the same small size."""
    numbered(tmp_path / "v" / "still.mp4", 48, **H264)
    numbered(tmp_path / "v" / "moving.mp4", 48, speed=2, **H264)
    _, taken = copied(tmp_path / "v", tmp_path / "taken")
    _, encoded = copied(tmp_path / "v", tmp_path / "encoded", codec="h264", preset="ultrafast")
    scores = [{row["source"]: row["motion_score"] for row in rows} for rows in (taken, encoded)]
    assert scores[0]["moving.mp4"] == pytest.approx(scores[1]["moving.mp4"], rel=0.3)
    assert scores[0]["still.mp4"] < 0.6 * scores[0]["moving.mp4"]  # the number in its corner changes


def test_clips_are_taken_out_of_a_tar(tmp_path):
    """A member is read through one open file by several containers."""
    path = numbered(tmp_path / "a.mp4", 60, speed=1, **H264)
    (tmp_path / "v").mkdir()
    with tarfile.open(tmp_path / "v" / "x.tar", "w") as tar:
        tar.add(path, "a.mp4")
        tar.add(path, "b.mp4")
    summary, rows = copied(tmp_path / "v", tmp_path / "out")
    assert (summary.copied, summary.clips, summary.quarantined) == (4, 4, 0)
    shown = [picture for row in rows[:2] for picture in decode(row["mp4"])]
    np.testing.assert_array_equal(np.stack(shown), np.stack(source_pictures(path)))


def test_damage_between_keyframes_is_seen_although_nothing_is_encoded(tmp_path):
    path = numbered(tmp_path / "v" / "a.mp4", 60, speed=3, **H264)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size, p.is_keyframe) for p in container.demux(video=0) if p.size]
    at, size, _ = max((p for p in packets[24:] if not p[2]), key=lambda p: p[1])
    data = bytearray(path.read_bytes())
    data[at + 8 : at + size] = bytes((255 * (i % 3 == 0)) for i in range(size - 8))
    path.write_bytes(bytes(data))
    summary, rows = copied(tmp_path / "v", tmp_path / "out")
    assert (summary.quarantined, rows) == (1, [])


def test_a_shot_that_begins_inside_of_a_group_is_encoded_and_the_others_are_taken(tmp_path):
    """The quick look is thrown away then: clips that are encoded are checked against whole pictures."""
    path = tmp_path / "v" / "a.mp4"
    frames = [np.full((96, 128, 3), 30 if i < 18 else 220, np.uint8) for i in range(36)]
    for number, frame in enumerate(frames):
        frame[20:80, 20 + number % 12 : 60 + number % 12] = 255 - frame[0, 0]
    write_video(path, frames, options={"g": "12", "sc_threshold": "0", "bf": "0", "preset": "veryfast"})
    summary, rows = copied(tmp_path / "v", tmp_path / "out", cuts="content", min_frames=2)
    assert [row["num_frames"] for row in rows] == [18, 18]
    assert summary.copied == 0 and summary.quarantined == 0
