"""A small recipe and an in-memory loader: the whole training path without videos."""

import copy
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from kinema.configs import TrainConfig
from kinema.pipelines.train.loop import TrainJob, rank_batch_size, train_worker
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.recipes.protocol import Loss
from kinema.pipelines.train.stop import Stop

NUM_SAMPLES = 23
WIDTH = 5


class ToyModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.online = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.average = copy.deepcopy(self.online).requires_grad_(False)
        self.alias = self.online


class ToyRecipe:
    """Regression; dropout and input noise draw from every generator. Samples with a negative weight do not count."""

    needs = ()

    def __init__(self, noise: float = 0.1, nan_at_key: str = "", slow_s: float = 0.0):
        self.noise, self.nan_at_key, self.slow_s = noise, nan_at_key, slow_s

    def build(self) -> ToyModule:
        module = ToyModule()
        if not self.noise:
            module.online[2].p = 0.0
        return module

    def read_sample(self, clip, rng):
        raise NotImplementedError

    def loss(self, module, batch) -> Loss:
        time.sleep(self.slow_s)
        drawn = random.random() + np.random.rand() + torch.rand(()).item()
        x = module.frozen(batch["x"] + self.noise * drawn)
        error = (module.online(x)[:, 0] - batch["y"]).square()
        counts = batch["weight"] > 0
        if self.nan_at_key in batch["key"]:
            error = error * float("nan")
        number = counts.sum()
        mean = torch.where(counts, error, 0.0).sum() / number.clamp(min=1)
        return Loss(mean, number, {"error_again": mean.detach()})

    def after_step(self, module, step: int) -> None:
        with torch.no_grad():
            for mean, now in zip(module.average.parameters(), module.online.parameters(), strict=True):
                mean.lerp_(now, 0.1)

    def pictures(self, module, batch):
        assert not module.training
        torch.rand(3), np.random.rand(3)
        return {"input": np.full((4, 6, 3), 7, np.uint8)}

    def published_model(self, tensors, ema=True):
        raise NotImplementedError

    def export(self, model):
        raise NotImplementedError


class StopAt(ToyRecipe):
    """Asks for the end once step `at` is done."""

    def __init__(self, at: int, stop: Stop):
        super().__init__()
        self.at, self.stop = at, stop

    def after_step(self, module, step):
        super().after_step(module, step)
        if step == self.at:
            self.stop.request("test")


class MemoryLoader:
    """Batches in an order given by (seed, epoch), striped over ranks; the position counts samples of all ranks."""

    def __init__(self, batch_size: int, seed: int, place: Place, skipped: tuple[int, ...] = ()):
        self.batch_size, self.seed, self.place, self.skipped = batch_size, seed, place, skipped
        self.epoch = self.consumed = 0
        self.closed = False

    def __iter__(self):
        generator = np.random.default_rng(0)
        x = torch.from_numpy(generator.normal(size=(NUM_SAMPLES, WIDTH))).float()
        y = x.sum(1).sin()
        together = self.batch_size * self.place.world_size
        while True:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(NUM_SAMPLES)
            while self.consumed + together <= NUM_SAMPLES:
                picked = order[self.consumed : self.consumed + together][self.place.rank :: self.place.world_size]
                self.consumed += together
                weight = torch.tensor([0.0 if i in self.skipped else 1.0 for i in picked])
                keys = [f"sample{i}" for i in picked]
                yield {"x": x[picked], "y": y[picked], "weight": weight, "key": keys}
            self.epoch, self.consumed = self.epoch + 1, 0

    def state_dict(self):
        return {"epoch": self.epoch, "samples_consumed": self.consumed}

    def load_state_dict(self, state):
        self.epoch, self.consumed = state["epoch"], state["samples_consumed"]

    def stats(self):
        return {"skipped": {"too dark": 2}}

    def close(self):
        self.closed = True


class MakeLoader:
    """Picklable factory, as the ranks get it."""

    def __init__(self, config: TrainConfig, skipped: tuple[int, ...] = ()):
        self.config, self.skipped = config, skipped

    def __call__(self, place: Place) -> MemoryLoader:
        return MemoryLoader(rank_batch_size(self.config, place.world_size), self.config.seed, place, self.skipped)


def toy_job(run: Path, config: TrainConfig, recipe: ToyRecipe | None = None, skipped=(), identity=None) -> TrainJob:
    """A job over the toy data that logs to files only."""
    return TrainJob(
        config=config,
        recipe=recipe or ToyRecipe(),
        make_loader=MakeLoader(config, skipped),
        run=run,
        identity=identity or {"lr": config.lr},
    )


SKIPPED_IN_RANKS = (1, 2, 3, 5, 8, 13)


def one_rank(rank: int, folder: Path, cfg: TrainConfig) -> None:
    """One of two ranks without Ray; here, since a process that is spawned imports the module of its function."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    train_worker(toy_job(folder, cfg, ToyRecipe(noise=0), SKIPPED_IN_RANKS), Place(rank, 2), Stop())
    dist.destroy_process_group()
