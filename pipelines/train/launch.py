"""From a job to its ranks: in this process, or on Ray Train with lost workers replaced.

Ray Train only places the ranks, forms their process group and starts them again after a loss. Checkpoints and metrics
lie in the run folder, which every rank and the driver can see, or, for a run in a bucket on several nodes, in a folder
of rank 0's machine that is copied to the bucket; small messages take the same way or go through an actor (exchange.py).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kinema.configs.json_text import json_text
from kinema.pipelines import engine
from kinema.pipelines.errors import StageError
from kinema.pipelines.progress import Progress
from kinema.pipelines.train.exchange import ActorExchange, Exchange, FolderExchange
from kinema.pipelines.train.loop import Finished, TrainJob, train_worker
from kinema.pipelines.train.meter import PROGRESS_FILE
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.rank_folder import rank_folder
from kinema.pipelines.train.stop import CatchSignals, Notice, Stop

# Files between driver and ranks, under RUN/_ranks; gone when the run ends.
EXCHANGE = "_ranks"
_DRAINED = "drained"
_POLL_S = 0.2
_log = logging.getLogger(__name__)


def use_gpu(choice: str) -> bool:
    """Whether ranks get a GPU: `yes`, `no`, or `auto` (the cluster, or this machine, has one)."""
    if choice != "auto":
        return choice == "yes"
    if engine.backend() == "serial":
        return torch.cuda.is_available()
    return engine.connect().get("GPU", 0) > 0


def launch(job: TrainJob, on_progress: Callable[[int, float], None] | None = None) -> Finished:
    """Train to the end, or to SIGTERM or SIGINT, whichever comes first; shows progress on stderr.

    Raises: what a rank raised as ValueError or StageError; StageError when more workers were lost than
        `max_failures` allows.
    """
    exchange = job.run / EXCHANGE
    shutil.rmtree(exchange, ignore_errors=True)
    exchange.mkdir(parents=True)
    (job.run / PROGRESS_FILE).unlink(missing_ok=True)
    follower = _Follower(job, on_progress)
    try:
        return _in_process(job, follower) if engine.backend() == "serial" else _on_ray(job, exchange, follower)
    finally:
        follower.close()
        shutil.rmtree(exchange, ignore_errors=True)
        (job.run / PROGRESS_FILE).unlink(missing_ok=True)


def _in_process(job: TrainJob, follower: _Follower) -> Finished:
    if job.config.num_workers != 1:
        raise ValueError(
            f"train.num_workers={job.config.num_workers} needs Ray; unset KINEMA_ENGINE=serial or use num_workers=1"
        )
    device = torch.device("cuda", 0) if use_gpu(job.config.use_gpu) else torch.device("cpu")
    stop = Stop()
    follower.start()
    with CatchSignals(stop.request):
        return train_worker(job, Place(device=device), stop)


def _on_ray(job: TrainJob, exchange: Path, follower: _Follower) -> Finished:
    # Ray Train watches its ranks every 2 s by default; a lost one should be noticed sooner.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    config = job.config
    needs = {"num_cpus": config.cpus_per_worker, "num_gpus": float(config.use_gpu == "yes")}
    resources = engine.resources("ray", **needs, count=config.min_workers or config.num_workers)
    messages: Exchange = ActorExchange() if job.url else FolderExchange(exchange)
    trainer = _trainer(job, exchange, messages, resources)
    follower.read = lambda: _read(messages, PROGRESS_FILE) if job.url else follower.from_file()
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  shown by the main thread, which waits for this one
            failed.append(error)

    # In the main thread `fit` would install its own handler for SIGINT, which ends ranks without a checkpoint.
    thread = threading.Thread(target=fit, name="kinema-ray-train", daemon=True)
    with CatchSignals(lambda name: messages.put("stop", name)):
        thread.start()
        follower.start()
        told = False
        while thread.is_alive():
            thread.join(_POLL_S)
            if not told and messages.get(_DRAINED) is not None:
                told = True
                _log.warning("a node of this training will be taken away: it saves every few seconds until then")
    raised = _read(messages, "failed.json")
    if raised:
        raise (ValueError if raised["kind"] == "ValueError" else StageError)(raised["message"])
    finished = _read(messages, "finished.json")
    if failed or finished is None:
        why = " ".join(str(failed[0]).split())[-500:] if failed else "no rank reported an end"
        raise StageError(f"training lost more workers than max_failures={job.config.max_failures} allows: {why}")
    return Finished(**finished)


def _trainer(job: TrainJob, exchange: Path, messages: Exchange, resources: dict[str, float]) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = job.config
    gpu = use_gpu(config.use_gpu)
    fewest = config.min_workers or config.num_workers
    for name, each in (("CPU", config.cpus_per_worker), ("GPU", float(gpu))):
        if each * fewest > resources.get(name, 0):
            setting = "min_workers" if config.min_workers else "num_workers"
            raise ValueError(
                f"train.{setting}={fewest} with {each:g} {name} each needs {each * fewest:g} {name}, Ray has "
                f"{resources.get(name, 0):g}; use fewer workers or set train.cpus_per_worker"
            )
    ranks: Any = (fewest, config.num_workers) if config.min_workers else config.num_workers
    workers = {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if gpu else {})
    return TorchTrainer(
        _rank_main,
        train_loop_config={"job": job, "messages": messages},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=ranks, use_gpu=gpu, resources_per_worker=workers),
        run_config=RunConfig(
            # A name of its own: the run folder decides what is resumed, not Ray Train's memory of a name.
            name=f"{os.getpid()}-{time.time_ns()}",
            storage_path=str(exchange.resolve()),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def _rank_main(settings: dict[str, Any]) -> None:
    """One rank, in its own process."""
    import ray.train
    import ray.train.torch
    from ray.exceptions import RayError

    job, messages = settings["job"], settings["messages"]
    # A rank that failed for good fails again on any other worker: Ray Train's restart ends here.
    if messages.get("failed.json") is not None:
        return
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(job.config.cpus_per_worker)))
    place = Place(context.get_world_rank(), context.get_world_size(), device)
    try:
        with rank_folder(job, place, messages) as own_job:
            stop, notice = Stop(lambda: messages.get("stop")), Notice(lambda: _node_will_be_taken_away(messages))
            finished = train_worker(own_job, place, stop, notice)
    except (OSError, RuntimeError, RayError) as error:
        # Among these are the other ranks' "connection closed by peer" when one is lost, and the death of Ray Train's
        # own actors, which it ends then: worth another start.
        if isinstance(error, StageError | torch.OutOfMemoryError):
            _report_failure(messages, error)
        raise
    except Exception as error:
        _report_failure(messages, error)
        raise
    if place.rank == 0:
        messages.put("finished.json", json_text(dataclasses.asdict(finished)))


def _node_will_be_taken_away(messages: Exchange) -> bool:
    """Whether a node of ours is being drained (a spot machine, an autoscaler); all ranks ask at the same time.

    Ray Train starts the ranks anew elsewhere when the node's time is over, and does not count it as a failure.
    """
    import ray.train

    drained = ray.train.get_preemption_info() is not None
    if drained:
        messages.put(_DRAINED, "")  # for the driver, which users look at
    return drained


def _report_failure(messages: Exchange, error: Exception) -> None:
    known = isinstance(error, ValueError | StageError)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    kind = "ValueError" if isinstance(error, ValueError) else "StageError"
    messages.put("failed.json", json_text({"kind": kind, "message": message}))


class _Follower:
    """Shows rank 0's progress as it changes, from a thread."""

    def __init__(self, job: TrainJob, on_progress: Callable[[int, float], None] | None):
        self.path = job.run / PROGRESS_FILE
        self.progress = Progress("train", job.config.steps, "steps")
        self.on_progress = on_progress
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="kinema-progress", daemon=True)
        self.shown = -1
        self.read: Callable[[], dict[str, Any] | None] = self.from_file

    def from_file(self) -> dict[str, Any] | None:
        """What `progress.json` of the run says."""
        return _read(FolderExchange(self.path.parent), self.path.name)

    def start(self) -> None:
        """Begin to follow."""
        self.thread.start()

    def _follow(self) -> None:
        while not self.closed.wait(_POLL_S):
            self._show()

    def _show(self) -> None:
        found = self.read()
        if found is None or found["step"] == self.shown:
            return
        if self.shown < 0:
            self.progress.start_at(found["step"])
        self.shown = found["step"]
        loss = math.nan if found["loss"] is None else found["loss"]  # null stands for what is no number
        self.progress.update(self.shown, f"loss {loss:.4g}")
        if self.on_progress:
            self.on_progress(self.shown, loss)

    def close(self) -> None:
        """Show the last state and end."""
        self.closed.set()
        if self.thread.is_alive():
            self.thread.join()
            self._show()
        self.progress.close()
        sys.stderr.flush()


def _read(messages: Exchange, name: str) -> dict[str, Any] | None:
    text = messages.get(name)
    return None if text is None else json.loads(text)
