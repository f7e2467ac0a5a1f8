"""`kinema inspect flow/a flow/b`: the figures beside the truth, what is recommended, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest

from kinema.configs import TeachConfig
from kinema.pipelines import teach
from kinema.pipelines.report.inspect import inspect_teachers
from kinema.pipelines.report.page import Page
from kinema.pipelines.report.teachers import add_teachers
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow

SCENES = [Scene(seed, 64, 96, 4, num_objects=3) for seed in (31, 32)]
GAPS = (1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """clips/, exact flow, DIS at its usual and at its coarsest preset, and their consensus."""
    folder = tmp_path_factory.mktemp("data")
    clips = write_scene_clips(SCENES, folder / "clips")
    write_scene_flow(SCENES, clips, folder / "exact", gaps=(1, -1, 2, -2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        taught = {"usual": dict(iters=0), "coarse": dict(iters=1)}
        members = tuple(str(folder / name) for name in taught)
        taught["agreed"] = dict(teacher="consensus", from_=members)
        for name, settings in taught.items():
            teach.run(TeachConfig(clips=str(folder / "clips"), out=str(folder / name), gaps=GAPS, **settings))
    return folder


def compared(data: Path, names: list[str], truth: str = "") -> list[list[dict]]:
    """Rows of every table on the page."""

    class Noted(Page):
        tables: list[list[dict]] = []

        def table(self, rows, columns=None):
            self.tables.append([dict(row) for row in rows])
            super().table(rows, columns)

    page = Noted("title", "")
    page.tables = []
    add_teachers(page, [str(data / name) for name in names], str(data / "clips"), truth, with_costs=False)
    return page.tables


def test_the_exact_flow_is_without_error_and_recommended(data):
    advice, figures = compared(data, ["coarse", "exact"], str(data / "exact"))
    by_name = {(row["teacher"], row["gap"]): row for row in figures}
    assert set(by_name) == {(name, gap) for name in ("coarse", "exact") for gap in GAPS}
    for gap in GAPS:
        coarse = by_name["coarse", gap]
        assert by_name["exact", gap]["error, px"] == 0 < coarse["error, px"]
        assert coarse["to the others, px"] == pytest.approx(coarse["error, px"]), "the only other one is the truth"
    assert [row["take"] for row in advice] == ["exact"]
    assert re.match(r"least error, px: coarse [0-9.]+, exact 0", advice[0]["because"])


def test_a_consensus_is_no_witness_for_its_members(data):
    _, alone = compared(data, ["usual", "coarse"])
    _, beside = compared(data, ["usual", "coarse", "agreed"])
    far = {row["teacher"]: row["to the others, px"] for row in beside if row["gap"] == 1}
    assert {row["teacher"]: row["to the others, px"] for row in alone if row["gap"] == 1} == {
        name: far[name] for name in ("usual", "coarse")
    }
    assert 0 < far["agreed"] < far["usual"], "it lies between its members"
    assert np.isnan([row["error, px"] or np.nan for row in beside]).all(), "no truth was given"


def test_the_page_shows_costs_and_pictures_of_every_teacher(data, tmp_path):
    summary = inspect_teachers([str(data / "usual"), str(data / "agreed")], str(tmp_path), str(tmp_path / "pictures"))
    page = Path(summary.page).read_text()
    assert "least processor time of a pair" in page and "least memory of a pair" in page
    assert page.count("disagreement, up to") >= 2 and "error of usual" not in page
    assert summary.files == len(list((tmp_path / "pictures").iterdir())) > 6


def test_flow_of_other_clips_or_none_in_common_is_refused(data, tmp_path):
    other = write_scene_clips(SCENES[:1], tmp_path / "clips")
    write_scene_flow(SCENES[:1], other, tmp_path / "flow", gaps=(1,))
    with pytest.raises(ValueError, match="made from different clips"):
        inspect_teachers([str(data / "usual"), str(tmp_path / "flow")])
    with pytest.raises(ValueError, match="holds clips; teachers are compared by their flow"):
        inspect_teachers([str(data / "usual"), str(data / "clips")])
    write_scene_flow(SCENES, write_scene_clips(SCENES, data / "clips"), tmp_path / "long", gaps=(3,))
    with pytest.raises(ValueError, match="have no pair of frames in common"):
        add_teachers(Page("", ""), [str(data / "usual"), str(tmp_path / "long")], str(data / "clips"), "")
