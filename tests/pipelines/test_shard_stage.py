"""`kinema shard` from end to end on small videos, without Ray."""

import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from kinema.configs import ClipConfig, ShardConfig
from kinema.pipelines import engine
from kinema.pipelines.artifacts import Artifact, read_range, tar
from kinema.pipelines.artifacts.store import disk_full_is_clear
from kinema.pipelines.errors import StageError
from kinema.pipelines.shard import ShardSummary, build, run, stage
from kinema.pipelines.video.packets import GroupDecoder, group_of_frame

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import decode, number_of, numbered, paint, set_display_matrix, texture, tree, write_sound, write_video
from test_shard_sources import lay_out, mask, picture, write_tar

CLIP = ClipConfig(seconds=1.0, preset="ultrafast", crf=10)


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")


def shard(videos: Path | str, out: Path | str, **settings) -> ShardSummary:
    config = ShardConfig(videos=str(videos), out=str(out), **{"clip": CLIP, **settings})
    return run(config, report=lambda line: None)


def samples(out: Path | str) -> list[dict]:
    """Rows of samples.parquet with the mp4's bytes, its frames' numbers and the json."""
    artifact = Artifact.read(str(out))
    assert artifact.verify() == []
    rows = artifact.samples().to_pylist()
    for row in rows:
        url = artifact.shard_url(row["shard"])
        row["mp4"] = read_range(url, row["mp4_offset"], row["mp4_size"])
        row["json"] = json.loads(read_range(url, row["json_offset"], row["json_size"]))
        row["frames"] = decode(row["mp4"])
        row["numbers"] = [number_of(frame) for frame in row["frames"]]
    return rows


def quarantine(out: Path) -> dict[str, tuple[str, str]]:
    rows = pq.read_table(out / "quarantine.parquet").to_pylist()
    return {row["source"]: (row["error_class"], row["message"]) for row in rows}


def test_clips_cover_every_frame_and_the_rows_say_what_they_are(tmp_path):
    numbered(tmp_path / "v" / "b" / "one.mp4", 60, speed=2)
    numbered(tmp_path / "v" / "two.mkv", 20, seed=3, fps=Fraction(30000, 1001))
    summary = shard(tmp_path / "v", tmp_path / "out")
    assert (summary.sources, summary.clips, summary.quarantined, summary.exit_status) == (2, 4, 0, 0)
    rows = samples(tmp_path / "out")
    assert [(row["source"], row["numbers"]) for row in rows] == [
        ("b/one.mp4", list(range(20))),
        ("b/one.mp4", list(range(20, 40))),
        ("b/one.mp4", list(range(40, 60))),
        ("two.mkv", list(range(20))),
    ]
    assert [row["start_s"] for row in rows[:3]] == pytest.approx([0, 20 / 24, 40 / 24])
    assert (rows[3]["fps_num"], rows[3]["fps_den"]) == (30000, 1001)
    assert rows[0]["motion_score"] == pytest.approx(2 / np.hypot(96, 128), rel=0.5)
    for row in rows:
        meta = row["json"]
        assert (meta["key"], meta["num_frames"], meta["source"]) == (row["key"], row["num_frames"], row["source"])
        assert (meta["width"], meta["height"], meta["rotation"], meta["codec"]) == (128, 96, 0, "h264")
        assert len(meta["pts"]) == row["num_frames"] and meta["labels"] == {}
        first, last = group_of_frame(13, row["packet_frame"], row["packet_keyframe"])
        packets = [
            (row["mp4"][row["packet_offset"][i] :][: row["packet_size"][i]], row["packet_frame"][i])
            for i in range(first, last)
        ]
        pictures = GroupDecoder(row["codec"], row["extradata"]).decode(packets)
        np.testing.assert_array_equal(pictures[13], row["frames"][13])


def test_a_second_run_changes_no_byte_and_decodes_nothing(tmp_path, monkeypatch):
    numbered(tmp_path / "v" / "a.mp4", 30)
    (tmp_path / "v" / "empty.mp4").write_bytes(b"")
    shard(tmp_path / "v", tmp_path / "out")
    before = tree(tmp_path / "out")
    monkeypatch.setattr(stage, "scan_task", lambda task: pytest.fail("scanned again"))
    monkeypatch.setattr(stage, "build_shard", lambda task: pytest.fail("built again"))
    summary = shard(tmp_path / "v", tmp_path / "out")
    assert tree(tmp_path / "out") == before
    assert (summary.new_clips, summary.built_shards, summary.clips, summary.quarantined) == (0, 0, 2, 1)


def test_two_runs_on_equal_input_are_equal_wherever_it_lies(tmp_path):
    numbered(tmp_path / "v" / "a.mp4", 30)
    numbered(tmp_path / "v" / "b.mp4", 30, seed=1)
    shutil.copytree(tmp_path / "v", tmp_path / "elsewhere" / "copy")
    shard(tmp_path / "v", tmp_path / "out1")
    shard(tmp_path / "elsewhere" / "copy", tmp_path / "out2", shard_mb=384)
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2")


def test_adding_a_video_keeps_rows_and_bytes_of_the_others(tmp_path):
    numbered(tmp_path / "v" / "m.mp4", 40)
    shard(tmp_path / "v", tmp_path / "out")
    before, rows = tree(tmp_path / "out"), samples(tmp_path / "out")
    numbered(tmp_path / "v" / "a.mp4", 40, seed=5)
    summary = shard(tmp_path / "v", tmp_path / "out")
    after = tree(tmp_path / "out")
    kept = [name for name in before if name.endswith(".tar") or name.startswith(("_commits", "_scan"))]
    assert kept and all(after[name] == before[name] for name in kept)
    assert (summary.new_clips, summary.clips) == (2, 4)
    again = samples(tmp_path / "out")
    assert [(r["key"], r["mp4"], r["json"], r["shard"], r["mp4_offset"]) for r in again[:2]] == [
        (r["key"], r["mp4"], r["json"], r["shard"], r["mp4_offset"]) for r in rows
    ]
    assert {row["shard"] for row in again[2:]}.isdisjoint(row["shard"] for row in rows)


def test_a_changed_file_is_planned_anew_and_its_old_rows_stay(tmp_path):
    numbered(tmp_path / "v" / "a.mp4", 20)
    shard(tmp_path / "v", tmp_path / "out")
    old = samples(tmp_path / "out")
    numbered(tmp_path / "v" / "a.mp4", 22, seed=9)
    shard(tmp_path / "v", tmp_path / "out")
    rows = samples(tmp_path / "out")
    assert [row["num_frames"] for row in rows] == [20, 22]
    assert rows[0]["key"] == old[0]["key"] and rows[1]["source"] == "a.mp4"


def test_another_clip_config_is_another_artifact(tmp_path):
    numbered(tmp_path / "v" / "a.mp4", 20)
    shard(tmp_path / "v", tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(ValueError, match=r"another config .*[0-9a-f]{12}.*[0-9a-f]{12}.*clip\.crf"):
        shard(tmp_path / "v", tmp_path / "out", clip=ClipConfig(seconds=1.0, preset="ultrafast", crf=11))
    assert tree(tmp_path / "out") == before
    assert shard(tmp_path / "v", tmp_path / "out", shard_mb=100, min_shards=2).built_shards == 0


def test_bad_files_are_quarantined_with_the_reason_and_retried_when_fixed(tmp_path):
    folder = tmp_path / "v"
    good = numbered(folder / "good.mp4", 30)
    data = good.read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video")
    numbered(folder / "short.mp4", 1)
    write_sound(folder / "sound.mp4")
    summary = shard(folder, tmp_path / "out", allowed_quarantine=0.8)
    found = quarantine(tmp_path / "out")
    assert {name: error for name, (error, _) in found.items()} == {
        "cut.mp4": "Truncated",
        "empty.mp4": "Empty",
        "text.mp4": "Undecodable",
        "short.mp4": "TooShort",
        "sound.mp4": "NoVideoStream",
    }
    assert found["empty.mp4"][1] == "the file has 0 bytes" and "audio" in found["sound.mp4"][1]
    assert (summary.sources, summary.quarantined, summary.clips, summary.exit_status) == (6, 5, 2, 3)
    assert shard(folder, tmp_path / "out", allowed_quarantine=0.9).exit_status == 0
    numbered(folder / "cut.mp4", 24, seed=4)
    summary = shard(folder, tmp_path / "out", allowed_quarantine=0.9)
    assert "cut.mp4" not in quarantine(tmp_path / "out") and summary.quarantined == 4
    assert [row["source"] for row in samples(tmp_path / "out")] == ["good.mp4", "good.mp4", "cut.mp4"]


def test_only_bad_files_give_an_empty_artifact_and_status_three(tmp_path):
    lay_out(tmp_path / "v", {"a.mp4": b"", "b.mp4": b"no video"})
    summary = shard(tmp_path / "v", tmp_path / "out")
    assert (summary.clips, summary.quarantined, summary.exit_status) == (0, 2, 3)
    assert set(quarantine(tmp_path / "out")) == {"a.mp4", "b.mp4"}


def test_a_source_that_fails_while_clips_are_cut_costs_its_own_rows(tmp_path, monkeypatch):
    for index, name in enumerate(("a.mp4", "b.mp4", "c.mp4")):
        numbered(tmp_path / "v" / name, 40, seed=index)
    real = build.load_scan

    def tampered(artifact, source_id):
        scan = real(artifact, source_id)
        if source_id == "b.mp4":
            scan.checks = scan.checks + 1
        return scan

    monkeypatch.setattr(build, "load_scan", tampered)
    summary = shard(tmp_path / "v", tmp_path / "out", min_shards=1)
    assert (summary.clips, summary.quarantined, summary.shards) == (4, 1, 1)
    assert {row["source"] for row in samples(tmp_path / "out")} == {"a.mp4", "c.mp4"}
    error_class, message = quarantine(tmp_path / "out")["b.mp4"]
    assert error_class == "Corrupt" and "decode differently" in message


def test_an_unexpected_error_costs_the_source_and_not_the_run(tmp_path, monkeypatch):
    for index, name in enumerate(("a.mp4", "b.mp4")):
        numbered(tmp_path / "v" / name, 30, seed=index)
    real = build.encode_clip

    def failing(cursor, scan, *rest):
        if scan.source == "a.mp4":
            raise MemoryError("no memory for this one")
        return real(cursor, scan, *rest)

    monkeypatch.setattr(build, "encode_clip", failing)
    summary = shard(tmp_path / "v", tmp_path / "out", min_shards=1)
    assert {row["source"] for row in samples(tmp_path / "out")} == {"b.mp4"}
    assert quarantine(tmp_path / "out")["a.mp4"][0] == "TooMuchMemory" and summary.quarantined == 1


def fail_scan_of(name: str, failure: engine.Failure) -> Callable:
    """run_tasks that reports `failure` for one source's scan, as if its worker had died."""
    real = engine.run_tasks

    def run_tasks(fn, items, **options):
        for item in items:
            if getattr(getattr(item, "source", None), "id", "") == name:
                yield item, failure
            else:
                yield from real(fn, [item], **options)

    return run_tasks


def test_a_crashing_decoder_is_tried_again_by_later_runs_but_not_for_ever(tmp_path, monkeypatch):
    for name in ("a.mp4", "bomb.mp4"):
        numbered(tmp_path / "v" / name, 20)
    crash = engine.Failure("crash", "WorkerCrashed", "its process died", attempts=3)
    monkeypatch.setattr(engine, "run_tasks", fail_scan_of("bomb.mp4", crash))
    attempts = []
    for _ in range(3):
        summary = shard(tmp_path / "v", tmp_path / "out")
        rows = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
        attempts.append([(row["source"], row["error_class"], row["attempts"]) for row in rows])
    assert summary.quarantined == 1 and summary.clips == 1
    assert attempts[0] == [("bomb.mp4", "WorkerCrashed", 3)]
    assert attempts[-1] == [("bomb.mp4", "WorkerCrashed", stage.MAX_ATTEMPTS)]


def test_variable_rate_is_resampled_by_timestamps(tmp_path):
    steps = [1000, 2000, 1500] * 16
    pts = np.cumsum([0, *steps])
    frames = [paint(i) for i in range(len(pts))]
    write_video(tmp_path / "v" / "a.mp4", frames, pts=pts.tolist(), time_base=Fraction(1, 30000), fps=30)
    shard(tmp_path / "v", tmp_path / "out", clip=ClipConfig(seconds=30, fps=30, preset="ultrafast", crf=10))
    (row,) = samples(tmp_path / "out")
    assert (row["fps_num"], row["fps_den"]) == (30, 1)
    expected = [int(np.searchsorted(pts, 1000 * i, side="right")) - 1 for i in range(row["num_frames"])]
    assert row["numbers"] == expected
    assert row["json"]["pts"] == [int(pts[i]) for i in expected]
    assert row["num_frames"] == pytest.approx((pts[-1] + 1500) / 1000, abs=1)


def test_upright_odd_and_shrunk(tmp_path):
    tall = write_video(tmp_path / "v" / "a.mp4", [paint(i, height=96, width=130) for i in range(5)])
    set_display_matrix(tall, (0, 1, -1, 0))
    odd = [paint(i, height=97, width=131) for i in range(5)]
    write_video(tmp_path / "v" / "b.mkv", odd, codec="libx264rgb", pix_fmt="rgb24", options={"qp": "0"})
    shard(tmp_path / "v", tmp_path / "out", clip=ClipConfig(seconds=1, preset="ultrafast", crf=4))
    turned, padded = samples(tmp_path / "out")
    assert (turned["width"], turned["height"], turned["rotation"]) == (96, 130, 270)
    assert [number_of(np.rot90(frame)) for frame in turned["frames"]] == list(range(5))
    assert (padded["width"], padded["height"], padded["json"]["padding"]) == (132, 98, [1, 1])
    assert padded["numbers"] == list(range(5))
    shard(tmp_path / "v", tmp_path / "small", clip=ClipConfig(short_side=48, preset="ultrafast"))
    assert {(row["width"], row["height"]) for row in samples(tmp_path / "small")} == {(48, 64), (64, 48)}


@pytest.mark.parametrize("codec", ["h264_lossless", "hevc", "av1", "mjpeg", "mpeg4"])
def test_every_codec_goes_through(tmp_path, codec):
    numbered(tmp_path / "v" / "a.mp4", 26)
    shard(tmp_path / "v", tmp_path / "out", clip=ClipConfig(codec=codec, preset="ultrafast", crf=12))
    (row,) = samples(tmp_path / "out")
    assert row["numbers"] == list(range(26)) and row["codec"] == codec


def test_frame_folders_bring_their_masks(tmp_path):
    files = {f"JPEGImages/480p/car/{i:05d}.png": picture(i) for i in range(30)}
    files |= {f"Annotations/480p/car/{i:05d}.png": mask(1 + i % 2) for i in range(0, 30, 5)}
    lay_out(tmp_path / "d", files)
    shard(tmp_path / "d", tmp_path / "out", frames_fps=12)
    rows = samples(tmp_path / "out")
    assert [row["numbers"] for row in rows] == [list(range(0, 10)), list(range(10, 20)), list(range(20, 30))]
    artifact = Artifact.read(tmp_path / "out")
    for row in rows:
        data = read_range(artifact.shard_url(row["shard"]), row["masks_offset"], row["masks_size"])
        with np.load(io.BytesIO(data)) as masks:
            assert masks["masks"].shape == (10, 96, 128) and masks["masks"].dtype == np.uint8
            assert masks["annotated"].tolist() == [i % 5 == 0 for i in range(10)]
            assert [int(masks["masks"][i].max()) for i in (0, 1, 5)] == [1, 0, 2]
    assert (rows[0]["fps_num"], rows[0]["json"]["has_masks"]) == (12, True)


def test_a_missing_picture_quarantines_its_folder(tmp_path):
    files = {f"JPEGImages/car/{i}.png": picture(i) for i in range(6)}
    files["JPEGImages/car/3.png"] = b"broken"
    files |= {f"JPEGImages/bus/{i}.png": picture(i) for i in range(6)}
    shard(lay_out(tmp_path / "d", files), tmp_path / "out")
    assert quarantine(tmp_path / "out") == {"JPEGImages/car": ("Corrupt", "picture 3.png (frame 3) does not decode")}


def test_tars_and_manifests_carry_labels(tmp_path):
    video = numbered(tmp_path / "made" / "v.mp4", 10).read_bytes()
    other = numbered(tmp_path / "made" / "w.mp4", 12, seed=1).read_bytes()
    members = {"k.1.mp4": video, "k.1.json": b'{"caption": "one"}', "k.2.mp4": other, "k.2.cls": b"4"}
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t" / "s.tar", members)
    shard(tmp_path / "t", tmp_path / "out")
    rows = samples(tmp_path / "out")
    assert [(row["source"], row["json"]["labels"], len(row["numbers"])) for row in rows] == [
        ("s.tar/k.1.mp4", {"caption": "one"}, 10),
        ("s.tar/k.2.mp4", {"cls": 4}, 12),
    ]
    (tmp_path / "made" / "m.csv").write_text("path,caption\nv.mp4,eins\ngone.mp4,zwei\n")
    summary = shard(tmp_path / "made" / "m.csv", tmp_path / "out2")
    assert [json.loads(row["labels"]) for row in samples(tmp_path / "out2")] == [{"caption": "eins"}]
    assert quarantine(tmp_path / "out2") == {"gone.mp4": ("Missing", "listed, but there is no such file")}
    assert (summary.sources, summary.quarantined) == (2, 1)


def test_duplicates_are_marked_in_order(tmp_path):
    one = numbered(tmp_path / "v" / "a.mp4", 20, speed=5)
    shutil.copy(one, tmp_path / "v" / "b.mp4")
    numbered(tmp_path / "v" / "c.mkv", 20, speed=5, options={"crf": "30"})
    numbered(tmp_path / "v" / "d.mp4", 20, seed=8, speed=5)
    summary = shard(tmp_path / "v", tmp_path / "out")
    a, b, c, d = samples(tmp_path / "out")
    assert (b["duplicate_of"], b["near_duplicate_of"]) == (a["key"], None)
    assert (c["duplicate_of"], c["near_duplicate_of"]) == (None, a["key"])
    assert c["json"]["near_duplicate_of"] == a["key"]
    assert (a["duplicate_of"], d["duplicate_of"], d["near_duplicate_of"]) == (None, None, None)
    assert (summary.duplicates, summary.near_duplicates) == (1, 1)
    numbered(tmp_path / "v" / "e.mkv", 20, speed=5, options={"crf": "24"})
    shard(tmp_path / "v", tmp_path / "out")
    assert samples(tmp_path / "out")[-1]["near_duplicate_of"] == a["key"], "also when it is added later"


def test_clips_do_not_cross_cuts(tmp_path):
    frames = [texture(1 + i // 17, 96, 128) for i in range(51)]
    write_video(tmp_path / "v" / "a.mp4", frames)
    shard(tmp_path / "v", tmp_path / "out", clip=ClipConfig(seconds=9, preset="ultrafast", crf=4))
    rows = samples(tmp_path / "out")
    assert [(row["shot"], row["num_frames"]) for row in rows] == [(0, 17), (1, 17), (2, 17)]
    for row in rows:
        for frame in row["frames"]:
            assert np.abs(frame.astype(int) - texture(1 + row["shot"], 96, 128)).mean() < 6


def test_from_bucket_to_bucket(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/videos/s/a.mp4", numbered(tmp_path / "a.mp4", 30).read_bytes())
    shard("memory://videos", "memory://clips")
    shard(tmp_path / "a.mp4", tmp_path / "local")
    assert [row["numbers"] for row in samples("memory://clips")] == [list(range(15)), list(range(15, 30))]
    assert shard("memory://videos", "memory://clips").built_shards == 0
    assert samples("memory://clips")[0]["json"]["sha256"] == samples(tmp_path / "local")[0]["json"]["sha256"]


def test_a_source_that_went_away_after_planning_is_told(tmp_path, monkeypatch):
    for name in ("a.mp4", "b.mp4"):
        numbered(tmp_path / "v" / name, 20)
    with monkeypatch.context() as stopped:
        stopped.setattr(stage, "build_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shard(tmp_path / "v", tmp_path / "out")
    (tmp_path / "v" / "b.mp4").unlink()
    summary = shard(tmp_path / "v", tmp_path / "out")
    assert summary.clips == 1
    assert quarantine(tmp_path / "out")["b.mp4"][0] == "Missing"
    assert Artifact.read(tmp_path / "out").verify() == []


@pytest.mark.parametrize("number, said", [(errno.ENOSPC, "disk full while"), (errno.EROFS, "Read-only file system")])
def test_a_full_or_read_only_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch, number, said):
    """It ends the run: no video is quarantined for it."""
    numbered(tmp_path / "v" / "a.mp4", 30)

    def full(self, data):
        with disk_full_is_clear("the shard", len(data)):
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as disk:
        disk.setattr(tar._Sink, "write", full)
        with pytest.raises(StageError, match=f"{said}.*out=") as caught:
            shard(tmp_path / "v", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not [name for name in tree(tmp_path / "out") if name.endswith(".tar") or "tmp" in name]
    shard(tmp_path / "v", tmp_path / "out")
    shard(tmp_path / "v", tmp_path / "undisturbed")
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_no_output_folder(tmp_path):
    with pytest.raises(ValueError, match="out= is empty; give a folder"):
        shard(tmp_path, "")


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.mkv", "libx264", {"preset": "medium", "g": "15", "bf": "3", "x264-params": "open-gop=1"}),
        ("a.mp4", "libx265", {"preset": "medium", "x265-params": "keyint=15:open-gop=1:bframes=4:log-level=0"}),
        ("a.mp4", "libx264", {"preset": "medium", "x264-params": "intra-refresh=1:keyint=20"}),
        ("a.ts", "libx264", {"preset": "medium", "g": "15", "bf": "2"}),
        ("a.avi", "mpeg4", {"g": "15", "bf": "2", "qscale": "2"}),
        ("a.mpg", "mpeg2video", {"g": "12", "bf": "2", "b": "6000000"}),
        ("a.webm", "libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8", "b": "3000000"}),
        ("a.mkv", "ffv1", {}),
    ],
)
def test_shards_that_begin_inside_of_a_video_show_the_right_frames(tmp_path, name, codec, options):
    """Each shard seeks, or decodes from the start where the container or the stream does not seek exactly."""
    numbered(tmp_path / "v" / name, 100, codec=codec, options=options, fps=25)
    shard(tmp_path / "v", tmp_path / "out", min_shards=5)
    rows = samples(tmp_path / "out")
    assert len({row["shard"] for row in rows}) == 4
    assert [number for row in rows for number in row["numbers"]] == list(range(100))
