"""`kinema run`: what runs, what is skipped, and why. Stages are stand-ins that write one file each."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

import kinema.pipelines
from kinema.configs import WorkflowConfig, build
from kinema.pipelines import workflow


@dataclasses.dataclass(frozen=True)
class Summary:
    clips: int
    exit_status: int = 0


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Stages that record that they ran and write a manifest naming what they read."""
    ran = []

    def stand_in(name):
        def run(section):
            ran.append(name)
            out = getattr(section, "out", "")
            if out:
                Path(out).mkdir(parents=True, exist_ok=True)
                (Path(out) / "manifest.json").write_text(json.dumps(dataclasses.asdict(section)))
            return Summary(clips=2)

        return type("Stage", (), {"run": staticmethod(run)})

    class Run:
        def end(self, status):
            self.status = status

    tracking = type("Tracking", (), {"start_workflow": staticmethod(lambda name, params: Run())})
    monkeypatch.setattr(workflow, "stage_module", stand_in)
    monkeypatch.setitem(sys.modules, "kinema.pipelines.tracking", tracking)
    monkeypatch.setattr(kinema.pipelines, "tracking", tracking, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'ws' / 'mlflow.db'}")
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"a")
    return ran


def go(tmp_path, *overrides):
    config = build(
        WorkflowConfig, {"workspace": str(tmp_path / "ws"), "shard": {"videos": str(tmp_path / "videos")}}, overrides
    )
    return workflow.run(config, report=lambda line: None)


def test_second_run_does_nothing(stages, tmp_path):
    first = go(tmp_path)
    assert stages == ["shard", "teach", "train", "register", "embed"]
    assert set(first.stages.values()) == {"done"}
    (tmp_path / "ws" / "mlflow.db").touch()
    go(tmp_path)
    stages.clear()
    second = go(tmp_path)
    assert stages == [] and set(second.stages.values()) == {"skipped"}
    assert second.summaries == first.summaries
    assert second.seconds < 10


def test_deleting_one_artifact_redoes_it_and_what_depends_on_it(stages, tmp_path):
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "mlflow.db").touch()
    go(tmp_path)
    stages.clear()
    shutil.rmtree(tmp_path / "ws" / "flow" / "dis")
    again = go(tmp_path)
    assert stages == ["teach", "train", "register", "embed"]
    assert again.stages["shard"] == "skipped"


def test_a_changed_setting_redoes_its_stage_in_a_folder_of_its_own(stages, tmp_path):
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "mlflow.db").touch()
    before = go(tmp_path).outputs["train"]
    stages.clear()
    after = go(tmp_path, "train.lr=0.5").outputs["train"]
    assert stages == ["train", "register", "embed"] and before != after and Path(before).exists()
    stages.clear()
    longer = go(tmp_path, "train.lr=0.5", "train.steps=2000")
    assert longer.outputs["train"] == after and (Path(after) / "manifest.json").exists()


def test_a_new_video_runs_the_chain(stages, tmp_path):
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "mlflow.db").touch()
    go(tmp_path)
    stages.clear()
    (tmp_path / "videos" / "b.mp4").write_bytes(b"b")
    go(tmp_path)
    assert stages[0] == "shard" and "teach" in stages


def test_no_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shard.videos=DIR"):
        workflow.run(WorkflowConfig(workspace=str(tmp_path)))
