"""docs/FIRST_HOUR.md: its commands, in order, on two small films."""

import shlex
from pathlib import Path

import pytest

from kinema.pipelines import cli
from kinema.pipelines.scenes import Scene, write_scene

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "FIRST_HOUR.md").read_text()
COMMANDS = [line.strip()[2:] for line in TEXT.splitlines() if line.startswith("    $ ")]
SMALL = {
    "shard": ["clip.seconds=1", "clip.preset=veryfast", "min_shards=2"],
    "teach": ["short_side=64"],
    "train": ["steps=2", "batch_size=2", "flowfeat.resize=48", "flowfeat.crop=32", "loader.num_workers=0"],
    "embed": ["short_side=32"],
}


@pytest.mark.timeout(280)
def test_the_commands_of_the_first_hour_work(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for seed in range(2):
        write_scene(Scene(seed=seed, height=64, width=96, num_frames=24), tmp_path / "videos" / f"{seed}.mp4")
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        program, stage, *rest = shlex.split(command)
        assert program == "kinema"
        assert cli.main([stage, *rest, *SMALL.get(stage, [])]) == 0, (command, capfd.readouterr().err[-2000:])
    assert (tmp_path / "work" / "mlflow.db").is_file(), "one store for the run, the registry and what uses it"
    assert "Nearest patches" in (tmp_path / "work" / "features_inspect.html").read_text()
    assert "Checkpoints" in (tmp_path / "work" / "run_inspect.html").read_text()
