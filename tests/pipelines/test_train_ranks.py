"""Several ranks: against one rank, on Ray Train, with a rank killed, with the driver stopped."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ray import cloudpickle
from ray.exceptions import ActorDiedError

from kinema.configs import TrainConfig
from kinema.pipelines import engine
from kinema.pipelines.errors import StageError
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.exchange import FolderExchange
from kinema.pipelines.train.launch import _rank_main, launch
from kinema.pipelines.train.loop import train_worker
from kinema.pipelines.train.meter import read_metrics
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.stop import Stop

sys.path.insert(0, str(Path(__file__).parent))
import toy_training
from toy_training import SKIPPED_IN_RANKS as SKIPPED
from toy_training import ToyRecipe, toy_job


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As on the ranks, for equal bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes) -> TrainConfig:
    defaults = dict(
        steps=10, batch_size=4, lr=0.01, checkpoint_every=3, log_every=2, pictures_every=0, seed=3, clip_norm=1.0,
        num_workers=2, cpus_per_worker=0.5, use_gpu="no",
    )  # fmt: skip
    return TrainConfig(**(defaults | changes))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """An undisturbed run of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    mp.start_processes(toy_training.one_rank, (folder, config()), nprocs=2, start_method="spawn")
    return folder


def tensors(run: Path) -> dict:
    return checkpoint.read_tensors(checkpoint.latest_checkpoint(run))


def test_two_ranks_equal_one(two_ranks, tmp_path):
    """Same global batches, unequal numbers of counted samples on the ranks: same model to float rounding."""
    train_worker(toy_job(tmp_path, config(num_workers=1), ToyRecipe(noise=0), SKIPPED), Place(), Stop())
    one, two = tensors(tmp_path), tensors(two_ranks)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-6, rtol=1e-5)
    for a, b in zip(read_metrics(tmp_path), read_metrics(two_ranks), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["samples_not_counted"] == b["samples_not_counted"]


class Killed(ToyRecipe):
    """Rank 1 is killed once, in step 7."""

    def __init__(self, marker: Path):
        super().__init__(noise=0)
        self.marker, self.calls = marker, 0

    def after_step(self, module, step):
        super().after_step(module, step)
        if step == 7 and dist.get_rank() == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_nothing_changes(ray_session, two_ranks, tmp_path):
    cloudpickle.register_pickle_by_value(toy_training)
    try:
        finished = launch(toy_job(tmp_path, config(), Killed(tmp_path / "marker"), SKIPPED))
    finally:
        cloudpickle.unregister_pickle_by_value(toy_training)
    assert (tmp_path / "marker").exists() and finished.step == 10
    killed, undisturbed = checkpoint.latest_checkpoint(tmp_path), checkpoint.latest_checkpoint(two_ranks)
    name = "model.safetensors"
    assert (killed / name).read_bytes() == (undisturbed / name).read_bytes()
    losses = [[(p["step"], p["loss"]) for p in read_metrics(run)] for run in (tmp_path, two_ranks)]
    assert losses[0] == losses[1]
    assert not (tmp_path / "_ranks").exists()


@pytest.mark.slow
def test_a_failure_of_the_training_itself_is_not_tried_again(ray_session, tmp_path):
    cloudpickle.register_pickle_by_value(toy_training)
    job = toy_job(tmp_path, config(max_failures=3), ToyRecipe(nan_at_key="sample7"))
    started = time.monotonic()
    try:
        with pytest.raises(StageError, match="loss is nan at step"):
            launch(job)
    finally:
        cloudpickle.unregister_pickle_by_value(toy_training)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "error, is_final", [(ActorDiedError(), False), (ConnectionError("closed by peer"), False), (KeyError("loss"), True)]
)
def test_what_ends_a_rank_whose_group_is_ended_is_worth_another_start(tmp_path, monkeypatch, error, is_final):
    """Ray Train ends its own actors when a rank is lost; the others see that as an error of theirs."""

    def fail(*_):
        raise error

    monkeypatch.setattr(ray.train, "get_context", lambda: types.SimpleNamespace(get_world_rank=int, get_world_size=int))
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setitem(_rank_main.__globals__, "train_worker", fail)
    messages = FolderExchange(tmp_path)
    with pytest.raises(type(error)):
        _rank_main({"job": toy_job(tmp_path / "run", config()), "messages": messages})
    assert (messages.get("failed.json") is not None) == is_final


def test_more_ranks_than_cpus_is_said_before_waiting(tmp_path, monkeypatch):
    """Said from what the cluster has; the tests of engine ask Ray itself."""
    monkeypatch.setattr(engine, "connect", lambda **_: {"CPU": 2.0})
    monkeypatch.delenv("KINEMA_ENGINE", raising=False)
    with pytest.raises(ValueError, match=r"num_workers=8 with 1 CPU each needs 8 CPU, Ray has 2"):
        launch(toy_job(tmp_path, config(num_workers=8, batch_size=8, cpus_per_worker=1.0)))


DRIVER = """
import sys
from pathlib import Path
from ray import cloudpickle
import toy_training
from kinema.configs import TrainConfig
from kinema.pipelines.train.launch import _rank_main, launch
cloudpickle.register_pickle_by_value(toy_training)
config = TrainConfig(**eval(sys.argv[2]))
recipe = toy_training.ToyRecipe(noise=0, slow_s=0.5)
finished = launch(toy_training.toy_job(Path(sys.argv[1]), config, recipe, toy_training.SKIPPED_IN_RANKS))
print("stopped by", finished.stopped, "at", finished.step)
"""


@pytest.mark.slow
def test_sigterm_to_the_driver_saves_and_ends(tmp_path, two_ranks):
    """As `ray job stop` does it: SIGTERM, three seconds, SIGKILL. What is saved goes on to the same end."""
    settings = {
        f: getattr(config(), f) for f in "steps batch_size lr checkpoint_every log_every seed clip_norm".split()
    }
    settings |= {"pictures_every": 0, "num_workers": 2, "cpus_per_worker": 0.5, "use_gpu": "no"}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "RAY_AUTH_TOKEN": "0" * 64}
    environment.pop("RAY_ADDRESS", None)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), repr(settings)], env=environment, stdout=subprocess.PIPE
    )
    progress = tmp_path / "progress.json"
    deadline = time.monotonic() + 240  # Ray's start on a busy machine, nothing of ours
    while not progress.exists() or json.loads(progress.read_text())["step"] < 4:
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    driver.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    while checkpoint.read_meta(checkpoint.latest_checkpoint(tmp_path))["step"] < 4:
        assert time.monotonic() - signalled < 2.5
        time.sleep(0.05)
    out, _ = driver.communicate(timeout=60)
    assert driver.returncode == 0 and b"stopped by SIGTERM" in out
    mp.start_processes(toy_training.one_rank, (tmp_path, config()), nprocs=2, start_method="spawn")
    same = [(checkpoint.latest_checkpoint(r) / "model.safetensors").read_bytes() for r in (tmp_path, two_ranks)]
    assert same[0] == same[1]
