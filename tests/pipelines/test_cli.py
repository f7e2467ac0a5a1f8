"""The command line as programs meet it: exit status, stdout and stderr."""

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from kinema.configs.models.table import MODELS
from kinema.pipelines import cli
from kinema.pipelines.errors import StageError
from kinema.pipelines.pictures.images import write_png
from kinema.pipelines.progress import Progress, never_silent
from kinema.pipelines.scenes import Scene
from kinema.pipelines.sidecars.flow_files import read_flow
from kinema.pipelines.single import read_image


def kinema(*arguments, cwd=None):
    command = [sys.executable, "-m", "kinema.pipelines.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["shard", "viedos=x"], "did you mean videos?"),
        (["train", "steps=x"], "steps=x does not fit: steps is a whole number"),
        (["nonsense"], "there is no command 'nonsense'; commands are shard, teach"),
        (["shrad"], "did you mean shard?"),
        (["shard", "--videos", "films"], "settings have no dashes, write videos=films"),
        (["teach", "--short-side=64"], "settings have no dashes, write short_side=64"),
        (["shard"], "2 settings are missing: videos= (Folder, glob, file"),
        (["shard", "--jsn"], "--jsn"),
        (["submit", "shard", "viedos=x"], "job server address"),
        (["submit", "--address", "http://127.0.0.1:9", "shard", "viedos=x"], "did you mean videos?"),
        (["run", "--config", "demo", "shard.videos="], "shard.videos"),
        (["train", "flowfeat.crop_scale=[a,b]"], "flowfeat.crop_scale is a list of 2, each a number"),
        (["flow", "one.png"], "give two pictures, or one film"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(arguments, says, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert status_of(arguments) == 2
    out, err = capfd.readouterr()
    assert says in err and "Traceback" not in err and "omegaconf" not in err.lower() and len(err.splitlines()) == 1
    assert out == ""


def test_a_whole_process_refuses_in_the_same_way(tmp_path):
    done = kinema("shard", "viedos=x", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean videos?" in done.stderr and done.stdout == ""


def status_of(arguments) -> int:
    """Exit status of a command in this process."""
    try:
        return cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


def test_kinema_alone_shows_help(capsys):
    assert status_of([]) == 0
    assert "inspect" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_keys(shell, capfd):
    assert status_of(["completion", shell]) == 0
    script = capfd.readouterr().out
    assert "teach" in script and "videos=" in script and "flowfeat.crop=" in script


def test_models_shows_the_table(capfd):
    assert status_of(["models"]) == 0
    lines = capfd.readouterr().out.splitlines()
    (raft,) = [line for line in lines if line.startswith("raft ")]
    assert "5.3 M" in raft and "BSD-3-Clause" in raft and "Sintel" in raft
    assert status_of(["models", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["models"]
    assert {row["model"] for row in rows} == set(MODELS)


def test_flow_between_two_pictures_as_numbers_and_colours(tmp_path, capfd):
    """A picture moved by three pixels: DIS finds it; the file holds it."""
    scene = Scene(seed=1, height=96, width=128, num_frames=2).frame(0)
    for number, shift in enumerate((0, 3)):
        write_png(tmp_path / f"{number}.png", np.roll(scene, shift, axis=1))
    files = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    assert status_of(["flow", *files, f"out={tmp_path / 'f.flo'}", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    flow = read_flow(tmp_path / "f.flo")
    assert (found["height"], found["width"]) == (96, 128) and flow.shape == (2, 96, 128)
    assert np.abs(np.median(flow[:, 16:-16, 16:-16], axis=(1, 2)) - [3, 0]).max() < 0.5
    assert status_of(["flow", *files, f"out={tmp_path / 'f.png'}"]) == 0
    assert read_image(tmp_path / "f.png").shape == (96, 128, 3)


def test_a_long_silence_is_broken(capsys):
    with never_silent("teach", after_s=0.2):
        time.sleep(0.9)
    assert "teach: at work, " in capsys.readouterr().err
    with never_silent("teach", after_s=5):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar():
    screen = io.StringIO()
    screen.isatty = lambda: True
    progress = Progress("teach", 4, "clips", screen)
    for done in range(5):
        progress.update(done, "12 pairs")
    progress.close()
    assert "teach, clips" in screen.getvalue() and "4/4" in screen.getvalue()


def test_settings_may_follow_flags():
    args = cli._parse(["shard", "videos=a", "--json", "out=b"])
    assert args.json and args.overrides == ["videos=a", "out=b"]


def test_every_stage_lists_its_keys():
    done = kinema("train", "--help")
    assert done.returncode == 0
    assert "flowfeat.ridge_alpha=0.1" in done.stdout and "Steps of linear warm-up" in done.stdout


def test_json_is_the_last_line_of_stdout_and_prints_of_others_go_to_stderr(capfd, monkeypatch):
    def noisy(config):
        print("a library prints here")
        return {"sources": 3, "clips": 7}

    monkeypatch.setattr(cli.stages, "stage_module", lambda stage: type("M", (), {"run": staticmethod(noisy)}))
    assert cli.main(["shard", "videos=v", "out=o", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1]) == {"sources": 3, "clips": 7}
    assert len(out.splitlines()) == 1 and "a library prints here" in err


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ValueError("gap=0 is out of range"), 2, "gap=0"),
        (StageError("no usable sample: 3 without flow"), 1, "no usable sample"),
        (OSError(28, "No space left on device", "/x/y.tar"), 1, "disk full while writing /x/y.tar"),
        (KeyboardInterrupt(), 1, "run the same command again"),
        (ZeroDivisionError("surprise"), 1, "ZeroDivisionError: surprise"),
    ],
)
def test_failures_are_one_line_with_the_right_status(capfd, monkeypatch, error, status, says):
    def fail(config):
        raise error

    monkeypatch.setattr(cli.stages, "stage_module", lambda stage: type("M", (), {"run": staticmethod(fail)}))
    monkeypatch.delenv("KINEMA_DEBUG", raising=False)
    assert cli.main(["shard", "videos=v", "out=o"]) == status
    out, err = capfd.readouterr()
    assert out == "" and says in err and len(err.strip().splitlines()) == 1
