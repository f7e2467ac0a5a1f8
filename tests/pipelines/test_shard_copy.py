"""`clip.codec=copy`: clips of the source's own packets, frame by frame the source's own pictures."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from kinema.configs import ClipConfig, ShardConfig
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.shard import ShardSummary, run
from kinema.pipelines.video.packets import decode_gop, group_of_frame, to_rgb

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import decode, numbered, set_display_matrix


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
            picture = decode_gop(row["codec"], row["extradata"], packets)[frame]
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
