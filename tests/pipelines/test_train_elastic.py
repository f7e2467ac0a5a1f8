"""Ranks that come and go: killed at random steps, and runs that go on with another number of them."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ray import cloudpickle

from kinema.configs import TrainConfig
from kinema.pipelines.errors import StageError
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.launch import launch
from kinema.pipelines.train.loop import train_worker
from kinema.pipelines.train.meter import read_metrics
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.stop import Stop

sys.path.insert(0, str(Path(__file__).parent))
import toy_training
from chaos import note
from toy_training import ToyRecipe, toy_job

STEPS = 12


@pytest.fixture(autouse=True)
def one_thread():
    """As on the ranks, for equal bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes) -> TrainConfig:
    defaults = dict(
        steps=STEPS, batch_size=4, lr=0.01, checkpoint_every=3, log_every=1, pictures_every=0, seed=3, num_workers=2,
        cpus_per_worker=0.5, use_gpu="no",
    )  # fmt: skip
    return TrainConfig(**(defaults | changes))


class Noted(ToyRecipe):
    """Every rank notes down which samples each step saw."""

    def __init__(self, folder: Path):
        super().__init__(noise=0)
        self.folder, self.keys = folder, []

    def loss(self, module, batch):
        self.keys += batch["key"]
        return super().loss(module, batch)

    def after_step(self, module, step):
        super().after_step(module, step)
        rank = dist.get_rank() if dist.is_initialized() else 0
        (self.folder / f"{step:04d}-{rank}.json").write_text(json.dumps(self.keys))
        self.keys = []


def samples_of_steps(folder: Path) -> list[list[str]]:
    steps: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.json")):
        steps.setdefault(path.name[:4], []).extend(json.loads(path.read_text()))
    return [sorted(keys) for _, keys in sorted(steps.items())]


def one_rank(rank: int, world: int, run: Path, notes: Path, steps: int, changes: dict | None = None) -> None:
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(str(run / f"rendezvous-{steps}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    settings = config(**{**(changes or {}), "steps": steps, "num_workers": world})
    train_worker(toy_job(run, settings, Noted(notes)), Place(rank, world), Stop())
    if world > 1:
        dist.destroy_process_group()


def train(run: Path, plan: list[tuple[int, int]], **changes) -> list[list[str]]:
    """Args: plan, (ranks, step at which they end), one after the other; changes, of the settings."""
    notes = run / "notes"
    notes.mkdir(parents=True)
    for world, steps in plan:
        if world == 1:
            one_rank(0, 1, run, notes, steps, changes)
            continue
        mp.start_processes(one_rank, (world, run, notes, steps, changes), nprocs=world, start_method="fork")
    return samples_of_steps(notes)


def weights(run: Path) -> dict:
    return checkpoint.read_tensors(checkpoint.latest_checkpoint(run))


@pytest.mark.parametrize(
    "plan",
    [[(2, 4), (1, STEPS)], pytest.param([(1, 3), (2, 4), (4, 9), (2, STEPS)], marks=pytest.mark.slow)],
    ids=["2-1", "1-2-4-2"],
)
def test_another_number_of_ranks_sees_the_same_samples_in_the_same_steps(tmp_path, plan):
    """Against one rank all along: the loader cuts each global batch, whoever reads it."""
    calm = train(tmp_path / "calm", [(1, STEPS)])
    elastic = train(tmp_path / "elastic", plan)
    assert len(calm) == STEPS and all(len(keys) == 4 for keys in calm)
    assert elastic == calm
    ours, theirs = weights(tmp_path / "elastic"), weights(tmp_path / "calm")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=3e-6, rtol=2e-5)


def test_ranks_that_do_not_divide_the_batch_are_refused_before_a_node_is_lost():
    with pytest.raises(ValueError, match="batch_size=8 does not divide among 3 ranks"):
        config(batch_size=8, num_workers=4, min_workers=2)
    with pytest.raises(ValueError, match="min_workers=3 is out of range: use 1 to num_workers=2"):
        config(min_workers=3)
    config(batch_size=12, num_workers=4, min_workers=1)


class Killed(ToyRecipe):
    """One rank is killed once, in one step."""

    def __init__(self, marker: Path, step: int, rank: int):
        super().__init__(noise=0)
        self.marker, self.step, self.rank = marker, step, rank

    def after_step(self, module, step):
        super().after_step(module, step)
        if (step, dist.get_rank()) == (self.step, self.rank) and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def toys_travel(ray_session):
    cloudpickle.register_pickle_by_value(toy_training)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(toy_training)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.chaos
@pytest.mark.timeout(1500)
def test_a_rank_killed_at_a_random_step_changes_no_bit_five_times(toys_travel, tmp_path):
    calm = tmp_path / "calm"
    train(calm, [(2, STEPS)])
    seed = secrets.randbits(32)
    print(f"chaos seed {seed}")
    rng = random.Random(seed)
    for number in range(5):
        run, step, rank = tmp_path / str(number), rng.randint(1, STEPS - 1), rng.randrange(2)
        run.mkdir()
        marker = tmp_path / f"marker-{number}"
        finished = launch(toy_job(run, config(), Killed(marker, step, rank)))
        print(f"rank {rank} killed in step {step}")
        assert marker.exists() and finished.step == STEPS
        found = [checkpoint.latest_checkpoint(one) / "model.safetensors" for one in (run, calm)]
        assert found[0].read_bytes() == found[1].read_bytes()
        losses = [[(point["step"], point["loss"]) for point in read_metrics(one)] for one in (run, calm)]
        assert losses[0] == losses[1]
        note("ray", "train", "kill -9 of a worker (a rank, in a step)", "identical")


class Disturbed(ToyRecipe):
    """A gradient that is NaN in one step, once; a marker when another step is done."""

    def __init__(self, folder: Path, nan_at: int, told_at: int):
        super().__init__(noise=0, slow_s=0.05)
        self.folder, self.nan_at, self.told_at = folder, nan_at, told_at
        self.step = 0

    def loss(self, module, batch):
        found = super().loss(module, batch)
        if self.step == self.nan_at and not (self.folder / "told").exists() and found.value.requires_grad:
            found.value.register_hook(lambda gradient: gradient * float("nan"))
        return found

    def after_step(self, module, step):
        super().after_step(module, step)
        self.step = step
        if step == self.told_at:
            (self.folder / "told").touch()


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_gradients_that_are_nan_and_a_driver_that_is_told_to_end(toys_travel, tmp_path):
    """An end in one line, an end with a checkpoint, and then the rest: the undisturbed run's bits."""
    calm, run = tmp_path / "calm", tmp_path / "run"
    train(calm, [(2, STEPS)])
    run.mkdir()
    with pytest.raises(StageError, match="gradient norm is nan at step 4"):
        launch(toy_job(run, config(), Disturbed(tmp_path, 4, 99)))
    assert checkpoint.latest_checkpoint(run).name == "step_00000003"

    def stop_when_told():
        while not (tmp_path / "told").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_told, daemon=True).start()
    stopped = launch(toy_job(run, config(), Disturbed(tmp_path, 99, 7)))
    assert stopped.stopped == "SIGTERM" and 7 <= stopped.step < STEPS
    assert launch(toy_job(run, config(), ToyRecipe(noise=0))).step == STEPS
    found = [checkpoint.latest_checkpoint(one) / "model.safetensors" for one in (run, calm)]
    assert found[0].read_bytes() == found[1].read_bytes()
    note("ray", "train", "NaN gradients", "clear error, then identical")
    note("ray", "train", "SIGTERM of the driver", "a checkpoint, then identical")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_train_goes_on_with_as_many_ranks_as_there_is_room_for(toys_travel, tmp_path):
    """Four ranks are wanted, two fit."""
    run, notes = tmp_path / "run", tmp_path / "notes"
    run.mkdir(), notes.mkdir()
    wanted = config(num_workers=4, min_workers=1, batch_size=12, cpus_per_worker=1.0, steps=3)
    assert launch(toy_job(run, wanted, Noted(notes))).step == 3
    assert len(list(notes.glob("0003-*.json"))) == 2
    assert all(len(keys) == 12 for keys in samples_of_steps(notes))
