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


@pytest.mark.gpu
def test_lookup_on_the_device_equals_the_volume():
    assert float(gpu.lookup_case(46, 62)["max_error"]) < 1e-2
