"""benchmark=flow: what a folder holds, every measure against a plain computation, submissions, table and page."""

from __future__ import annotations

import csv
import zipfile

import numpy as np
import pytest
import torch

from kinema.configs import EvaluateConfig
from kinema.configs.evaluate import FlowSuiteConfig
from kinema.configs.models.table import MODELS
from kinema.pipelines.evaluate import stage as evaluate
from kinema.pipelines.evaluate.flow import comparison as tables
from kinema.pipelines.evaluate.flow.metrics import ErrorBySpeed, FlowErrors, nearest_truth
from kinema.pipelines.evaluate.flow.suite import evaluate_sets, find_sets, write_submissions
from kinema.pipelines.flow_datasets import list_dataset
from kinema.pipelines.flow_datasets.tiny import write_tiny
from kinema.pipelines.sidecars.flow_files import read_flow

SIZE = (40, 48)
SETS = ("sintel", "kitti2012", "kitti2015", "spring", "middlebury")


class Shift(torch.nn.Module):
    """Says (1, -2) everywhere."""

    def forward(self, image1, image2, iters=None, flow_init=None):
        flow = torch.ones_like(image1[:, :2])
        flow[:, 1] = -2
        return flow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    for name in SETS:
        write_tiny(name, root / name, *SIZE)
    return root


@pytest.fixture(scope="module")
def result(folder):
    return evaluate_sets(Shift(), "shift", "dis", find_sets(folder), None, 2, lambda note: None)


def test_every_set_is_found_once_and_the_kittis_are_told_apart(folder):
    found = find_sets(folder)
    assert list(found) == list(SETS)
    assert found["kitti2012"].root.name == "kitti2012" and found["kitti2015"].root.name == "kitti2015"
    assert list(find_sets(folder / "spring")) == ["spring"]
    assert list(find_sets(folder, ["sintel"])) == ["sintel"]
    with pytest.raises(ValueError, match=r"no training pairs of spring here or one folder below; found .*training"):
        find_sets(folder / "sintel", ["spring"])
    with pytest.raises(ValueError, match="no such folder"):
        find_sets(folder / "absent")


def test_measures_are_those_of_a_plain_computation(folder, result):
    by_name = {s.name: s for s in result.sets}
    assert set(by_name) == {"sintel_clean", "sintel_final", "kitti2012", "kitti2015", "spring", "middlebury"}
    said = np.array([1.0, -2.0], np.float32)[:, None, None]
    for name in ("sintel_clean", "kitti2015", "middlebury"):
        dataset = name.partition("_")[0]
        samples = [s for s in list_dataset(dataset, folder / dataset) if name in (f"{dataset}_{s.group}", dataset)]
        per_image = [np.linalg.norm(said - s.flow_px, axis=0)[s.valid] for s in samples]
        errors = np.concatenate(per_image)
        speeds = np.concatenate([np.linalg.norm(s.flow_px, axis=0)[s.valid] for s in samples])
        found = by_name[name].scores
        wanted = errors.mean() if name.startswith("sintel") else np.mean([e.mean() for e in per_image])
        assert found["epe"] == pytest.approx(wanted, rel=1e-5)
        assert found["px3"] == pytest.approx((errors < 3).mean())
        assert found["1px"] == pytest.approx(100 * (errors > 1).mean())
        assert found["fl_all"] == pytest.approx(100 * ((errors > 3) & (errors > 0.05 * speeds)).mean())
        weights = 1 - np.arange(100) / 100
        curve = [(errors <= 0.05 * (i + 1)).mean() for i in range(100)]
        assert found["wauc"] == pytest.approx(100 * np.dot(weights, curve) / weights.sum(), abs=0.02)
        if (slow := speeds < 10).any():
            assert found["epe_s0_10"] == pytest.approx(errors[slow].mean(), rel=1e-5)
        if samples[0].occlusion is not None:
            hidden = np.concatenate([s.occlusion[s.valid] for s in samples])
            assert found["epe_unmatched"] == pytest.approx(errors[hidden].mean(), rel=1e-5)
            assert found["epe_matched"] == pytest.approx(errors[~hidden].mean(), rel=1e-5)
        assert by_name[name].pairs == len(samples)


def test_springs_pixels_count_by_the_nearest_of_their_true_flows(folder, result):
    samples = list(list_dataset("spring", folder / "spring"))
    errors = []
    for s in samples:
        for y, x in np.ndindex(*SIZE):
            known = [c[:, y, x] for c in s.candidates_px if np.isfinite(c[:, y, x]).all()]
            errors += [min(np.hypot(*(np.array([1, -2]) - flow)) for flow in known)] if known else []
    found = next(s for s in result.sets if s.name == "spring").scores
    assert found["epe"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_one_of_several_true_flows_may_be_unknown():
    candidates = np.full((4, 2, 1, 3), np.nan, np.float32)
    candidates[0, :, 0, 0], candidates[2, :, 0, 0] = (3, 4), (30, 40)
    candidates[1, :, 0, 1] = (0, 50)
    error, longest, mean = nearest_truth(np.zeros((2, 1, 3), np.float32), candidates)
    assert error[0, :2].tolist() == [5, 50] and np.isnan(error[0, 2])
    assert longest[0, :2].tolist() == [50, 50] and mean[0, :2].tolist() == [27.5, 50]
    collected = FlowErrors()
    collected.add(np.zeros((2, 1, 3), np.float32), candidates[0], candidates_px=candidates)
    # Both are more than 3 px and more than a twentieth of the longest true motion.
    assert collected.pooled("all")["fl_all"] == 100
    assert collected.pooled("s10_40")["epe"] == 5 and collected.pooled("s40plus")["epe"] == 50


def test_error_by_motion_is_the_mean_in_doubling_ranges():
    curve = ErrorBySpeed()
    curve.add(np.array([1.0, 3.0, 5.0], np.float32), np.array([0.0, 4.0, 7.9], np.float32))
    other = ErrorBySpeed()
    other.add(np.array([7.0], np.float32), np.array([1000.0], np.float32))
    curve.merge(other)
    assert curve.curve() == ([0.25, 4.0, 512.0], [1.0, 4.0, 7.0])


def test_damaged_pairs_are_left_out_and_named(tmp_path):
    write_tiny("middlebury", tmp_path, *SIZE)
    flow = sorted(tmp_path.glob("other-gt-flow/*/flow10.flo"))[0]
    flow.write_bytes(flow.read_bytes()[:-9])
    whole = evaluate_sets(Shift(), "shift", "dis", find_sets(tmp_path), None, 0, lambda note: None)
    (reason,) = whole.quarantined.values()
    assert reason.startswith("BadFlow: ") and str(flow) in reason
    assert whole.sets[0].pairs == len(find_sets(tmp_path)["middlebury"]) - 1


def test_submissions_lie_as_the_servers_want_them(folder, tmp_path):
    found = find_sets(folder, split="test")
    written = write_submissions(Shift(), found, tmp_path, None, lambda note: None)
    assert set(found) == {"sintel", "kitti2012", "kitti2015", "spring"} == set(written)
    for name, dataset in found.items():
        files = [p for p in (tmp_path / name).rglob("*") if p.suffix in (".flo", ".png", ".flo5")]
        assert len(files) == len(dataset.pairs)
        for path in files:
            flow = read_flow(path)
            assert flow.shape == (2, *SIZE) and np.allclose(flow[0], 1) and np.allclose(flow[1], -2)
    passes = {p.relative_to(tmp_path / "sintel").parts[0] for p in (tmp_path / "sintel").rglob("frame*.flo")}
    assert passes == {"clean", "final"}
    assert zipfile.ZipFile(written["kitti2015"]).namelist()[0].startswith("flow/0000")
    assert zipfile.ZipFile(written["kitti2012"]).namelist()[0].endswith("_10.png")
    ways = {p.parent.name for p in (tmp_path / "spring").rglob("*.flo5")}
    assert ways <= {f"flow_{way}_{side}" for way in ("FW", "BW") for side in ("left", "right")} and ways
    assert all(p.name.startswith(p.parent.name + "_") for p in (tmp_path / "spring").rglob("*.flo5"))


def test_published_figures_are_numbers_of_the_table_of_models():
    assert tables.published_figures("dinoflow") == {
        "sintel_clean_epe": 3.97,
        "sintel_final_epe": 5.06,
        "kitti2015_epe": 19.79,
        "kitti2015_fl_all": 61.6,
    }
    assert tables.published_figures("dis") == {}


def test_the_command_writes_one_table_for_all_flow_networks_and_a_page(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    suite = FlowSuiteConfig(datasets=("sintel", "middlebury"), worst=1)
    asked = EvaluateConfig(model="dis", benchmark="flow", data=str(folder), out=str(tmp_path / "out"), flow=suite)
    found = evaluate.run(asked).metrics
    assert (found["flow_quarantined"], found["flow_middlebury_pairs"], found["flow_sintel_clean_pairs"]) == (0, 2, 4)
    assert {"flow_sintel_final_epe", "flow_sintel_clean_epe_s0_10", "flow_middlebury_wauc"} <= set(found)
    assert "pairs are whole" in capsys.readouterr().err  # a few of 1041 are said to be that
    rows = {row["model"]: row for row in csv.DictReader((tmp_path / "out" / "flow.csv").open())}
    assert set(rows) == set(MODELS.of_kind("flow"))
    assert rows["raft"]["sintel_clean_epe published"] == "1.43" and rows["raft"]["sintel_clean_epe measured"] == ""
    assert float(rows["dis"]["sintel_clean_epe measured"]) == pytest.approx(found["flow_sintel_clean_epe"], abs=1e-3)
    page = (tmp_path / "out" / "flow.html").read_text()
    assert page.count("<svg") == 3 and "MPI Sintel clean" in page and "4 of 1041" in page
    with pytest.raises(ValueError, match="out is empty; name the folder for the submissions"):
        evaluate.run(
            EvaluateConfig(model="dis", benchmark="flow", data=str(folder), flow=FlowSuiteConfig(split="test"))
        )


@pytest.mark.slow
def test_raft_small_agrees_with_the_figures_of_its_published_code(shared_data, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    weights = str(shared_data / "weights" / "raft-small.pth")
    asked = EvaluateConfig(
        model="raft_small", weights=weights, benchmark="flow", data=str(shared_data / "flow"), out=str(tmp_path / "out")
    )
    found = evaluate.run(asked).metrics
    for name, wanted in {
        "flow_middlebury_epe": 0.329,
        "flow_sintel_clean_epe": (0.274 + 1.189) / 2,
        "flow_sintel_final_epe": (0.274 + 1.344) / 2,
        "flow_kitti2015_epe": 7.56,
    }.items():
        assert found[name] == pytest.approx(wanted, abs=0.01), name
    assert found["flow_kitti2015_fl_all"] == pytest.approx(33.9, abs=0.05)
    page = (tmp_path / "out" / "flow.html").read_text()
    assert page.count("<svg") == 4 and "raft_small, error " in page
