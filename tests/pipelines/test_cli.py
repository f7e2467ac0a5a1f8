"""The command line as programs meet it: exit status, stdout and stderr."""

import json
import subprocess
import sys

import pytest

from kinema.pipelines import cli
from kinema.pipelines.errors import StageError


def kinema(*arguments, cwd=None):
    command = [sys.executable, "-m", "kinema.pipelines.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["shard", "viedos=x"], "did you mean videos?"),
        (["train", "steps=x"], "steps=x"),
        (["nonsense"], "invalid choice"),
        (["shard", "--jsn"], "--jsn"),
        (["submit", "shard", "viedos=x"], "job server address"),
        (["submit", "--address", "http://127.0.0.1:9", "shard", "viedos=x"], "did you mean videos?"),
        (["run", "--config", "demo", "shard.videos="], "shard.videos"),
    ],
)
def test_bad_arguments_exit_with_2_and_one_line(arguments, says, tmp_path):
    done = kinema(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


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
    assert cli.main(["shard", "--json"]) == 0
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
    assert cli.main(["shard"]) == status
    out, err = capfd.readouterr()
    assert out == "" and says in err and len(err.strip().splitlines()) == 1
