"""The stage on real videos: every file is in clips or in quarantine, upright, in time, within shots."""

import io
import json
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from kinema.configs import ClipConfig, ShardConfig
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.shard import run
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.orient import orientation_of
from kinema.pipelines.video.packets import to_rgb

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import decode
from test_video_cuts import TEARS_CUTS


@pytest.fixture(scope="module")
def clips(shared_data, tmp_path_factory) -> dict[str, list[dict]]:
    """Source -> rows of its clips, with json and frames. Small and fast, since sizes are not at stake here."""
    out = tmp_path_factory.mktemp("real") / "clips"
    clip = ClipConfig(short_side=128, preset="ultrafast", crf=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        summary = run(ShardConfig(videos=str(shared_data / "videos"), out=str(out), clip=clip), report=lambda _: None)
    assert (summary.sources, summary.quarantined, summary.exit_status) == (18, 1, 0)
    artifact = Artifact.read(out)
    assert artifact.verify() == []
    by_source: dict[str, list[dict]] = {}
    for row in artifact.samples().to_pylist():
        url = artifact.shard_url(row["shard"])
        row["mp4"] = read_range(url, row["mp4_offset"], row["mp4_size"])
        row["json"] = json.loads(read_range(url, row["json_offset"], row["json_size"]))
        by_source.setdefault(row["source"], []).append(row)
    by_source["quarantine"] = pq.read_table(out / "quarantine.parquet").to_pylist()
    return by_source


@cache
def source_pts(path: Path) -> tuple[int, ...]:
    """Timestamps of every frame of a source, in order."""
    with VideoFile(str(path)) as video:
        return tuple(frame.pts for frame in video.frames())


def source_frames(path: Path, indices: set[int], spec: dict) -> dict[int, np.ndarray]:
    """Chosen frames of a source, upright, at the size of its clips."""
    found = {}
    with VideoFile(str(path)) as video:
        for index, frame in enumerate(video.frames()):
            if index in indices:
                orientation = orientation_of(frame)
                size = (spec["height"], spec["width"]) if orientation.swaps_sides else (spec["width"], spec["height"])
                small = frame.reformat(width=size[0], height=size[1], interpolation="BICUBIC", threads=1)
                found[index] = orientation.apply(to_rgb(small))
            if len(found) == len(indices):
                break
    return found


def test_every_file_is_in_clips_or_quarantine(clips, shared_data):
    (bad,) = clips["quarantine"]
    assert (bad["source"], bad["error_class"]) == ("decord_corrupted.mp4", "Corrupt")
    assert bad["message"].startswith("28 good frames of 50 declared, then packet 30: Invalid data")
    names = {path.name for path in (shared_data / "videos").iterdir()}
    assert set(clips) - {"quarantine"} == names - {"decord_corrupted.mp4"}


def frame_numbers(row: dict, folder: Path) -> list[int]:
    """Which frames of its source a clip shows."""
    number = {tick: index for index, tick in enumerate(source_pts(folder / row["source"]))}
    return [number[tick] for tick in row["json"]["pts"]]


def test_every_frame_is_there_once_where_the_rate_is_constant(clips, shared_data):
    for source, rows in clips.items():
        if source in ("quarantine", "derived_vfr_flower.mp4"):
            continue
        pts = source_pts(shared_data / "videos" / source)
        shown = [tick for row in rows for tick in row["json"]["pts"]]
        lost = sorted(set(pts) - set(shown))
        assert shown == [tick for tick in pts if tick not in lost], source
        # a shot of one frame between two cuts is no clip
        assert len(lost) <= (1 if source == "mdn_tears_of_steel.webm" else 0), source


def test_clips_show_their_source_upright(clips, shared_data):
    """Compared with the source's own frames after turning them by the display matrix."""
    for source, rows in clips.items():
        if source == "quarantine" or "pts" not in rows[0]["json"]:
            continue
        row = rows[min(1, len(rows) - 1)]
        pts = source_pts(shared_data / "videos" / source)
        wanted = {0, row["num_frames"] // 2, row["num_frames"] - 1}
        indices = {i: pts.index(row["json"]["pts"][i]) for i in wanted}
        originals = source_frames(shared_data / "videos" / source, set(indices.values()), row)
        frames = decode(row["mp4"])
        for i, index in indices.items():
            assert frames[i].shape == originals[index].shape
            assert np.abs(frames[i].astype(int) - originals[index]).mean() < 4, (source, i)


def test_the_four_rotations(clips):
    """Filmed with the camera turned; the keyboard's letters are upright in all of them (looked at)."""
    shapes = {
        angle: (rows[0]["width"] > rows[0]["height"], rows[0]["rotation"])
        for angle in (0, 90, 180, 270)
        for rows in [clips[f"decord_video_{angle}.mov"]]
    }
    assert shapes == {0: (True, 0), 90: (False, 270), 180: (True, 180), 270: (False, 90)}


def test_the_variable_rate_file_is_shown_by_its_timestamps(clips, shared_data):
    rows = clips["derived_vfr_flower.mp4"]
    assert {(row["fps_num"], row["fps_den"]) for row in rows} == {(4500000, 223723)}, "its average rate"
    pts = source_pts(shared_data / "videos" / "derived_vfr_flower.mp4")
    ticks_per_frame = Fraction(223723, 4500000) * 30000
    shown = [tick for row in rows for tick in row["json"]["pts"]]
    for number, tick in enumerate(shown):
        due = number * ticks_per_frame
        assert tick == max(p for p in pts if p <= due)
    assert rows[0]["json"]["source_facts"]["variable_rate"] is True


def test_no_clip_crosses_a_cut_of_the_film(clips, shared_data):
    numbers = [frame_numbers(row, shared_data / "videos") for row in clips["mdn_tears_of_steel.webm"]]
    for shown in numbers:
        assert shown == list(range(shown[0], shown[-1] + 1))
        assert not set(shown[1:]) & set(TEARS_CUTS)
    assert len(numbers) < 40, "shots are not cut to shreds"


def test_codecs_and_streams(clips):
    assert {len(rows) and rows[0]["codec"] for name, rows in clips.items() if name != "quarantine"} == {"h264"}
    facts = {name: rows[0]["json"]["source_facts"] for name, rows in clips.items() if name != "quarantine"}
    assert (facts["torchcodec_nasa_13013.mp4"]["stream"], facts["torchcodec_nasa_13013.mp4"]["stored_width"]) == (
        3,
        480,
    )
    assert facts["torchcodec_nasa_13013_hdr.mp4"]["stored_pix_fmt"] == "yuv420p10le"
    assert facts["torchcodec_av1_video.mkv"]["codec"] == "av1"
    assert facts["mdn_tears_of_steel.webm"]["codec"] == "vp8"


def test_the_same_footage_in_another_codec_is_a_near_duplicate(clips):
    for copy, original in (
        ("mdn_flower.webm", "mdn_flower.mp4"),
        ("torchcodec_nasa_13013_hdr.mp4", "torchcodec_nasa_13013.mp4"),
    ):
        assert [row["near_duplicate_of"] for row in clips[copy]] == [row["key"] for row in clips[original]]
    rest = [name for name in clips if name not in ("quarantine", "mdn_flower.webm", "torchcodec_nasa_13013_hdr.mp4")]
    assert not [name for name in rest for row in clips[name] if row["near_duplicate_of"] or row["duplicate_of"]]


def test_motion_scores_agree_across_codecs_and_with_what_is_seen(clips):
    scores = {name: [row["motion_score"] for row in rows] for name, rows in clips.items() if name != "quarantine"}
    assert scores["mdn_flower.webm"] == pytest.approx(scores["mdn_flower.mp4"], rel=0.35)
    assert max(scores["mdn_tears_of_steel.webm"]) > 5 * max(scores["sam2_05_default_juggle.mp4"])
    assert all(0 <= score < 0.2 for values in scores.values() for score in values)


def test_clips_open_as_ordinary_mp4(clips):
    row = clips["mdn_friday.mp4"][0]
    with av.open(io.BytesIO(row["mp4"])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.frames) == ("h264", row["num_frames"])
        assert stream.average_rate == Fraction(row["fps_num"], row["fps_den"])
