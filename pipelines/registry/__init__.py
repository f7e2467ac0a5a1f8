"""`kinema register`: a run, or a network with weights, in; a registry version out."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.configs import RegisterConfig
from kinema.configs.models.table import MODELS
from kinema.pipelines import tracking
from kinema.pipelines.registry.files import load_registered
from kinema.pipelines.registry.package import package
from kinema.pipelines.registry.source import make_card, source_of
from kinema.pipelines.registry.versions import Registry

__all__ = ["RegisterSummary", "load_registered", "run"]

# The metric that decides when none is named: this one, else the first by name among the evaluation's.
PREFERRED_METRIC = "davis_jf"
EVALUATION = "evaluate."


@dataclass(frozen=True)
class RegisterSummary:
    """What the registry holds now."""

    name: str
    """Registered model."""
    version: int
    """Version of this model."""
    champion: bool
    """Whether this version is the champion."""
    metric: str
    """Metric that was compared; empty if the run has none."""
    value: float | None
    """Its value for this version."""
    champion_before: int | None
    """Version that was the champion before, if any."""
    uri: str
    """Address for `mlflow.pyfunc.load_model`."""
    run_id: str
    """MLflow run that the version is linked to."""
    seconds: float
    """Wall time."""
    out: str = ""
    """The registry."""
    notices: tuple[str, ...] = ()
    """What a user must know of this model."""

    @property
    def exit_status(self) -> int:
        """Always 0."""
        return 0


def run(config: RegisterConfig, *, report: Callable[[dict[str, Any]], None] | None = None) -> RegisterSummary:
    """Package a model and register it: alias `candidate`, and `champion` if it is better.

    `model` is a run, whose newest checkpoint is taken, or the name of a network with weights. The first version becomes
    champion. A later one does when its metric is strictly better; without a metric on both sides nothing changes, which
    is said aloud. The same weights are registered once.
    Raises: ValueError for a model folder without checkpoint, an unknown name, or a model that has no form to answer in;
        StageError if MLflow does not answer.
    """
    started = time.monotonic()
    if not config.model:
        raise ValueError("model is empty; name the run folder (model=DIR) or a network with weights (model=raft)")
    source = source_of(config.model, config.weights)
    name = config.name or source.row.registered_name
    tracker = tracking.start_run(
        source.experiment,
        f"register-{name}",
        {},
        tags={"kinema.registered_as": name},
        resume=source.run_id,
        workspace=source.workspace,
    )
    try:
        registry = Registry(tracker.client, tracker.handle.uri, name)
        metrics = evaluation_metrics(registry.run_metrics(tracker.run_id))
        with tempfile.TemporaryDirectory(prefix="kinema-register-") as folder:
            parts = package(source.exported, Path(folder) / "parts")
            card = make_card(source, name, metrics, parts.content_hash)
            version = registry.add(parts, tracker.run_id, card, Path(folder) / "model")
    finally:
        tracker.end()
    metric = config.metric.removeprefix(EVALUATION) or _first_metric(metrics)
    value = metrics.get(metric)
    if config.metric and value is None:
        known = ", ".join(sorted(metrics)) or "none; run `kinema evaluate` first"
        sys.stderr.write(f"kinema register: the run has no metric {config.metric!r} (it has {known})\n")
    before = registry.champion()
    better = before is None or _beats(registry, value, before, metric, config.higher_is_better)
    if better and before != version:
        registry.set_alias("champion", version)
    rival = None if before == version else before
    registry.set_verdict(version, _verdict(registry, metric, value, rival, better or before == version))
    champion = version if better else before
    return RegisterSummary(
        name=name,
        version=version,
        champion=champion == version,
        metric=metric,
        value=value,
        champion_before=before,
        uri=f"models:/{name}@{'champion' if champion == version else 'candidate'}",
        run_id=tracker.run_id,
        seconds=round(time.monotonic() - started, 3),
        out=tracker.handle.uri,
        notices=source.origin.notices,
    )


def registered_name(config: RegisterConfig, model: str) -> str:
    """The name in the registry: the config's, or the one that the table of models gives."""
    return config.name or MODELS[model].registered_name


def evaluation_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """What `kinema evaluate` logged to a run, by bare name."""
    return {name.removeprefix(EVALUATION): v for name, v in metrics.items() if name.startswith(EVALUATION)}


def _first_metric(metrics: Mapping[str, float]) -> str:
    return PREFERRED_METRIC if PREFERRED_METRIC in metrics else min(metrics, default="")


def _verdict(registry: Registry, metric: str, value: float | None, before: int | None, better: bool) -> str:
    """How the version came to be champion or not, with the figures, for its description."""
    if before is None:
        return f"Champion: {metric} {value:.5g}, no other to beat." if value is not None else "Champion: the first."
    theirs = registry.metric(before, metric) if metric else None
    ours, other = ("none" if number is None else f"{number:.5g}" for number in (value, theirs))
    said = f"{metric} {ours}, version {before} has {other}" if metric else f"not evaluated, unlike version {before}"
    return f"Champion: {said}." if better else f"Candidate: {said}; version {before} stays champion."


def _beats(registry: Registry, value: float | None, before: int, name: str, higher_is_better: bool) -> bool:
    """Whether `value` is strictly better than the champion's; says so when they cannot be compared."""
    theirs = registry.metric(before, name) if name else None
    if value is None or theirs is None or math.isnan(value):
        why = f"version {before} has no {name}" if value is not None and name else "this model was not evaluated"
        sys.stderr.write(f"kinema register: version {before} stays champion: {why}\n")
        return False
    return value > theirs if higher_is_better else value < theirs
