"""The training loop, one for every model: pictures, save, stop, step, log.

It runs on each rank and knows nothing of Ray: tests call it in their own process. What differs between models
is the recipe (`recipes/`); how ranks work together is in `parallel.py`.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinema.configs import TrainConfig
from kinema.configs.load import to_mapping
from kinema.configs.models.table import MODELS
from kinema.pipelines.errors import StageError
from kinema.pipelines.pictures.images import write_png
from kinema.pipelines.precision import autocast, choose, tf32_for_the_rest
from kinema.pipelines.tracking import PENDING_FILE, RunHandle, Tracker
from kinema.pipelines.train import checkpoint as checkpoints
from kinema.pipelines.train import compiled
from kinema.pipelines.train.feed import Feed
from kinema.pipelines.train.meter import MEASURES_FILE, MetricsFile, ProgressFile, StepSums, Window, memory_mb
from kinema.pipelines.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from kinema.pipelines.train.parallel import (
    Place,
    gradient_norm,
    module_tensors,
    replicate,
    same_on_all_ranks,
    scale_gradients,
    seed_step,
    without_sync,
)
from kinema.pipelines.train.recipes.protocol import Batch, Recipe
from kinema.pipelines.train.sharded import load_parts, shard
from kinema.pipelines.train.stop import Notice, Stop

MAX_EMPTY_STEPS = 10
_NO_LONGER_RECORDED = frozenset({"dismo.compile", "transfer.compile"})


@dataclass(frozen=True)
class TrainJob:
    """Everything a rank needs; pickled to it."""

    config: TrainConfig
    recipe: Recipe
    make_loader: Callable[[Place], Any]
    """Called on each rank; the loader yields batches of `rank_batch_size(config, world_size)` samples."""
    run: Path
    identity: dict[str, Any]
    """What a checkpoint must agree on to be continued: settings and hashes of the data."""
    tracking: RunHandle | None = None
    """MLflow run that rank 0 logs to."""
    url: str = ""
    """Where the run is kept, when its ranks share no folder: each then has its own `run`."""
    held_out: Callable[[], Any] | None = None
    """Called on rank 0 for the clips that `recipe.measure` looks at, where `config.measure_every` asks for it."""


@dataclass(frozen=True)
class Finished:
    """How a rank ended."""

    step: int
    loss: float
    samples_per_second: float
    stopped: str | None
    """Why it ended before the last step, if it did."""


def rank_batch_size(config: TrainConfig, world_size: int) -> int:
    """Samples of one optimizer step on one rank.

    Raises: ValueError if the global batch does not divide; names the nearest sizes that do.
    """
    parts = world_size * config.accumulate
    if config.batch_size % parts:
        below = config.batch_size // parts * parts
        sizes = f"{below} or {below + parts}" if below else f"{parts}"
        name = f"world_size={world_size}"
        if config.accumulate > 1:
            name += f" * accumulate={config.accumulate}"
        raise ValueError(f"train.batch_size={config.batch_size} is not divisible by {name}; use {sizes}")
    return config.batch_size // world_size


def train_worker(job: TrainJob, place: Place, stop: Stop, notice: Notice | None = None) -> Finished:
    """Train to `config.steps` from the newest complete checkpoint, or to a request to stop.

    A notice that machines will be taken away brings checkpoints forward; the training goes on until they are.
    Raises: StageError for a loss or gradient that is not finite, and when nothing can be saved or learned from;
        ValueError if the newest checkpoint belongs to another config or other data.
    """
    config, recipe = job.config, job.recipe
    state = _State.create(job, place)
    if compiled.is_used(config.compile, recipe, place.device, state.sharded):
        compiled.compile_units(recipe, state.module)
    parallel = replicate(recipe, state.module, place, state.sharded)
    log = _Log(job, state) if place.rank == 0 else None
    takes_part = log is not None or state.sharded  # in pictures and checkpoints: of a shared out model, every rank
    # A stop is saved by a thread, at once, while the step that is under way goes on; see stop.py.
    # A sharded one takes all ranks, and waits for the end of the step.
    stop.watch(state.save if place.rank == 0 and not state.sharded else lambda: None)
    feed, batch = Feed(state.loader, place.device, config.copy_ahead, steps=config.steps - state.step), None
    started, first_step, empty_steps = time.perf_counter(), state.step, 0
    stopped = False
    try:
        while True:
            last = state.step >= config.steps
            if batch is not None and takes_part:
                _look(state, log, batch, last)
            if takes_part and (last or stopped or _due(state.step, config.checkpoint_every)):
                state.save()
            if last or stopped:
                break

            seed_step(config.seed, state.step, place.rank)
            batch, wait_s = feed.take()
            sums = _gradients(parallel, batch, config.accumulate, state.precision, place.device)
            feed.prepare()  # what was queued may still be at work: the sums wait for it
            asked = notice is not None and place.rank == 0 and notice.due
            num_samples, means, stopped, asked = sums.reduce(stop.requested, asked)
            if not math.isfinite(means["loss"]):
                raise StageError(_not_finite("loss", means["loss"], state.step, batch, place))
            if stopped:
                continue
            empty_steps = 0 if num_samples else empty_steps + 1
            if empty_steps > MAX_EMPTY_STEPS:
                raise StageError(_nothing_counts(empty_steps, state, batch))
            means["lr"] = learning_rate(config, state.step)
            # Ranks hold averages of sums over samples: this makes them the mean over all samples that count.
            scale_gradients(state.module, place.world_size / max(num_samples, 1.0))
            norm = gradient_norm(state.module).item()
            if not math.isfinite(norm):
                raise StageError(_not_finite("gradient norm", norm, state.step, batch, place))
            if config.clip_norm > 0 and norm > config.clip_norm:
                scale_gradients(state.module, config.clip_norm / norm)
            means["grad_norm"] = norm
            with state.lock:
                state.update(means, num_samples, wait_s, feed.position)
                point = log.step(state, means) if log else None
            if asked and notice is not None:
                began = time.monotonic()
                if notice.ask() and takes_part:
                    state.save()
                notice.answered(time.monotonic() - began)
            if log and point:
                log.send(point, state.step)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise StageError(f"disk full while writing {error.filename}: free space or set out= to another disk") from None
    finally:
        stop.close()
        state.loader.close()
        if log:
            log.close()
    rate = (state.step - first_step) * config.batch_size / max(time.perf_counter() - started, 1e-9)
    return Finished(state.step, state.loss, rate, (stop.reason or "another rank") if stopped else None)


def _gradients(parallel: nn.Module, batch: Batch, accumulate: int, precision: str, device: torch.device) -> StepSums:
    """Forward and backward passes of one step; gradients are left in the parameters. Returns: sums over its samples."""
    sums = StepSums()
    with compiled.failures_named(), tf32_for_the_rest(precision, device):
        for number, part in enumerate(split_batch(batch, accumulate), start=1):
            with without_sync(parallel, number < accumulate), autocast(precision, device):
                loss, count, metrics = parallel(part)
            (loss * count).backward()
            sums.add(loss, count, metrics)
    return sums


def _look(state: _State, log: _Log | None, batch: Batch, last: bool) -> None:
    """Pictures and measures, where they are due."""
    config = state.job.config
    if last or _due(state.step, config.pictures_every):
        made = state.pictures(batch)
        if log:
            log.pictures(state, made)
    if log and config.measure_every and (last or _due(state.step, config.measure_every)):
        log.measure(state)


class _State:
    """What a checkpoint holds, at the end of an optimizer step; the lock keeps a save from seeing half a step."""

    def __init__(self, job: TrainJob, place: Place, module: nn.Module, loader: Any):
        self.job, self.place, self.module, self.loader = job, place, module, loader
        # One rank alone holds everything, but writes what several can go on from.
        self.in_parts = job.config.sharding == "full"
        self.sharded = self.in_parts and place.world_size > 1
        if self.sharded:
            shard(job.recipe, module, place.device)
        self.optimizer = make_optimizer(module, job.config)
        # One for all ranks, whatever processors their machines have.
        self.precision = same_on_all_ranks(choose(job.config.precision, place.device, job.recipe), place)
        self.window = Window()
        self.step, self.loss, self.saved_step = 0, math.nan, -1
        self.position = loader.state_dict()
        self.lock = threading.Lock()
        self.started = time.perf_counter()
        self.steps_here = 0
        self.losses_since: list[float] = []

    @classmethod
    def create(cls, job: TrainJob, place: Place) -> _State:
        """From initialisation or from the newest checkpoint."""
        seed_step(job.config.seed, 0, 0)
        module = job.recipe.build().to(place.device)
        state = cls(job, place, module, job.make_loader(place))
        if place.rank == 0:
            checkpoints.sweep_partial(job.run)
        newest = checkpoints.latest_checkpoint(job.run)
        name = same_on_all_ranks("" if newest is None else newest.name, place)
        if name:
            state.restore(checkpoints.checkpoint_folder(job.run, name))
        return state

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint; ValueError names what differs and both values."""
        meta = checkpoints.read_meta(folder)
        refuse_other_identity(meta["identity"], self.job.identity, self.job.run)
        saved = checkpoints.read_state(folder)
        if self.in_parts:
            load_parts(folder, self.module, self.optimizer)
        else:
            self.module.load_state_dict(checkpoints.read_tensors(folder))
            self.optimizer.load_state_dict(saved["optimizer"])
        self.window.load_state_dict(saved["window"])
        self.loader.load_state_dict(saved["loader"])
        self.position = saved["loader"]
        if self.job.config.precision == "auto":  # as it began, on whichever machine
            before = "fp32" if self.place.device.type == "cpu" else self.precision  # of runs that did not note it
            self.precision = meta.get("precision", before)
        self.step, self.saved_step = meta["step"], meta["step"]
        self.loss = math.nan if meta["loss"] is None else meta["loss"]

    def update(self, means: dict[str, float], num_samples: float, wait_s: float, position: dict[str, Any]) -> None:
        """One optimizer step and everything that moves with it. Args: position, the loader's behind its batch."""
        set_learning_rate(self.optimizer, means["lr"])
        self.step += 1
        if num_samples:
            self.optimizer.step()
            self.job.recipe.after_step(self.module, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.position = position
        self.window.add(num_samples, means, wait_s)
        self.loss = means["loss"]
        self.losses_since.append(self.loss)
        self.steps_here += 1

    def save(self) -> None:
        """Write a checkpoint of the last finished step, unless it is there."""
        with self.lock:
            if self.saved_step == self.step:
                return
            state = {
                "loader": self.position,
                "window": self.window.state_dict(),
                # Every step seeds its own generators from these two; there is no other state to keep.
                "random": {"seed": self.job.config.seed, "step": self.step},
            }
            run, meta, config = self.job.run, self.meta(), self.job.config
            kept = {"keep": config.keep_checkpoints, "best": config.keep_best}
            if self.in_parts:
                checkpoints.save_sharded_checkpoint(run, self.step, self.module, self.optimizer, state, meta, **kept)
            else:
                state["optimizer"] = self.optimizer.state_dict()
                checkpoints.save_checkpoint(run, self.step, module_tensors(self.module), state, meta, **kept)
            self.saved_step = self.step
            self.losses_since = []

    def pictures(self, batch: Batch) -> dict[str, Any]:
        """What the model sees and says."""
        self.module.eval()
        with torch.no_grad(), autocast(self.precision, self.place.device), compiled.as_written():
            made = self.job.recipe.pictures(self.module, batch)
        self.module.train()
        return made

    def meta(self) -> dict[str, Any]:
        """What a reader of the checkpoint wants to know without loading it."""
        rate = self.steps_here * self.job.config.batch_size / max(time.perf_counter() - self.started, 1e-9)
        return {
            "loss": self.loss,
            "mean_loss": sum(self.losses_since) / len(self.losses_since) if self.losses_since else None,
            "samples_per_second": rate,
            "precision": self.precision,
            "identity": self.job.identity,
            "train_config": to_mapping(self.job.config),
        }


def refuse_other_identity(found: dict[str, Any], wanted: dict[str, Any], run: Path) -> None:
    """ValueError naming every setting in which a run's checkpoint and this run differ.

    Runs of earlier versions also recorded the settings of the models that they did not train, and whether layers were
    compiled.
    """
    used = MODELS[wanted["model"]].section if "model" in wanted else ""
    unused = set(MODELS.sections()) - {used}
    compared = sorted(name for name in {*found, *wanted} if name.partition(".")[0] not in unused)
    compared = [name for name in compared if name not in _NO_LONGER_RECORDED]
    names = [name for name in compared if found.get(name) != wanted.get(name)]
    if names:
        list_ = "; ".join(f"{n}: {found.get(n)!r} in the checkpoint, {wanted.get(n)!r} now" for n in names)
        raise ValueError(f"out={run} was trained with other settings ({list_}); use them, or another out=")


class _Log:
    """Rank 0's reporting: metrics file, progress, MLflow, pictures. None of it can end the training."""

    def __init__(self, job: TrainJob, state: _State):
        self.job = job
        self.metrics = MetricsFile(job.run, state.step)
        measures = bool(job.config.measure_every) and job.held_out is not None
        self.measures = MetricsFile(job.run, state.step, MEASURES_FILE) if measures else None
        self.held_out = job.held_out() if measures and job.held_out else None
        self.progress = ProgressFile(job.run)
        self.tracker = Tracker.attach(job.tracking, job.run / PENDING_FILE) if job.tracking else None
        state.window.started = time.perf_counter()
        self.batch_size = job.config.batch_size
        self.steps_before = state.window.steps

    def step(self, state: _State, means: dict[str, float]) -> dict[str, float] | None:
        """After every step; a metric point is written, and returned, at every `log_every` steps and at the end."""
        last = state.step >= self.job.config.steps
        self.progress.update(state.step, means["loss"], last)
        if not (last or _due(state.step, self.job.config.log_every)):
            return None
        window = state.window
        elapsed = max(time.perf_counter() - window.started, 1e-9)
        steps_here = window.steps - self.steps_before
        values = window.means() | {
            "samples_per_second": steps_here * self.batch_size / elapsed,
            "step_time_s": elapsed / max(steps_here, 1),
            "data_wait_share": min(window.wait_s / elapsed, 1.0),
            "samples_not_counted": window.steps * self.batch_size - window.samples,
            **memory_mb(state.place.device),
            **_skips(state.loader),
        }
        self.metrics.write(state.step, values)
        window.reset()
        self.steps_before = 0
        return values

    def send(self, point: dict[str, float], step: int) -> None:
        """A metric point to MLflow; does not wait for it."""
        if self.tracker:
            self.tracker.log_metrics(point, step)

    def pictures(self, state: _State, made: dict[str, Any]) -> None:
        """Pictures as PNG in the run folder and in MLflow."""
        for name, picture in made.items():
            path = self.job.run / "pictures" / f"{name}_{state.step:08d}.png"
            write_png(path, picture)
            if self.tracker:
                self.tracker.log_file_later(path, "pictures")

    def measure(self, state: _State) -> None:
        """What held-out clips say of the model, in measures.jsonl and in MLflow."""
        if self.measures is None:
            return
        state.module.eval()
        with torch.no_grad(), autocast(state.precision, state.place.device), compiled.as_written():
            measured: Any = self.job.recipe  # `measure` is there only in some, as `_check` of train/ has seen
            values = measured.measure(state.module, self.held_out)
        state.module.train()
        self.measures.write(state.step, values)
        if self.tracker:
            self.tracker.log_metrics(values, state.step)

    def close(self) -> None:
        """Flush everything; the driver ends the MLflow run."""
        self.metrics.close()
        if self.measures:
            self.measures.close()
        if self.tracker:
            self.tracker.close()


def split_batch(batch: Batch, parts: int) -> Iterator[Batch]:
    """Equal consecutive parts of every tensor and list of a batch."""
    for number in range(parts):
        part = {}
        for name, value in batch.items():
            size = len(value) // parts
            part[name] = value[number * size : (number + 1) * size]
        yield part


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _skips(loader: Any) -> dict[str, float]:
    """Samples this rank's loader skipped so far, by reason."""
    skipped = loader.stats().get("skipped", {})
    return {f"skipped.{reason}": float(number) for reason, number in skipped.items()} if skipped else {}


def _not_finite(what: str, value: float, step: int, batch: Batch | None, place: Place) -> str:
    keys = ", ".join(batch.get("key", [])) if batch else ""
    return (
        f"{what} is {value} at step {step}; rank {place.rank} had samples {keys or 'without keys'}. "
        "Lower train.lr, set train.clip_norm, or look at these samples; the last checkpoint is unharmed"
    )


def _nothing_counts(steps: int, state: _State, batch: Batch | None) -> str:
    keys = ", ".join((batch or {}).get("key", [])[:4])
    return (
        f"no sample of {steps} batches in a row could be learned from (up to step {state.step}, for example "
        f"{keys}); the recipe left all of them out: does the teacher's flow show any motion?"
    )
