"""Fixtures that every test may use: the parity goldens, the real data, and checked shapes."""

import contextlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

REPO_ROOT = Path(__file__).resolve().parents[1]
PARITY_ROOT = REPO_ROOT / "tests" / "parity"

# Processes that tests spawn import their functions as tests.pipelines.X. Last in the path, so that the folders
# `models` and `kernels` beside it shadow nothing.
sys.path.append(str(REPO_ROOT))

# Parallel test runs set OMP_NUM_THREADS: threads that outnumber the cores wait for one another.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# Shapes in jaxtyping annotations are checked while tests run. The hook works on modules that are
# imported after it, so it stays here, in front of every test module.
# An int is accepted where a float is annotated, as everywhere in Python.
_checker = ModuleType("shape_checker")
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules["shape_checker"] = _checker
install_import_hook(["kinema.models", "kinema.kernels"], "shape_checker.check")


def _load_fill() -> ModuleType:
    """tests/parity/fill.py as a module; it is a file to run with, not part of any package."""
    if "parity_fill" not in sys.modules:
        spec = importlib.util.spec_from_file_location("parity_fill", PARITY_ROOT / "fill.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["parity_fill"] = module
        spec.loader.exec_module(module)
    return sys.modules["parity_fill"]


@pytest.fixture(scope="session")
def fill() -> ModuleType:
    """The module that draws weights and inputs: `fill.fill_(net, seed, manifest)`, `fill.image(...)`."""
    return _load_fill()


@pytest.fixture(scope="session")
def golden():
    """`golden("raft__s0_128x160")`: reference arrays; `.check(name, value, atol, rtol)`, `.meta`, `.data`."""
    return lambda name: _load_fill().Golden(str(PARITY_ROOT / "goldens" / f"{name}.npz"))


@pytest.fixture(scope="session")
def manifest():
    """`manifest("raft")`: the state-dict contract of a published model, as a dictionary."""
    return lambda name: _load_fill().load_manifest(PARITY_ROOT / "manifests" / f"{name}.json")


@pytest.fixture(scope="session")
def assert_state_matches():
    """`assert_state_matches(net, manifest)`: names, shapes and dtypes equal the published state dict's."""

    def check(net: torch.nn.Module, expected: dict) -> None:
        state = net.state_dict()
        assert set(state) == set(expected["tensors"])
        found = {k: {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")} for k, v in state.items()}
        wanted = {k: {"shape": v["shape"], "dtype": v["dtype"]} for k, v in expected["tensors"].items()}
        assert found == wanted

    return check


@pytest.fixture(scope="session")
def normalised_image(fill):
    """`normalised_image(seed, name, batch, height, width)`: a smooth picture in ImageNet statistics."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return lambda *arguments, **options: (fill.image(*arguments, **options) - mean) / std


@pytest.fixture(scope="session")
def tiny_video_base(tmp_path_factory) -> Path:
    """Folder of a tiny CogVideoX with random weights, as diffusers writes it."""
    pytest.importorskip("diffusers", reason="the extra `transfer` is not installed")
    from tests.tiny_video_model import write_base

    return write_base(tmp_path_factory.mktemp("video_base") / "base")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real videos, flow ground truth, DAVIS samples and weights, beside the checkout."""
    folder = REPO_ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: this test needs the real data kept beside the checkout")
    return folder


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory):
    """`migrated_store()`: an MLflow database in SQLite with all tables and nothing in them, made at the first call.

    MLflow takes 2.5 s of processor time for its migrations, and most tests that train need a database of their own.
    """
    made = tmp_path_factory.mktemp("migrated") / "mlflow.db"

    def path() -> Path:
        if not made.exists():
            from mlflow import db

            db.commands.main(["upgrade", f"sqlite:///{made}"], standalone_mode=False)
        return made

    return path


@pytest.fixture(scope="session", autouse=True)
def new_stores_are_copies(migrated_store):
    """New databases of this process begin as copies; tests/pipelines/test_tracking_first_use.py has them made anew."""
    from kinema.pipelines import tracking

    alone = tracking._one_process

    @contextlib.contextmanager
    def with_tables(database: Path | None):
        with alone(database):
            if database is not None and (not database.exists() or database.stat().st_size == 0):
                shutil.copyfile(migrated_store(), database)
            yield

    tracking._one_process = with_tables
    yield
    tracking._one_process = alone
