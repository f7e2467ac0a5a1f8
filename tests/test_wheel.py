"""What a built wheel holds: kinema and nothing else; and that it works where nothing else of ours is."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("models", "kernels", "pipelines", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    pytest.importorskip("build", reason="the package `build` is not installed; run make env")
    copy = tmp_path_factory.mktemp("wheel") / "source"
    copy.mkdir()
    without = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*PARTS, "src"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=without)
    for name in ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md"):
        shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy.parent), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = copy.parent.glob("kinema-*.whl")
    return zipfile.ZipFile(found)


HUB = """
import sys, torch, kinema
assert kinema.__file__.startswith(sys.prefix), kinema.__file__
network = torch.hub.load(sys.argv[1], "raft_small", source="local", pretrained=False)
flow = network(torch.rand(1, 3, 128, 136), torch.rand(1, 3, 128, 136), iters=2)
assert flow.shape == (1, 2, 128, 136) and flow.isfinite().all()
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_installed_wheel_runs_the_demo_and_a_hub_call(wheel, tmp_path):
    """In an environment of its own, from an empty folder."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["-c", str(ROOT / "constraints.txt"), wheel.filename]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode and "No matching distribution" in done.stderr and "kinema" not in done.stderr:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]

    place = tmp_path / "empty"
    place.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    given = {"cwd": place, "env": environment, "capture_output": True, "text": True}
    few = ["train.steps=4", "train.batch_size=2", "train.checkpoint_every=4", "teach.stride=24"]
    demo = subprocess.run([python.with_name("kinema"), "demo", "flowfeat", "--json", "workspace=demo", *few], **given)
    assert demo.returncode == 0, demo.stderr[-3000:]
    summary = json.loads(demo.stdout.splitlines()[-1])
    assert set(summary["stages"].values()) == {"done"} and Path(summary["report"]).is_file()

    hub = tmp_path / "hub"  # as torch.hub unpacks it, without the package's own folders: the wheel's are used
    hub.mkdir()
    shutil.copyfile(ROOT / "hubconf.py", hub / "hubconf.py")
    called = subprocess.run([python, "-c", HUB, str(hub)], **given)
    assert called.returncode == 0, called.stderr[-3000:]


def test_a_wheel_holds_only_kinema(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert len(tops) == 2 and "kinema" in tops
    assert any(name.startswith("kinema-") and name.endswith(".dist-info") for name in tops)
    assert not [name for name in wheel.namelist() if "test" in name.lower() or "__pycache__" in name]


def test_a_wheel_holds_every_source_and_config_as_a_real_file(wheel):
    held = set(wheel.namelist())
    for part in PARTS:
        kinds = ("*.py", "*.yaml", "*.html", "*.js", "*.css")
        for path in sorted(path for kind in kinds for path in (ROOT / part).rglob(kind)):
            name = f"kinema/{path.relative_to(ROOT).as_posix()}"
            assert name in held, name
            assert wheel.read(name) == path.read_bytes(), name


def test_a_wheel_is_typed_and_carries_the_licences_of_others(wheel):
    held = wheel.namelist()
    assert "kinema/py.typed" in held
    (notices,) = [name for name in held if name.endswith("THIRD_PARTY.md")]
    assert wheel.read(notices) == (ROOT / "THIRD_PARTY.md").read_bytes()
    (metadata,) = [name for name in held if name.endswith("METADATA")]
    text = wheel.read(metadata).decode()
    for line in ("Provides-Extra: gpu", "Classifier: Typing :: Typed", "Keywords: optical flow", "Author: The kinema"):
        assert line in text, line


def test_a_wheel_has_the_command_line(wheel):
    (entries,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "kinema = kinema.pipelines.cli:entry" in wheel.read(entries).decode()
