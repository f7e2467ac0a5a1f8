"""docs/ADD_A_MODEL.md: its blocks make a model outside of kinema that trains, is evaluated, registered and embeds."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.evaluate.davis.folder import write_labels
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow

PAGE = Path(__file__).resolve().parents[1] / "docs" / "ADD_A_MODEL.md"


def blocks(language: str) -> list[tuple[str, str]]:
    """(file named by the fence, code) of every block of a language."""
    return re.findall(rf"^```{language}(?: file=(\S+))?\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def write_davis(root: Path) -> None:
    """A sequence of a square that moves over a grey ground."""
    labels = np.zeros((4, 48, 64), np.uint8)
    for t in range(4):
        labels[t, 12:28, 10 + 4 * t : 26 + 4 * t] = 1
        path = root / "JPEGImages/480p/square" / f"{t:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(labels[t][..., None], (220, 40, 30), (90, 100, 95)).astype(np.uint8)).save(path)
    write_labels(root / "Annotations/480p/square", [f"{t:05d}" for t in range(4)], labels)


# In one process, away from this one: each start imports for seconds.
IN_TURN = """
import json, sys
from kinema.pipelines import cli
for arguments in json.loads(sys.argv[1]):
    if cli.main(arguments):
        sys.exit(f"{arguments} failed")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, migrated_store):
    """The page's files and data, and what each of its commands printed, by command."""
    folder = tmp_path_factory.mktemp("toy")
    for name, code in blocks("python"):
        with (folder / name).open("a") as file:
            file.write(code + "\n\n")
    scenes = [Scene(seed=seed, height=48, width=64, num_frames=5) for seed in range(3)]
    clips = write_scene_clips(scenes, folder / "clips")
    write_scene_flow(scenes, clips, folder / "flow")
    write_davis(folder / "davis")
    shutil.copyfile(migrated_store(), folder / "mlflow.db")
    environment = os.environ | {
        "KINEMA_ENGINE": "serial",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": "1",
    }
    commands = {}
    for line in blocks("bash")[0][1].strip().splitlines():
        program, command, *rest = shlex.split(line)
        if program == "export":
            environment |= [command.split("=")]
            continue
        assert program == "kinema"
        commands[command] = [command, "--json", *rest]
    run = [sys.executable, "-c", IN_TURN, json.dumps(list(commands.values()))]
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return folder, environment, {name: json.loads(line) for name, line in zip(commands, lines, strict=True)}


def test_the_page_names_every_step():
    assert [name for name, _ in blocks("python")] == ["toy_model.py", "toy_recipe.py", "toy_recipe.py", "toy_row.py"]


def test_it_trains_and_is_evaluated(made):
    _, _, printed = made
    assert printed["train"]["step"] == 4 and 0 < printed["train"]["loss"] < 100
    assert 0.3 < printed["evaluate"]["davis_jf"] <= 1, "colours alone follow the square, masks that stay away score 0"


def test_the_registered_version_answers_without_the_package_and_embed_uses_it(made):
    folder, environment, printed = made
    assert printed["register"]["name"] == "kinema-toy" and printed["register"]["champion"]
    script = (
        "import mlflow, numpy as np, sys; model = mlflow.pyfunc.load_model('models:/kinema-toy@champion');"
        "found = model.predict(np.zeros((1, 8, 8, 3), np.uint8)); assert 'toy_model' not in sys.modules;"
        "print(found['y_dec'].shape)"
    )
    alone = {k: v for k, v in environment.items() if k not in ("PYTHONPATH", "KINEMA_MODELS")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=alone, cwd=folder / "davis", capture_output=True, text=True
    )
    assert done.stdout.strip() == "(1, 16, 8, 8)", done.stderr
    samples = Artifact.read(folder / "features").samples()
    assert samples.num_rows == 3 and len(samples["y_dec_mean"][0]) == 16


# Commands in one process, since each start imports for seconds; prints status, stdout and stderr of each.
SEVERAL = """
import contextlib, io, json, sys
from kinema.pipelines import cli
said = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(arguments)
        except SystemExit as end:
            status = end.code
    said.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(said))
"""


def test_help_and_refusals_know_it(made):
    folder, environment, _ = made
    commands = [
        ["train", "--help"],
        ["train", "model=toy", "toy.width=0", "clips=clips", "flow=flow", "out=other"],
        ["train", "model=toy", "toy.widht=3"],
    ]
    command = [sys.executable, "-c", SEVERAL, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    help_text, wrong, near = json.loads(done.stdout)
    assert help_text[0] in (None, 0) and "toy.width=8" in help_text[1]
    assert wrong[0] == 2 and "toy.width=0 is out of range" in wrong[2]
    assert near[0] == 2 and "did you mean toy.width" in near[2]
    without = subprocess.run(
        [sys.executable, "-m", "kinema.pipelines.cli", "train", "model=toy"],
        env=environment | {"KINEMA_MODELS": ""},
        capture_output=True,
        text=True,
    )
    assert without.returncode == 2 and "model=toy is not known" in without.stderr
    missing = subprocess.run(
        [sys.executable, "-m", "kinema.pipelines.cli", "train", "model=toy"],
        env=environment | {"KINEMA_MODELS": "no_such_module"},
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 2 and "KINEMA_MODELS=no_such_module" in missing.stderr
