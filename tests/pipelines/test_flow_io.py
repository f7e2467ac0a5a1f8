"""Flow files: byte for byte as published, missing values, damaged files."""

import cv2
import numpy as np
import pytest

from kinema.pipelines.sidecars import flow_files as flow_io


@pytest.fixture(scope="module")
def case(fill, golden):
    """(golden, flow without missing values, the same with nan) of the published files."""
    reference = golden("flow_files__s0")
    flow = fill.smooth_flow(0, "flow", 1, 12, 20, amplitude=30)[0].numpy()
    flow[0, 0, :8] = np.array([0, 1 / 64, 0.5 / 64, -0.5 / 64, 0.999 / 64, -1 / 64, 511.984375, -512])
    flow[1, 0, :8] = np.array([0.25, -0.25, 0.75, -0.75, 1.5, -1.5, 300 * 64, -300 * 64]) / 64
    missing = (fill.uniform(0, "nan", 12, 20) > 0.8).numpy()
    missing[0, :8] = False
    sparse = np.where(missing, np.float32(np.nan), flow)
    assert np.array_equal(np.moveaxis(flow, 0, -1), reference.data["flow"])
    return reference, flow, sparse


def _bytes(path):
    return np.frombuffer(path.read_bytes(), np.uint8).astype(np.float32)


def _hwc_nan_as_0(flow):
    return np.nan_to_num(np.moveaxis(flow, 0, -1), nan=0.0)


def test_flo_equals_the_published_files(case, tmp_path):
    reference, flow, sparse = case
    path = tmp_path / "a.flo"
    flow_io.write_flow(path, flow)
    assert np.array_equal(_bytes(path), reference.data["flo_bytes"])
    assert np.array_equal(flow_io.read_flow(path), flow)
    flow_io.write_flow(path, sparse)
    assert np.array_equal(_bytes(path), reference.data["flo_ptlflow_bytes"])
    read = flow_io.read_flow(path)
    assert np.array_equal(_hwc_nan_as_0(read), reference.data["flo_ptlflow_read_flow_nan_as_0"])
    assert np.array_equal(np.isnan(read), np.isnan(sparse))


def test_kitti_equals_the_published_files(case, tmp_path):
    reference, flow, sparse = case
    path = tmp_path / "a.png"
    flow_io.write_flow(path, flow)
    assert np.array_equal(cv2.imread(str(path), -1)[..., ::-1], reference.data["kitti_raft_raw_rgb16"])
    assert np.array_equal(np.moveaxis(flow_io.read_flow(path), 0, -1), reference.data["kitti_raft_read_flow"])
    flow_io.write_flow(path, sparse)
    assert np.array_equal(cv2.imread(str(path), -1)[..., ::-1], reference.data["kitti_spring_raw_rgb16"])
    flow_io.write_kitti_flow(path, sparse, missing_value=32768)
    assert np.array_equal(cv2.imread(str(path), -1)[..., ::-1], reference.data["kitti_ptlflow_raw_rgb16"])
    read = flow_io.read_flow(path)
    assert np.array_equal(_hwc_nan_as_0(read), reference.data["kitti_ptlflow_read_flow_nan_as_0"])
    assert np.array_equal(~flow_io.valid_pixels(read), reference.data["kitti_ptlflow_read_nan"] > 0)


def test_kitti_clips_what_does_not_fit(tmp_path):
    flow = np.array([[[-2000.0, 2000.0]], [[0.0, 0.0]]], np.float32)
    flow_io.write_flow(tmp_path / "a.png", flow)
    assert flow_io.read_flow(tmp_path / "a.png")[0].tolist() == [[-512.0, 511.984375]]


def test_pfm_equals_the_published_file(case, tmp_path):
    reference, flow, sparse = case
    path = tmp_path / "a.pfm"
    flow_io.write_flow(path, sparse)
    assert np.array_equal(_bytes(path), reference.data["pfm_bytes"])
    read = flow_io.read_flow(path)
    assert np.array_equal(_hwc_nan_as_0(read), reference.data["pfm_read_flow_nan_as_0"])
    big_endian = np.frombuffer(path.read_bytes()[-12 * 240 :], "<f4").astype(">f4").tobytes()
    path.write_bytes(b"PF\n20 12\n1.0\n" + big_endian)
    assert np.array_equal(flow_io.read_flow(path), read, equal_nan=True)


def test_kitti_disparity_equals_the_published_reader(case, fill, tmp_path):
    reference = case[0]
    disparity = fill.uniform(0, "disp", 12, 20, high=90).numpy()
    disparity[0, 0] = 0
    flow_io.write_kitti_disparity(tmp_path / "d.png", disparity)
    read = flow_io.read_kitti_disparity(tmp_path / "d.png")
    assert np.array_equal(~np.isnan(read), reference.data["kitti_disparity_valid"] > 0)
    flow = flow_io.disparity_to_flow(read)
    assert np.array_equal(_hwc_nan_as_0(flow), reference.data["kitti_disparity_as_flow"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.flo", b"PIEX" + bytes(16)),
        ("a.flo", b"PIEH" + np.array([4, 4], "<i4").tobytes() + bytes(100)),
        ("a.flo", b""),
        ("a.pfm", b"Pf\n2 2\n-1.0\n" + bytes(16)),
        ("a.pfm", b"PF\n2 2\n-1.0\n" + bytes(40)),
        ("a.png", b"not a png"),
        ("a.png", b""),
        ("a.tif", b""),
    ],
)
def test_a_damaged_file_is_a_clear_error(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        flow_io.read_flow(tmp_path / name)


def test_eight_bit_png_is_not_flow(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="16-bit"):
        flow_io.read_flow(tmp_path / "a.png")


def test_real_ground_truth(shared_data):
    flow = flow_io.read_flow(shared_data / "flow/middlebury/RubberWhale_flow10.flo")
    known = flow_io.valid_pixels(flow)
    assert flow.shape == (2, 388, 584) and 0.9 < known.mean() < 1
    assert np.hypot(*flow[:, known]).mean() == pytest.approx(1.26, abs=0.01)
    kitti = flow_io.read_flow(shared_data / "flow/kitti/flow_gt.png")
    valid = flow_io.valid_pixels(kitti)
    assert valid.mean() == pytest.approx(0.16, abs=0.005)
    assert np.hypot(*kitti[:, valid]).mean() == pytest.approx(51.0, abs=0.1)
