"""Recordings as they are: files with a past that are healthy all the same. The README beside them has the answers."""

import io
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from kinema.configs import ClipConfig, ShardConfig
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.shard import ShardSummary, run

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import decode


@dataclass
class Result:
    """What came of a folder."""

    summary: ShardSummary
    rows: list[dict]
    """With `json` and, on demand, frames."""
    quarantine: dict[str, tuple[str, str]]

    def of(self, source: str) -> list[dict]:
        return [row for row in self.rows if row["source"] == source]

    def lengths(self, source: str) -> list[int]:
        return [row["num_frames"] for row in self.of(source)]

    def rates(self, source: str) -> set[tuple[int, int]]:
        return {(row["fps_num"], row["fps_den"]) for row in self.of(source)}


def result(out: Path, summary: ShardSummary) -> Result:
    artifact = Artifact.read(str(out))
    assert artifact.verify() == []
    rows = artifact.samples().to_pylist()
    for row in rows:
        url = artifact.shard_url(row["shard"])
        row["mp4"] = read_range(url, row["mp4_offset"], row["mp4_size"])
        text = read_range(url, row["json_offset"], row["json_size"]).decode()
        row["json"] = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        row["url"] = url
    entries = pq.read_table(out / "quarantine.parquet").to_pylist()
    return Result(summary, rows, {e["source"]: (e["error_class"], e["message"]) for e in entries})


@pytest.fixture
def shard(shared_data, tmp_path, monkeypatch) -> Callable[..., Result]:
    """`shard("elst_trim")`: what `kinema shard` makes of that folder, without cuts."""
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    runs = itertools.count()

    def make(name: str, **settings) -> Result:
        out = tmp_path / f"out{next(runs)}"
        clip = ClipConfig(cuts="none", preset="ultrafast", **settings.pop("clip", {}))
        videos = str(shared_data / "irregular" / name)
        config = ShardConfig(videos=videos, out=str(out), clip=clip, min_shards=1, **settings)
        return result(out, run(config, report=lambda _: None))

    return make


def shown_by_ffmpeg(path: Path, stream: int = 0) -> list[tuple[int, int, int]]:
    """(pts, width, height) of every frame that FFmpeg's own decoding gives, in its order."""
    with av.open(str(path)) as container:
        return [(frame.pts, frame.width, frame.height) for frame in container.decode(video=stream)]


def all_pts(rows: list[dict]) -> list[int]:
    return [tick for row in rows for tick in row["json"]["pts"]]


def test_an_edit_list_hides_frames_and_that_is_no_damage(shard, shared_data):
    found = shard("elst_trim")
    (row,) = found.rows
    assert found.quarantine == {} and found.lengths("trim_both.mp4") == [50]
    assert (row["fps_num"], row["fps_den"], row["start_s"], row["end_s"]) == (25, 1, 0.0, 2.0)
    shown = shown_by_ffmpeg(shared_data / "irregular" / "elst_trim" / "trim_both.mp4")
    assert row["json"]["pts"] == [pts for pts, _, _ in shown]


def test_holes_do_not_change_the_rate(shard):
    found = shard("hole_average_rate")
    assert found.quarantine == {}
    assert (found.rates("dropped.avi"), found.lengths("dropped.avi")) == ({(25, 1)}, [40, 47])
    assert (found.rates("screenrec.mp4"), found.lengths("screenrec.mp4")) == ({(30, 1)}, [60, 30, 30])
    assert found.summary.dropped_short == 1, "a lone frame between two holes"
    assert found.of("dropped.avi")[1]["start_s"] == pytest.approx(53 / 25)


def test_a_few_missing_slots_repeat_a_frame_and_the_sample_says_which(shard, shared_data):
    found = shard("vfr_few_missing")
    assert found.quarantine == {} and found.summary.dropped_short == 0
    assert (found.rates("cut_copy.mp4"), found.rates("twelve_dropped.mp4")) == ({(25, 1)}, {(30, 1)})
    for name, num_frames, num_slots in (("cut_copy.mp4", 52, 54), ("twelve_dropped.mp4", 288, 300)):
        rows = found.of(name)
        shown = [pts for pts, _, _ in shown_by_ffmpeg(shared_data / "irregular" / "vfr_few_missing" / name)]
        assert len(shown) == num_frames and sum(row["num_frames"] for row in rows) == num_slots
        kept = [
            tick
            for row in rows
            for i, tick in enumerate(row["json"]["pts"])
            if i not in row["json"].get("irregular", {}).get("repeated_frames", [])
        ]
        assert kept == shown


def test_a_change_of_size_is_a_shot_boundary(shard, shared_data):
    found = shard("resolution_change")
    assert found.quarantine == {} and found.summary.dropped_short == 0
    for name, sizes in (("rtc_shrink.webm", [(320, 240), (160, 120)]), ("rtc_turn.webm", [(320, 240), (240, 320)])):
        rows = found.of(name)
        assert [(row["width"], row["height"]) for row in rows] == sizes
        assert [row["num_frames"] for row in rows] == [50, 50]
        with av.open(str(shared_data / "irregular" / "resolution_change" / name)) as container:
            originals = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for row, first in zip(rows, (0, 50), strict=True):
            frames = decode(row["mp4"])
            for i in (0, 25, 49):
                assert frames[i].shape == originals[first + i].shape
                assert np.abs(frames[i].astype(int) - originals[first + i]).mean() < 5


def test_a_clock_that_starts_anew_is_a_shot_boundary(shard, shared_data):
    found = shard("ts_restart")
    assert found.quarantine == {} and found.lengths("concat.ts") == [100, 100]
    first, second = found.of("concat.ts")
    assert (first["start_s"], first["end_s"], second["start_s"], second["end_s"]) == (0, 4, 4, 8)
    assert second["duplicate_of"] is None and {row["shot"] for row in found.rows} == {0, 1}
    shown = shown_by_ffmpeg(shared_data / "irregular" / "ts_restart" / "concat.ts")
    assert all_pts(found.rows) == [pts for pts, _, _ in shown], "the file's own timestamps"
    assert second["json"]["irregular"]["clock_offset"] == 4 * 90000


def test_time_lapses(shard):
    found = shard("slow_rate")
    lengths = found.lengths("slow_05fps.mp4")
    assert sum(lengths) == 21 and min(lengths) >= 2
    assert found.of("slow_05fps.mp4")[0]["start_s"] == 0
    ((error_class, message),) = found.quarantine.values()
    assert error_class == "TooShort" and "clip.seconds=4" in message and "clip.seconds=10 or more" in message
    longer = shard("slow_rate", clip={"seconds": 10.0})
    assert longer.quarantine == {}
    assert (sum(longer.lengths("slow_02fps.mp4")), sum(longer.lengths("slow_05fps.mp4"))) == (20, 21)


def test_colour_matrices_that_nobody_implements_take_the_documented_one(shard):
    found = shard("matrix_tag")
    assert found.quarantine == {}
    expected = {"mat8.mp4": (8, 6), "mat10.mp4": (10, 9), "mat14.mp4": (14, 6)}
    for name, (tag, read_as) in expected.items():
        (row,) = found.of(name)
        assert (row["num_frames"], row["json"]["color"]["matrix"]) == (50, read_as)
        assert row["json"]["irregular"]["matrix"] == {"tag": tag, "read_as": read_as}


def test_a_cover_picture_is_not_the_video(shard):
    found = shard("cover_plain")
    assert found.lengths("cover_plain.mp4") == [100]
    assert found.rows[0]["json"]["source_facts"]["stream"] == 1
    (reason,) = shard("cover_plain", stream=7).quarantine.values()
    assert reason[0] == "NoVideoStream" and "its video streams: 0, 1" in reason[1]


def test_a_cut_fragmented_file_is_told_truly(shard):
    error_class, message = shard("frag_message").quarantine["frag_cut.mp4"]
    assert error_class == "Truncated" and "68 good frames" in message and "declared" not in message


def test_rgb_masks_of_a_known_palette(shard, shared_data):
    found = shard("rgb_masks", layout="frames")
    (row,) = found.rows
    masks = np.load(io.BytesIO(read_range(row["url"], row["masks_offset"], row["masks_size"])))["masks"]
    assert np.unique(masks).tolist() == [0, 1, 2]
    assert [int((masks[0] == label).sum()) for label in (0, 1, 2)] == [4544, 600, 1000]


def test_the_last_of_two_members_with_one_name_counts(shard):
    found = shard("tar_duplicate")
    assert found.quarantine == {} and len(found.rows) == 3
    assert [json.loads(row["labels"])["caption"] for row in found.rows] == ["c0", "c1", "c2"]


def test_a_cut_tar_costs_what_is_missing(shard):
    found = shard("tar_cut")
    assert [row["source"] for row in found.rows] == ["cut.tar/000000000.mp4", "cut.tar/000000001.mp4"]
    assert {name: reason[0] for name, reason in found.quarantine.items()} == {"cut.tar": "Truncated"}


def test_every_json_of_a_sample_is_a_label(shard):
    (row,) = shard("tar_labels").rows
    assert row["json"]["labels"] == {"caption": "c0", "key": "000000000", "n": 0}


def test_json_stays_json(shard):
    found = shard("json_infinity")
    assert [row["json"]["labels"].get("txt") for row in found.rows] == ["text 0", "text 1", "text 2"]
    assert found.rows[1]["json"]["labels"] == {"a": None, "b": None, "txt": "text 1"}
    assert json.loads(found.rows[1]["labels"])["b"] is None


@pytest.mark.parametrize("name, labels", [("mm.txt", [0, 1, 2]), ("semi.csv", ["0", "1"]), ("vjepa.csv", [0, 1])])
def test_lists_with_labels(shard, name, labels):
    found = shard(f"list_with_labels/{name}")
    assert found.quarantine == {}
    files = ["v/a.mp4", "v/b.mp4", "v/c d (31).mp4"][: len(labels)]
    assert [(row["source"], row["json"]["labels"]) for row in found.rows] == [
        (file, {"label": label}) for file, label in zip(files, labels, strict=True)
    ]
