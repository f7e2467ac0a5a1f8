"""`kinema train`: clips/ and sidecars in, a run out."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kinema
from kinema.configs import TrainConfig
from kinema.configs.json_text import json_text
from kinema.configs.load import config_hash, to_mapping
from kinema.configs.rendered import RENDERED
from kinema.pipelines import engine, tracking
from kinema.pipelines.artifacts.layout import MANIFEST, RUN_FILE
from kinema.pipelines.errors import StageError
from kinema.pipelines.train import checkpoint, compiled
from kinema.pipelines.train.bucket_run import fetch_run, is_url, local_folder
from kinema.pipelines.train.launch import launch
from kinema.pipelines.train.loop import Finished, TrainJob, rank_batch_size, refuse_other_identity
from kinema.pipelines.train.meter import read_metrics
from kinema.pipelines.train.mirror import RunMirror
from kinema.pipelines.train.parallel import seed_step
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.train.source import ClipLoader, check_source, source_inputs
from kinema.pipelines.train.trained import load_model

__all__ = ["ClipLoader", "Stopped", "TrainSummary", "build_model", "load_model", "run"]

# Settings that change how a run is carried out or watched, not what it computes. `steps` may grow.
_FREE = frozenset(
    "clips flow other_flow tracks out steps num_workers min_workers use_gpu cpus_per_worker compile copy_ahead "
    "checkpoint_every keep_checkpoints keep_best log_every pictures_every measure_every max_failures experiment "
    "run_name loader.num_workers loader.prefetch loader.lookahead loader.cache_dir loader.cache_gb".split()
)
# Settings that runs of earlier versions do not know; at these values they decide nothing.
_LATER = {
    "loader.mode": "random",
    "loader.lanes": 1,
    "sharding": "none",
    "dismo.offset_rate_per_s": 12.0,
    "dismo.pixel_gain": 1.0,
    "dismo.initial_spread": 0.0,
}


@dataclass(frozen=True)
class TrainSummary:
    """What a training run came to."""

    step: int
    """Optimizer steps done, over all invocations."""
    loss: float
    """Loss of the last step, mean over all ranks."""
    samples_per_second: float
    """Over this invocation, all ranks together; of the run's last one if nothing was left to do."""
    checkpoint: str
    """Folder of the newest checkpoint."""
    run_id: str
    """MLflow run."""
    seconds: float
    """Wall time of this invocation."""
    out: str = ""
    """The run's folder."""
    notices: tuple[str, ...] = ()
    """What a user must know of this model."""
    precision: str = ""
    """What `train.precision` came to: fp32 or bf16."""

    @property
    def exit_status(self) -> int:
        """Always 0: what cannot be read is skipped and counted, or ends the run."""
        return 0


class Stopped(StageError):
    """A signal ended the run early; its checkpoint is written and the same command goes on."""

    def __init__(self, message: str, summary: TrainSummary):
        super().__init__(message)
        self.summary = summary


def run(config: TrainConfig, *, report: Callable[[dict[str, Any]], None] | None = None) -> TrainSummary:
    """Train, from the newest checkpoint in `out` if there is one.

    Args: report is called with {"stage", "step", "steps", "loss"} now and then.
    Raises: ValueError for settings, data or a run folder that do not fit; StageError when training cannot go on;
        Stopped (a StageError) after SIGTERM or SIGINT, with the checkpoint written.
    """
    config = absolute_paths(config)
    _check(config, make_recipe(config))
    return _run_in_bucket(config, report) if is_url(config.out) else _run_in(config, Path(config.out), report)


def _run_in_bucket(config: TrainConfig, report: Callable[[dict[str, Any]], None] | None) -> TrainSummary:
    """Train in a folder of this machine that is copied to the URL meanwhile; go on from what is there.

    On several nodes rank 0's machine has that folder, and this one only what it needs to begin and to sum up.
    """
    folder = local_folder(config.out)
    _fetch(config.out, folder)
    spread = engine.backend() == "ray" and engine.num_nodes() > 1
    _check_shared(config, spread)
    try:
        if spread:
            return _at_url(_run_in(config, folder, report, config.out), config.out)
        with RunMirror(config.out, folder, config.keep_checkpoints, config.keep_best):
            return _at_url(_run_in(config, folder, report), config.out)
    except Stopped as stopped:
        raise Stopped(str(stopped), _at_url(stopped.summary, config.out)) from None


def _check_shared(config: TrainConfig, spread: bool) -> None:
    """Args: spread, whether ranks may be on several nodes, which share no folder. Raises: ValueError."""
    if spread and config.sharding == "full" and config.num_workers > 1:
        raise ValueError(
            f"train.out={config.out}: with sharding=full every rank writes its part of a checkpoint into one folder, "
            "and ranks on several nodes have none in common; use out= on a folder that all nodes see, or sharding=none"
        )


def _fetch(url: str, folder: Path) -> None:
    here = checkpoint.latest_checkpoint(folder)
    fetch_run(url, folder, "" if here is None else here.name)


def _at_url(summary: TrainSummary, url: str) -> TrainSummary:
    return replace(summary, checkpoint=f"{url.rstrip('/')}/checkpoints/{Path(summary.checkpoint).name}")


def _run_in(
    config: TrainConfig, folder: Path, report: Callable[[dict[str, Any]], None] | None = None, url: str = ""
) -> TrainSummary:
    """Args: url, of the run, where its ranks share no folder."""
    started = time.monotonic()
    recipe = make_recipe(config)
    inputs = source_inputs(config, recipe.needs)
    identity = run_identity(config, inputs)
    newest = checkpoint.latest_checkpoint(folder)
    if newest is not None:
        meta = checkpoint.read_meta(newest)
        refuse_other_identity(meta["identity"], identity, folder)
        if meta["step"] >= config.steps:
            return _summary(_read_run(folder), newest, meta, meta["samples_per_second"], started)
        sys.stderr.write(f"train: resuming from step {meta['step']} of {config.steps} in {folder}\n")
    recipe.check()
    make_loader = ClipLoader(config, recipe)
    sys.stderr.write(f"train: {make_loader.index().describe()}\n")
    is_new = _make_folder(folder)
    with _alone(folder, is_new):
        return _train(config, recipe, make_loader, folder, identity, inputs, report, started, url)


def _train(
    config: TrainConfig,
    recipe: Any,
    make_loader: ClipLoader,
    folder: Path,
    identity: dict[str, Any],
    inputs: dict[str, tuple[str, str]],
    report: Callable[[dict[str, Any]], None] | None,
    started: float,
    url: str,
) -> TrainSummary:
    tracker = _open_run(config, folder, identity, inputs, notices_of(recipe))
    for notice in notices_of(recipe):
        sys.stderr.write(f"kinema train: {notice}\n")
    # A database of this machine cannot be reached from the ranks' nodes: it gets the metrics at the end.
    logs_here = bool(url) and tracking.sqlite_path(tracker.handle.uri) is not None
    first_step = _newest_step(folder)
    handle = None if logs_here else tracker.handle
    job = TrainJob(config, recipe, make_loader, folder, identity, handle, url, make_loader.held_out)
    if url:
        RunMirror(url, folder, config.keep_checkpoints, config.keep_best).copy()  # run.json: rank 0 finds it there
    total = {"stage": "train", "steps": config.steps}
    on_progress = (lambda step, loss: report(total | {"step": step, "loss": loss})) if report else None
    status = "FAILED"
    try:
        finished = launch(job, on_progress)
        status = "KILLED" if finished.stopped else "FINISHED"
        if url:
            _fetch(url, folder)
        for point in read_metrics(folder) if logs_here else []:
            if point["step"] > first_step:
                values = {name: math.nan if value is None else value for name, value in point.items() if name != "step"}
                tracker.log_metrics(values, point["step"])
    finally:
        tracker.end(status)
    return _finish(finished, folder, config, started)


def _newest_step(folder: Path) -> int:
    newest = checkpoint.latest_checkpoint(folder)
    return 0 if newest is None else int(checkpoint.read_meta(newest)["step"])


def notices_of(recipe: Any) -> tuple[str, ...]:
    """What a user must know of a model that this recipe trains; workers' own words would not reach them."""
    return recipe.notices() if hasattr(recipe, "notices") else ()


def build_model(config: TrainConfig) -> Any:
    """The model as it is before the first step, in eval mode."""
    recipe = make_recipe(config)
    seed_step(config.seed, 0, 0)
    return recipe.published_model(recipe.build().state_dict())


def run_identity(config: TrainConfig, inputs: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """What decides the run's numbers: settings (flattened) and the content of its data."""
    settings = tracking.flatten(to_mapping(config))
    kept = {n: value for n, value in settings.items() if n not in _FREE and (n not in _LATER or value != _LATER[n])}
    # What is rendered is data, and known by its hash.
    kept = {name: value for name, value in kept.items() if not name.startswith(f"{RENDERED}.")}
    found = kept | {f"data.{name}": digest for name, (_, digest) in inputs.items()}
    return json.loads(json_text(found))


def absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config with local paths that do not depend on the working folder: ranks run in another one."""

    def absolute(path: str) -> str:
        return path if path in ("", RENDERED) or "://" in path else str(Path(path).expanduser().resolve())

    def with_absolute_files(settings: Any) -> Any:
        files = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.metadata.get("file")}
        return replace(settings, **{name: absolute(path) for name, path in files.items() if path != "published"})

    return replace(
        config,
        clips=absolute(config.clips),
        flow=absolute(config.flow),
        other_flow=tuple(absolute(url) for url in config.other_flow),
        tracks=absolute(config.tracks),
        out=absolute(config.out),
        weights=absolute(config.weights),
        settings=None if config.settings is None else with_absolute_files(config.settings),
        rendered=with_absolute_files(config.rendered),
        loader=replace(config.loader, cache_dir=absolute(config.loader.cache_dir)),
    )


def _check(config: TrainConfig, recipe: Any) -> None:
    if not config.out:
        raise ValueError("train.out is empty; name the run's folder: out=DIR")
    check_source(config, recipe.needs)
    if config.measure_every and not hasattr(recipe, "measure"):
        raise ValueError(
            f"train.measure_every={config.measure_every}, but {config.model} has nothing to measure while it trains; "
            "use measure_every=0, and `kinema evaluate` afterwards"
        )
    if config.measure_every and config.sharding != "none":
        raise ValueError(
            f"train.measure_every={config.measure_every}: one rank measures, which has a part of a sharded model only; "
            "use measure_every=0 or sharding=none"
        )
    rank_batch_size(config, config.num_workers)
    if config.sharding == "full" and not hasattr(recipe, "shard_units"):
        raise ValueError(f"train.sharding=full is not for model={config.model}; use sharding=none")
    compiled.check(config.compile, recipe, config.model, config.sharding)


@contextlib.contextmanager
def _alone(folder: Path, is_new: bool) -> Iterator[None]:
    """Hold the run folder: two trainings in one would overwrite each other. A killed holder holds nothing.

    A new folder in which nothing came to be is removed again.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(
                f"out={folder} is being trained by another process; wait for it or use another out="
            ) from None
        try:
            yield
        finally:
            if is_new and os.listdir(folder) == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()


def _make_folder(folder: Path) -> bool:
    """Returns: whether it was not there. Raises: ValueError."""
    if (folder / MANIFEST).is_file():
        raise ValueError(f"train.out={folder} holds an artifact; choose another folder for the run")
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"train.out={folder} cannot be made ({error.strerror}); choose another folder") from None
    return is_new


def _open_run(
    config: TrainConfig, folder: Path, identity: dict[str, Any], inputs: Any, notices: tuple[str, ...]
) -> tracking.Tracker:
    """The MLflow run: that of an earlier invocation if it still exists; recorded in run.json."""
    digest = config_hash(config)
    known = _read_run(folder)
    tracker = tracking.start_run(
        config.experiment,
        config.run_name or f"{config.model}-{digest[:8]}",
        {"train": to_mapping(config)},
        tags={"kinema.kind": "train", "kinema.model": config.model, "kinema.config_hash": digest},
        inputs=inputs,
        resume=known.get("run_id", ""),
        workspace=folder.parent if tracking.home() is None else None,
    )
    record = {
        "config": to_mapping(config),
        "config_hash": digest,
        "identity": identity,
        "inputs": {name: {"url": url, "hash": value} for name, (url, value) in inputs.items()},
        "run_id": tracker.run_id,
        "tracking_uri": tracker.handle.uri,
        "notices": list(notices),
        "code_version": kinema.__version__,
    }
    temporary = folder / f".{RUN_FILE}.partial"
    temporary.write_text(json_text(record, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / RUN_FILE)
    return tracker


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RUN_FILE).read_text())
    except FileNotFoundError:
        return {}


def _finish(finished: Finished, folder: Path, config: TrainConfig, started: float) -> TrainSummary:
    newest = checkpoint.latest_checkpoint(folder)
    if newest is None:
        raise StageError(f"training ended without a checkpoint in {folder}")
    rate = finished.samples_per_second
    summary = _summary(_read_run(folder), newest, checkpoint.read_meta(newest), rate, started)
    if finished.stopped:
        raise Stopped(
            f"stopped by {finished.stopped} at step {summary.step} of {config.steps}; checkpoint {newest} is "
            "written, the same command goes on from it",
            summary,
        )
    return summary


def _summary(
    record: dict[str, Any], newest: Path, meta: dict[str, Any], samples_per_second: float, started: float
) -> TrainSummary:
    seconds = round(time.monotonic() - started, 3)
    said = tuple(record.get("notices", ()))
    facts = (meta["step"], meta["loss"], samples_per_second, str(newest), record.get("run_id", ""), seconds)
    return TrainSummary(*facts, out=str(newest.parent.parent), notices=said, precision=meta.get("precision", ""))
