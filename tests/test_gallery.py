"""Every program of the gallery runs, in order, and draws its picture."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GALLERY = Path(__file__).resolve().parents[1] / "docs" / "gallery"
PROGRAMS = sorted(GALLERY.glob("*.py"))


@pytest.mark.timeout(280)
def test_ten_programs_run_and_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # what a program sets is taken back
    monkeypatch.chdir(tmp_path)
    assert len(PROGRAMS) == 10
    page = (GALLERY.parent / "GALLERY.md").read_text()
    for program in PROGRAMS:
        runpy.run_path(str(program), run_name="__main__")
        picture = np.asarray(Image.open(tmp_path / f"{program.stem}.png"))
        assert picture.ndim == 3 and min(picture.shape[:2]) >= 24 and picture.std() > 1, program.name
        assert f"gallery/{program.name}" in page
    assert capsys.readouterr().out.count("\n") >= 10
