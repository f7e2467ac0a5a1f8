"""Benches: sides are timed in turns, and each bench compares things that are equal."""

import time
from pathlib import Path

import pytest

from kinema.configs import ClipConfig
from kinema.models.backbones.inference_linear import can_keep_fp16
from kinema.pipelines.bench import clip_size, flow_codec, fpt_loader, fpt_sampling
from kinema.pipelines.bench.paired import Paired, paired, print_rows
from kinema.pipelines.precision import cpu_multiplies_bf16


def test_ratios_are_those_of_one_round():
    seen = []
    found = paired({"ours": lambda: seen.append("ours"), "slow": lambda: (seen.append("slow"), time.sleep(0.02))}, 3)
    assert seen == ["ours", "slow"] * 4  # the first round warms up
    assert len(found.wall_s["slow"]) == 3
    assert found.seconds("slow") >= 0.02 > found.processor_seconds("slow")
    made = Paired({"a": [1.0, 2.0, 9.0], "b": [2.0, 8.0, 9.0]}, {"a": [1.0, 1.0, 1.0], "b": [3.0, 3.0, 5.0]})
    assert made.faster("a", "b") == 2.0  # of 2, 4 and 1
    assert made.faster_in_processor_time("a", "b") == 3.0
    both = made.sum("both", {"a": 2, "b": 1})
    assert made.wall_s[both] == [4.0, 12.0, 27.0]
    row = made.rate_row("rate", "a", "b", "pieces/s", items=4)
    assert (row["value"], row["baseline"], row["ratio"]) == (2.0, 0.5, 2.0)


def test_the_table_shows_processor_time_where_it_was_taken(capsys):
    rows = [{"name": "x", "value": 1.0, "baseline": 2.0, "ratio": 2.0, "processor_ratio": 3.5, "unit": "s"},
            {"name": "size", "value": 1.0, "baseline": 4.0, "ratio": 0.25, "unit": "KB"}]  # fmt: skip
    print_rows(rows)
    title, first, second = capsys.readouterr().out.splitlines()
    assert title.split() == ["ours", "baseline", "ratio", "processor"]
    assert first.split() == ["x", "1", "2", "2", "3.5", "s"]
    assert second.split() == ["size", "1", "4", "0.25", "KB"]


def test_flow_is_stored_in_four_ways():
    rows = {row["name"]: row for row in flow_codec.run(height=96, width=128, num_pairs=2, rounds=1)}
    assert len(rows) == 9
    raw = rows["flow codec size against fp16 as it is, 128x96"]
    assert raw["baseline"] == pytest.approx(2 * 2 * 96 * 128 / 1024)
    assert all(0 < row["ratio"] < 1 for name, row in rows.items() if "size" in name)


def test_samples_of_one_image_are_those_of_the_published_way():
    small = {"width": 64, "depth": 2, "head_dim": 32, "image_encoder": "tiny_vit8", "image_size": 64}
    rows = fpt_sampling.run(small, batches=(1, 3), rounds=1)
    differences = [row for row in rows if "difference" in row["name"]]
    assert len(differences) == 3 and all(row["value"] < 1e-4 for row in differences)
    times = [row for row in rows if row["unit"] == "s"]
    assert sum("new image" in row["name"] for row in times) == 3
    assert all(row["ratio"] > 0 and row["processor_ratio"] > 0 for row in times)
    for side, is_possible, allowed in (
        ("bf16", cpu_multiplies_bf16(), 0.1),
        ("fp16 weights", can_keep_fp16(), 0.01),
    ):
        narrow = [row for row in rows if side in row["name"]]
        assert len(narrow) == (4 if is_possible else 0)
        assert all(0 < row["ratio"] < allowed for row in narrow if "rms error" in row["name"])


def test_loader_rows_say_what_is_handed_over(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fpt_loader, "NUM_BATCHES", 2)
    monkeypatch.setattr(fpt_loader, "SAMPLES_PER_CLIP", (1, 2))
    rows = {row["name"]: row for row in fpt_loader.run(side_px=128, cases=((24, 0.25, 2),), rounds=1)}
    for pictures in ("8-bit", "float"):
        kilobytes = {"8-bit": 49, "float": 197}[pictures]
        for together in (1, 2):
            name = f"24 frames of 128 x 128, {pictures} pictures of {kilobytes} KB, {together} a clip"
            assert rows[name]["ratio"] > 0
    psnr = rows["24 frames of 128 x 128: PSNR"]
    assert psnr["value"] == pytest.approx(psnr["baseline"], abs=fpt_loader.ALLOWED_DB)
    assert rows["24 frames of 128 x 128: video"]["value"] > 0


def test_clips_of_the_default_groups_are_smaller_than_those_of_short_ones():
    settings = {"short": ClipConfig(gop=2, preset="veryfast"), "default": ClipConfig()}
    rows = {row["name"]: row for row in clip_size.run(side_px=128, cases=((12, 1),), settings=settings, rounds=1)}
    assert len(rows) == 6
    short, default = (rows[f"12 frames, {name}: video"] for name in settings)
    assert short["baseline"] == default["baseline"]
    assert default["value"] < 0.8 * short["value"]
    assert default["ratio"] == pytest.approx(default["value"] / default["baseline"])
    for what in ("encoding", "a random frame"):
        assert rows[f"12 frames, default: {what}"]["processor_ratio"] > 0


@pytest.mark.slow
def test_clips_of_the_default_settings_are_no_larger_than_mpeg1_at_equal_psnr():
    """The setting that docs/PRESETS.md offers to those who want small clips, on films of `bench fpt_loader`."""
    rows = clip_size.run(cases=((24, 2),), settings={"default": ClipConfig()}, rounds=1)
    video = next(row for row in rows if row["name"].endswith("video"))
    assert video["ratio"] <= 1.0
