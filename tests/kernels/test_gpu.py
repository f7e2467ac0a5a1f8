"""`make gpu` without and with a device."""

import csv

import pytest
import torch

from kinema.kernels import gpu


def test_without_a_device_it_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TABLE", tmp_path / "gpu.csv")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1
    assert "no CUDA device" in capsys.readouterr().err and not (tmp_path / "gpu.csv").exists()


def test_rows_are_appended_below_one_header(tmp_path):
    row = dict.fromkeys(gpu.COLUMNS, "1")
    for _ in range(2):
        gpu.append_rows(tmp_path / "b" / "gpu.csv", [row])
    with (tmp_path / "b" / "gpu.csv").open() as handle:
        assert list(csv.DictReader(handle)) == [row, row]


@pytest.fixture
def pretended_device(monkeypatch):
    """The timing functions answer without a device, so that the script's own logic runs."""
    monkeypatch.setattr(gpu, "_milliseconds", lambda function: (function(), 2.0)[1])
    monkeypatch.setattr(gpu, "_peak_mb", lambda function: (function(), 1.0)[1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "3.9.0")
    return gpu.CardRates(1000.0, {torch.float16: 100.0})


def test_a_wrong_kernel_is_not_timed(pretended_device):
    timed = []
    case = gpu.GpuCase("wrong", ours=lambda: timed.append(1), check=lambda: float("nan"), tolerance=1e-5)
    with pytest.raises(AssertionError, match="relative error"):
        gpu.measure_case(case, pretended_device)
    assert not timed


def test_a_case_has_a_row_for_each_baseline_that_runs(pretended_device):
    def missing():
        raise ImportError("no localcorr here")

    case = gpu.GpuCase(
        "right",
        ours=lambda: None,
        check=lambda: 1e-6,
        tolerance=1e-5,
        baselines={"plain": lambda: None, "localcorr": missing},
        bytes_moved=1e9,
        flops=1e11,
    )
    (row,) = gpu.measure_case(case, pretended_device)
    assert row["baseline"] == "plain" and row["ratio"] == 1.0
    assert row["gbytes_per_s"] == 500.0 and row["of_copy_rate"] == 0.5
    assert row["tflops"] == 50.0 and row["of_matrix_rate"] == 0.5
    assert set(row) == set(gpu.COLUMNS)
