"""`kinema shard layout=sintel` and its like: pairs come back exactly, damaged ones are named, nothing is made twice."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from kinema.configs import FlowNetworkConfig, load_stage
from kinema.pipelines import shard
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.errors import StageError
from kinema.pipelines.flow_datasets import LAYOUTS, Selection, list_dataset
from kinema.pipelines.flow_datasets.tiny import Shifting, write_tiny
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.shard.known_flow.windows import windows_of
from kinema.pipelines.sidecars.flow_files import write_flow
from kinema.pipelines.train.recipes.flow import FlowRecipe

BOTH = Selection(directions=("forward", "backward"))


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")


def pack(name, folder, out, *settings):
    config = load_stage(
        "shard", None, [f"videos={folder}", f"layout={name}", f"out={out}/clips", "dataset.partial=true", *settings]
    )
    return shard.run(config, report=lambda line: None)


def stored(out):
    """Pair id -> (frames, FlowPair) of everything that was packed."""
    index = ClipIndex.open(f"{out}/clips", f"{out}/flow/truth", skip_duplicates=False)
    found = {}
    for number in range(len(index)):
        clip = index.clip(number)
        for t, gap, name in clip.meta["labels"]["pairs"]:
            assert name not in found
            found[name] = clip.frames([t, t + gap]), clip.flow_pair(t, gap)
        assert sorted((t, gap) for t, gap, _ in clip.meta["labels"]["pairs"]) == clip.flow_pairs
    return found


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).glob("*.tar"))}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_pair_comes_back_from_the_shards(name, tmp_path):
    write_tiny(name, tmp_path / "data")
    dataset = list_dataset(name, tmp_path / "data", BOTH)
    summary = pack(name, tmp_path / "data", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert set(found) == {pair.id for pair in dataset.pairs} and summary.pairs == summary.sources == len(dataset)
    for sample in dataset:
        (first, second), pair = found[sample.id]
        assert np.array_equal(first, sample.image1) and np.array_equal(second, sample.image2)
        assert np.array_equal(np.isnan(pair.flow_px), np.isnan(sample.flow_px))
        assert np.array_equal(pair.flow_px, sample.flow_px, equal_nan=True)  # the tiny motions are whole pixels
        if sample.occlusion is None:
            assert pair.occlusion is None
        else:
            assert np.array_equal(pair.occlusion, sample.occlusion)
    for kind in ("clips", "flow/truth"):
        assert Artifact.read(tmp_path / "out" / kind).verify() == []


def test_flow_between_the_steps_is_off_by_half_a_step_at_most(tmp_path):
    write_tiny("sintel", tmp_path / "data")
    rng = np.random.default_rng(0)
    flow = rng.uniform(-300, 300, (2, 48, 64)).astype(np.float32)
    write_flow(tmp_path / "data/training/flow/alley_1/frame_0001.flo", flow)
    far = np.where(np.arange(64) < 32, flow, np.float32(600.3))
    far[:, 0, 0] = 3000
    write_flow(tmp_path / "data/training/flow/alley_1/frame_0002.flo", far)
    summary = pack("sintel", tmp_path / "data", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert np.abs(found["clean/alley_1/frame_0001"][1].flow_px - flow).max() <= 1 / 128
    wide = found["clean/alley_1/frame_0002"][1]
    assert not wide.valid[0, 0] and wide.valid.sum() == 48 * 64 - 1
    assert np.nanmax(np.abs(wide.flow_px - far)) <= 1 / 32
    assert summary.unstorable_pixels == 2  # once in each pass


def test_a_second_run_makes_nothing_and_a_fresh_one_the_same_bytes(tmp_path):
    write_tiny("kitti2015", tmp_path / "data")
    pack("kitti2015", tmp_path / "data", tmp_path / "a")
    before = digests(tmp_path / "a/clips") | digests(tmp_path / "a/flow/truth")
    again = pack("kitti2015", tmp_path / "data", tmp_path / "a")
    assert (again.new_clips, again.built_shards) == (0, 0)
    pack("kitti2015", tmp_path / "data", tmp_path / "b")
    assert digests(tmp_path / "b/clips") | digests(tmp_path / "b/flow/truth") == before


def test_a_damaged_pair_is_quarantined_with_its_reason_and_retried_when_it_is_mended(tmp_path):
    data = tmp_path / "data"
    write_tiny("sintel", data)
    flow = data / "training/flow/cave_2/frame_0001.flo"
    whole = flow.read_bytes()
    flow.write_bytes(whole[:-8])
    image = data / "training/final/alley_1/frame_0003.png"
    image.write_bytes(image.read_bytes()[:-30])
    summary = pack("sintel", data, tmp_path / "out")
    assert (summary.sources, summary.pairs, summary.quarantined, summary.exit_status) == (8, 5, 3, 0)
    rows = {row["source"]: row for row in Artifact.read(tmp_path / "out/clips").quarantined().to_pylist()}
    assert {name: row["error_class"] for name, row in rows.items()} == {
        "clean/cave_2/frame_0001": "BadFlow",
        "final/cave_2/frame_0001": "BadFlow",
        "final/alley_1/frame_0002": "BadImage",
    }
    assert "bytes, this one" in rows["clean/cave_2/frame_0001"]["message"]
    before = digests(tmp_path / "out/clips")
    flow.write_bytes(whole)
    summary = pack("sintel", data, tmp_path / "out")
    assert (summary.quarantined, summary.new_clips) == (1, 2)
    index = ClipIndex.open(tmp_path / "out/clips", tmp_path / "out/flow/truth", skip_duplicates=False)
    names = [name for n in range(len(index)) for _, _, name in index.clip(n).meta["labels"]["pairs"]]
    assert {"clean/cave_2/frame_0001", "final/cave_2/frame_0001"} <= set(names)
    assert before.items() <= digests(tmp_path / "out/clips").items()


def test_a_data_set_of_damaged_pairs_only_is_one_error(tmp_path):
    write_tiny("middlebury", tmp_path)
    for path in (tmp_path / "other-gt-flow").rglob("*.flo"):
        path.write_bytes(b"PIEX" + path.read_bytes()[4:])
    with pytest.raises(StageError, match="no pair of .* can be used: .*must start with PIEH"):
        pack("middlebury", tmp_path, tmp_path / "out")


def test_more_scenes_go_into_new_shards(tmp_path):
    data = tmp_path / "data"
    write_tiny("kitti2015", data)
    for path in data.rglob("000001_1*.png"):
        path.rename(path.with_suffix(".kept"))
    assert pack("kitti2015", data, tmp_path / "out").pairs == 1
    before = digests(tmp_path / "out/clips")
    for path in data.rglob("*.kept"):
        path.rename(path.with_suffix(".png"))
    summary = pack("kitti2015", data, tmp_path / "out")
    assert (summary.pairs, summary.new_clips, summary.built_shards) == (2, 1, 1)
    assert before.items() < digests(tmp_path / "out/clips").items()


@pytest.mark.parametrize("clip_frames", [2, 4, 12])
def test_windows_hold_every_pair_once_and_neighbours_share_a_frame(clip_frames, tmp_path):
    dataset = list_dataset("flyingthings3d", write_tiny("flyingthings3d", tmp_path), BOTH)
    windows = windows_of(dataset.pairs, clip_frames)
    ids = [pair.id for window in windows for _, _, pair in window.pairs]
    assert sorted(ids) == sorted(pair.id for pair in dataset.pairs)
    mine = [w for w in windows if w.scene == "clean/A/0000/left"]
    numbers = [[number for number, _ in window.frames] for window in mine]
    assert (
        numbers
        == {
            2: [[n, n + 1] for n in range(6, 15)],
            4: [[6, 7, 8, 9], [9, 10, 11, 12], [12, 13, 14, 15]],
            12: [list(range(6, 16))],
        }[clip_frames]
    )
    for window in windows:
        for t, gap, pair in window.pairs:
            assert window.frames[t][1] == pair.image1 and window.frames[t + gap][1] == pair.image2


def test_a_damaged_image_splits_its_window(tmp_path):
    data = write_tiny("flyingthings3d", tmp_path / "data")
    (data / "frames_cleanpass/TRAIN/A/0000/left/0010.png").write_bytes(b"nothing")
    summary = pack("flyingthings3d", data, tmp_path / "out", "dataset.passes=[clean]")
    assert (summary.pairs, summary.quarantined, summary.clips) == (14, 4, 2)
    assert set(stored(tmp_path / "out")) == {
        f"clean/A/0000/left/{n:04d}{way}"
        for n in range(6, 16)
        for way, gap in (("", 1), ("_backward", -1))
        if 10 not in (n, n + gap) and 6 <= n + gap <= 15
    }


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("dataset.partial=false",), r"2 of 200 pairs are whole.*with dataset.partial=true"),
        (("clip.codec=hevc",), "packed without loss; use h264_lossless"),
        (("clip.short_side=32",), "keep their size"),
        (("dataset.clip_frames=1",), "use 2 or more frames"),
        (("dataset.split=validation",), "kitti2015 has no validation split"),
        (("dataset.trusted_only=true",), "is for layout=sintel"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(settings, reason, tmp_path):
    write_tiny("kitti2015", tmp_path / "data")
    with pytest.raises(ValueError, match=reason):
        pack("kitti2015", tmp_path / "data", tmp_path / "out", *settings)
    assert not (tmp_path / "out").exists()


def test_training_reads_measured_flow_with_its_gaps(tmp_path):
    pack("kitti2015", write_tiny("kitti2015", tmp_path / "data", 128, 136), tmp_path / "out")
    index = ClipIndex.open(tmp_path / "out/clips", tmp_path / "out/flow/truth")
    recipe = FlowRecipe("raft_small", FlowNetworkConfig(crop=(128, 136), flip=0.0, visible_only=False))
    sample = recipe.read_sample(index.clip(0), np.random.default_rng(0))
    known = ~(np.mgrid[:128, :136] < np.array([16, 17])[:, None, None]).all(0)
    assert np.array_equal(sample["valid"].numpy() > 0, known)
    assert np.array_equal(sample["flow_px"].numpy()[:, known], Shifting(128, 136).flow_px()[:, known])


def test_sintels_untrusted_pixels_are_learned_from_unless_they_are_refused(tmp_path):
    write_tiny("sintel", tmp_path / "data")
    dataset = list_dataset("sintel", tmp_path / "data")
    invalid = dataset[0].masks["invalid"]
    assert 0 < invalid.mean() < 1
    for settings, untrusted in (((), 1.0), (("dataset.trusted_only=true",), 0.0)):
        out = tmp_path / f"out{untrusted}"
        pack("sintel", tmp_path / "data", out, *settings)
        known = np.isfinite(stored(out)[dataset.pairs[0].id][1].flow_px).all(axis=0)
        assert known[invalid].mean() == untrusted and known[~invalid].all()
