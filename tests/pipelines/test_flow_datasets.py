"""Readers of flow data sets: published layouts, known motion, what is missing, what is damaged."""

import shutil

import cv2
import h5py
import numpy as np
import pytest

from kinema.pipelines.flow_datasets import (
    LAYOUTS,
    BadFlow,
    BadImage,
    Selection,
    SizesDiffer,
    list_dataset,
    open_dataset,
)
from kinema.pipelines.flow_datasets.tiny import STEP_XY, write_tiny
from kinema.pipelines.sidecars.flow_files import read_flow, write_flow

BOTH = Selection(directions=("forward", "backward"), cameras=("left", "right"))
# Pairs of each tiny sample, and whether the data set says what is occluded.
COUNTS = {
    "flyingchairs": (2, False),
    "flyingthings3d": (72, False),
    "sintel": (8, True),
    "kitti2012": (2, True),
    "kitti2015": (2, True),
    "hd1k": (2, False),
    "spring": (8, True),
    "tartanair": (2, True),
    "viper": (2, False),
    "middlebury": (2, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_back_the_motion_that_was_written(name, tmp_path):
    dataset = list_dataset(name, write_tiny(name, tmp_path), BOTH)
    count, tells_occlusion = COUNTS[name]
    assert len(dataset) == count and len({pair.id for pair in dataset.pairs}) == count
    for pair, sample in zip(dataset.pairs, dataset, strict=True):
        step = np.array(STEP_XY) * pair.gap
        assert sample.valid.any() and np.array_equal(sample.valid, np.isfinite(sample.flow_px).all(0))
        assert np.array_equal(sample.flow_px[:, sample.valid], np.broadcast_to(step[:, None], (2, sample.valid.sum())))
        y, x = np.mgrid[: sample.image1.shape[0], : sample.image1.shape[1]]
        inside = (x + step[0] >= 0) & (y + step[1] >= 0) & (x + step[0] < x.shape[1]) & (y + step[1] < x.shape[0])
        moved = sample.image2[(y + step[1])[inside], (x + step[0])[inside]]
        assert np.array_equal(moved, sample.image1[inside])
        assert (sample.occlusion is not None) == tells_occlusion
        if tells_occlusion:
            assert np.array_equal(sample.occlusion[sample.valid], ~inside[sample.valid])


def test_spring_gives_the_four_flows_of_a_pixel_and_the_first_as_its_flow(tmp_path):
    sample = list_dataset("spring", write_tiny("spring", tmp_path), Selection())[0]
    assert sample.candidates_px.shape == (4, 2, 48, 64)
    assert sample.candidates_px[:, 0, 5, 7].tolist() == [3.0, 3.0, 3.25, 3.25]
    assert np.array_equal(sample.flow_px, sample.candidates_px[0])
    stored = read_flow(tmp_path / "train/0001/flow_FW_left/flow_FW_left_0001.flo5")
    assert np.array_equal(sample.flow_px, stored[:, ::2, ::2])
    assert sorted(sample.masks) == ["detail", "nonrigid", "sky"]
    assert all(mask.shape == (48, 64) and mask.sum() == 6 * 8 for mask in sample.masks.values())


def test_the_chairs_are_split_by_their_list(tmp_path):
    write_tiny("flyingchairs", tmp_path)
    names = {split: [p.id for p in list_dataset("flyingchairs", tmp_path, Selection(split)).pairs]
             for split in ("training", "validation")}  # fmt: skip
    assert names == {"training": ["00001", "00003"], "validation": ["00002"]}
    (tmp_path / "FlyingChairs_train_val.txt").unlink()
    with pytest.raises(ValueError, match="0 of 22232 pairs are whole; 1 files are missing: FlyingChairs_train_val.txt"):
        open_dataset("flyingchairs", tmp_path, partial=True)


def test_a_test_split_has_images_and_no_flow(tmp_path):
    dataset = list_dataset("sintel", write_tiny("sintel", tmp_path), Selection("test", passes=("final",)))
    assert [pair.id for pair in dataset.pairs][:2] == ["final/alley_1/frame_0001", "final/alley_1/frame_0002"]
    assert dataset[0].flow_px is None and dataset[0].valid is None and dataset[0].image1.shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("name", "lost", "expected"),
    [
        ("flyingchairs", "data/00003_img2.ppm", 22232),
        ("flyingthings3d", "frames_finalpass/TRAIN/A/0000/left/0009.png", 40302),
        ("sintel", "training/clean/cave_2/frame_0002.png", 2082),
        ("kitti2012", "training/colored_0/000001_11.png", 194),
        ("kitti2015", "training/image_2/000000_10.png", 200),
        ("hd1k", "hd1k_input/image_2/000000_0002.png", 1047),
        ("spring", "train/0001/frame_left/frame_left_0003.png", 4963),
        ("tartanair", "office/Easy/P000/flow/000001_000002_mask.npy", None),
        ("viper", "train/img/001/001_00021.png", None),
        ("middlebury", "other-data/Venus/frame11.png", 8),
    ],
)
def test_a_half_copied_data_set_is_one_message(name, lost, expected, tmp_path):
    write_tiny(name, tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(ValueError) as refused:
        open_dataset(name, tmp_path)
    message = str(refused.value)
    assert "\n" not in message and f"missing: {lost}" in message and "partial=True" in message
    assert expected is None or f" of {expected} pairs are whole" in message
    kept = open_dataset(name, tmp_path, partial=True)
    assert all(path.is_file() for pair in kept.pairs for path in pair.files) and len(kept)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_data_set_that_is_not_there_is_one_message(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} at .*absent: 0.* pairs are whole.*copy it whole") as refused:
        open_dataset(name, tmp_path / "absent", partial=True)
    assert "\n" not in str(refused.value)


def test_published_counts_add_up():
    expected = {name: list_dataset(name, "/nowhere").expected for name in LAYOUTS}
    # Two passes; FlyingThings3D 2239 sequences of nine pairs, Spring 5000 frames of 37 scenes.
    assert expected["sintel"] == 2 * 1041 and expected["flyingthings3d"] == 2 * 2239 * 9
    assert expected["spring"] == 5000 - 37
    assert list_dataset("spring", "/nowhere", Selection("test", cameras=("left", "right"))).expected == 2 * 990


def _poison(path, change):
    flow = np.moveaxis(read_flow(path), 0, -1).copy()
    change(flow)
    header = b"PIEH" + np.array(flow.shape[1::-1], "<i4").tobytes()
    path.write_bytes(header + flow.astype("<f4").tobytes())


def _one_nan(flow):
    flow[3, 4, 0] = np.nan


@pytest.mark.parametrize(
    ("name", "file", "damage", "kind", "reason"),
    [
        ("sintel", "training/flow/alley_1/frame_0001.flo", lambda p: _poison(p, _one_nan), BadFlow, "flow of 1 pixels"),
        ("sintel", "training/flow/alley_1/frame_0001.flo", lambda p: p.write_bytes(b"PIEX" + p.read_bytes()[4:]),
         BadFlow, "must start with PIEH"),
        ("sintel", "training/clean/alley_1/frame_0001.png", lambda p: p.write_bytes(p.read_bytes()[:-40]), BadImage,
         "cut short"),
        ("sintel", "training/clean/alley_1/frame_0001.png", lambda p: p.write_bytes(b""), BadImage, "not a picture"),
        ("spring", "train/0001/flow_FW_left/flow_FW_left_0001.flo5", lambda p: p.write_bytes(p.read_bytes()[:-900]),
         BadFlow, "cut short"),
        ("spring", "train/0001/flow_FW_left/flow_FW_left_0001.flo5", lambda p: p.write_bytes(b"not HDF5 at all"),
         BadFlow, "not a .flo5"),
        ("flyingthings3d", "optical_flow/TRAIN/A/0000/into_future/left/OpticalFlowIntoFuture_0006_L.pfm",
         lambda p: p.write_bytes(p.read_bytes()[:-8]), BadFlow, "bytes of pixels"),
        ("kitti2015", "training/flow_occ/000000_10.png", lambda p: write_flow(p, np.zeros((2, 40, 64), np.float32)),
         SizesDiffer, "the images are 48x64"),
        ("kitti2015", "training/image_2/000000_11.png", lambda p: cv2.imwrite(str(p), np.zeros((40, 64, 3), np.uint8)),
         SizesDiffer, "images are 48x64 and 40x64"),
        ("viper", "train/flow/001/001_00010.npz", lambda p: p.write_bytes(p.read_bytes()[:300]), BadFlow, "cut short"),
        ("tartanair", "office/Easy/P000/flow/000000_000001_flow.npy", lambda p: p.write_bytes(p.read_bytes()[:300]),
         BadFlow, "cut short"),
        ("middlebury", "other-gt-flow/RubberWhale/flow10.flo",
         lambda p: write_flow(p, np.full((2, 48, 64), np.nan, np.float32)), BadFlow, "no pixel has a flow"),
    ],
)  # fmt: skip
def test_a_damaged_pair_says_what_is_wrong(name, file, damage, kind, reason, tmp_path):
    write_tiny(name, tmp_path)
    damage(tmp_path / file)
    dataset = list_dataset(name, tmp_path)
    with pytest.raises(kind, match=reason) as refused:
        dataset[0]
    assert "\n" not in str(refused.value)
    dataset[len(dataset) - 1]  # the others are not concerned


def test_flo5_is_exact_both_ways(tmp_path):
    rng = np.random.default_rng(0)
    flow = rng.standard_normal((2, 12, 20)).astype(np.float32) * 100
    flow[:, 2, 3] = np.nan
    write_flow(tmp_path / "a.flo5", flow)
    assert np.array_equal(read_flow(tmp_path / "a.flo5"), flow, equal_nan=True)
    with h5py.File(tmp_path / "a.flo5") as file:  # the published files: one array, [H, W, 2], gzip
        assert list(file) == ["flow"] and file["flow"].shape == (12, 20, 2) and file["flow"].compression == "gzip"


@pytest.mark.parametrize(
    ("array", "name", "reason"),
    [
        (np.zeros((4, 5, 3), np.float32), "flow", "holds floats"),
        (np.zeros((4, 5, 2), np.int32), "flow", "holds floats"),
        (np.zeros((4, 5, 2), np.float32), "disparity", "named 'flow'"),
        (np.array([[[np.nan, 1.0]]], np.float32), "flow", "flow of 1 pixels is not a number"),
        (np.array([[[np.inf, 1.0]]], np.float32), "flow", "flow of 1 pixels is not a number"),
    ],
)
def test_flo5_of_something_else_is_refused(array, name, reason, tmp_path):
    with h5py.File(tmp_path / "a.flo5", "w") as file:
        file.create_dataset(name, data=array)
    with pytest.raises(ValueError, match=reason):
        read_flow(tmp_path / "a.flo5")


def test_nan_without_the_formats_mark_is_refused(tmp_path):
    write_flow(tmp_path / "a.pfm", np.ones((2, 3, 4), np.float32))
    data = bytearray((tmp_path / "a.pfm").read_bytes())
    data[-12:-8] = np.array([np.nan], "<f4").tobytes()
    (tmp_path / "a.pfm").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="1 pixels is not a number"):
        read_flow(tmp_path / "a.pfm")


def test_real_sintel_as_its_files_say(shared_data, tmp_path):
    with pytest.raises(ValueError, match="4 of 2082 pairs are whole"):
        open_dataset("sintel", shared_data / "flow/sintel")
    dataset = open_dataset("sintel", shared_data / "flow/sintel", partial=True)
    assert [pair.id for pair in dataset.pairs] == [
        f"{p}/{s}/frame_0002" for p in ("clean", "final") for s in ("alley_1", "cave_2")
    ]
    sample = dataset[0]
    assert sample.image1.shape == (436, 1024, 3) and sample.valid.all()
    assert np.hypot(*sample.flow_px).mean() == pytest.approx(2.98, abs=0.01)  # data/README's mean motion
    shutil.copytree(shared_data / "flow/sintel", tmp_path / "half")
    (tmp_path / "half/training/final/cave_2/frame_0003.png").unlink()
    with pytest.raises(ValueError, match="3 of 2082 .*missing: training/final/cave_2/frame_0003.png"):
        open_dataset("sintel", tmp_path / "half")


def test_real_kitti_and_middlebury(shared_data):
    kitti = open_dataset("kitti2015", shared_data / "flow/kitti", partial=True)[0]
    assert kitti.valid.mean() == pytest.approx(0.16, abs=0.005)
    whale = open_dataset("middlebury", shared_data / "flow/middlebury", partial=True)[0]
    assert whale.id == "RubberWhale" and np.hypot(*whale.flow_px[:, whale.valid]).mean() == pytest.approx(
        1.26, abs=0.01
    )
