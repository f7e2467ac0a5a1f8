"""Flow measures against their goldens, benchmark folders, and RAFT-small's published-weight errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.models.flow.raft.network import raft_small
from kinema.pipelines.evaluate.flow.metrics import FlowErrors
from kinema.pipelines.evaluate.flow.scores import evaluate_flow, find_samples
from kinema.pipelines.sidecars.flow_files import read_flow, write_flow


@pytest.fixture(scope="module")
def errors(fill):
    """The errors of the golden's three images."""
    collected = FlowErrors()
    for n in range(3):
        gt = 6 * (n + 1) ** 2 * fill.smooth_flow(0, f"gt{n}", 1, 40, 56, amplitude=1)[0]
        scale = torch.exp(fill.uniform(0, f"sc{n}", 1, 40, 56, low=-2.5, high=2.8))
        flow = gt + scale * fill.normal(0, f"err{n}", 2, 40, 56)
        valid = fill.uniform(0, f"valid{n}", 40, 56) > 0.3
        gt[0, 0, :8] = torch.tensor([0.0, 0, 0, 60, 10, 40, 0, 100])
        gt[1, 0, :8] = torch.tensor([0.0, 0, 0, 80, 0, 0, 0, 0])
        flow[:, 0, :8] = gt[:, 0, :8]
        flow[0, 0, :8] += torch.tensor([1.0, 3, 5, 5, 4, 4, 0, 5])
        valid[0, :8] = True
        occluded = fill.image(0, f"occ{n}", 1, 40, 56, channels=1)[0, 0] > 0.6
        collected.add(flow.numpy(), gt.numpy(), valid.numpy(), occluded.numpy())
    return collected


def _close(reference, name, value):
    assert value == pytest.approx(float(reference.data[name]), rel=1e-5), name


def test_sintel_measures_equal_the_published_ones(errors, golden):
    reference, scores = golden("flow_metrics__s0"), errors.sintel()
    _close(reference, "raft.sintel_epe", scores["epe"])
    for t in (1, 3, 5):
        _close(reference, f"raft.sintel_px{t}", scores[f"px{t}"])
        _close(reference, f"gmflow.sintel_clean_{t}px", errors.pooled("all")[f"{t}px"])
    for name in ("s0_10", "s10_40", "s40plus"):
        _close(reference, f"speed.{name}", scores[name])


def test_kitti_measures_equal_the_published_ones(errors, golden):
    reference, scores = golden("flow_metrics__s0"), errors.kitti()
    _close(reference, "raft.kitti_epe", scores["epe"])
    _close(reference, "raft.kitti_f1_percent", scores["fl_all"])


@pytest.mark.parametrize(("subset", "suffix"), [("valid", ""), ("occluded", "_occ"), ("visible", "_non_occ")])
def test_per_image_measures_equal_the_published_ones(subset, suffix, errors, golden):
    reference, scores = golden("flow_metrics__s0"), errors.per_image(subset)
    for name, key in {"flall": "fl_all", "epe": "epe", "px1": "px1", "px3": "px3", "wauc": "wauc"}.items():
        _close(reference, f"ptlflow.{name}{suffix}", scores[key])


def test_unknown_ground_truth_counts_nowhere():
    gt, flow = np.zeros((2, 2, 2), np.float32), np.full((2, 2, 2), 3.0, np.float32)
    gt[:, 0, 0], gt[:, 0, 1] = np.nan, 3.0
    collected = FlowErrors()
    collected.add(flow, gt)
    assert collected.middlebury()["epe"] == pytest.approx(2 / 3 * np.hypot(3, 3))
    assert collected.kitti()["fl_all"] == pytest.approx(200 / 3)


class _Shift(torch.nn.Module):
    """Says (1, 0) everywhere."""

    def forward(self, image1, image2, iters=None, flow_init=None):
        flow = torch.zeros_like(image1[:, :2])
        flow[:, 0] = 1
        return flow


def _frame(path, height=6, width=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


def test_benchmark_folders_as_published(tmp_path):
    gt = np.zeros((2, 6, 8), np.float32)
    for number in (1, 2):
        _frame(tmp_path / f"sintel/training/clean/alley/frame_000{number}.png")
        _frame(tmp_path / f"other-data/Dog/frame1{number - 1}.png")
        _frame(tmp_path / f"kitti/training/image_2/000003_1{number - 1}.png")
    for path in ("sintel/training/flow/alley/frame_0001.flo", "other-gt-flow/Dog/flow10.flo"):
        (tmp_path / path).parent.mkdir(parents=True)
        write_flow(tmp_path / path, gt)
    (tmp_path / "kitti/training/flow_occ").mkdir()
    gt[:, 3:] = np.nan
    write_flow(tmp_path / "kitti/training/flow_occ/000003_10.png", gt)
    assert evaluate_flow(_Shift(), tmp_path / "sintel", "sintel")["clean_epe"] == 1
    assert evaluate_flow(_Shift(), tmp_path, "middlebury")["epe"] == 1
    assert evaluate_flow(_Shift(), tmp_path / "kitti", "kitti") == {"epe": 1, "fl_all": 0}


@pytest.mark.parametrize("benchmark", ["sintel", "kitti", "middlebury"])
def test_a_folder_without_the_benchmark_is_named(benchmark, tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(ValueError, match=f"no {benchmark} ground truth .*found holiday"):
        evaluate_flow(_Shift(), tmp_path, benchmark)
    with pytest.raises(ValueError, match="no such folder"):
        evaluate_flow(_Shift(), tmp_path / "absent", benchmark)


def test_a_missing_frame_is_named(shared_data, tmp_path):
    (tmp_path / "flow/a").mkdir(parents=True)
    write_flow(tmp_path / "flow/a/frame_0001.flo", np.zeros((2, 6, 8), np.float32))
    _frame(tmp_path / "clean/a/frame_0001.png")
    with pytest.raises(ValueError, match=r"1 pairs with ground truth lack files.* missing: clean/a/frame_0002\.png"):
        find_samples(tmp_path, "sintel")


@pytest.fixture(scope="module")
def published(shared_data):
    """RAFT-small with its published weights."""
    return raft_small(weights=shared_data / "weights" / "raft-small.pth")


@pytest.mark.parametrize(("iters", "epe"), [(12, 0.320), (32, 0.329)])
def test_raft_small_on_middlebury(iters, epe, published, shared_data):
    scores = evaluate_flow(published, shared_data / "flow/middlebury", "middlebury", iters)
    assert scores["epe"] == pytest.approx(epe, abs=0.005)


def test_raft_small_on_kitti(published, shared_data):
    scores = evaluate_flow(published, shared_data / "flow/kitti", "kitti")
    # To 0.005 px of a figure that is itself known to 0.005 px; rounding alone moves this pair by 0.003 px.
    assert scores["epe"] == pytest.approx(7.56, abs=0.01)
    assert scores["fl_all"] == pytest.approx(33.9, abs=0.05)
    assert published.padding == "sintel"


@pytest.mark.slow
def test_raft_small_on_sintel(published, shared_data):
    seen, flows = [], []
    recording = published.register_forward_hook(lambda _network, _args, flow: flows.append(flow[0].numpy()))
    scores = evaluate_flow(
        published, shared_data / "flow/sintel", progress=lambda done, total, name: seen.append((done, total, name))
    )
    recording.remove()
    # Both pairs have the same size, so the pooled mean is the mean of the pairs' published figures.
    assert scores["clean_epe"] == pytest.approx((0.274 + 1.189) / 2, abs=0.005)
    assert scores["final_epe"] == pytest.approx((0.274 + 1.344) / 2, abs=0.005)
    assert scores["clean_epe_matched"] < scores["clean_epe"] < scores["clean_epe_unmatched"]
    assert seen[-1] == (4, 4, "final/cave_2/frame_0002")
    stored = read_flow(shared_data / "flow/golden_raft_small/alley_1_clean_0002_it32_sintel.flo")
    assert np.abs(flows[0] - stored).max() < 0.01
