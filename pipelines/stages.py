"""The one table of commands that are stages: what they are for, their settings, and the module that runs them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage. Its settings are `kinema.configs.STAGES[name]`."""

    module: str
    """Has `run(config) -> summary`."""
    purpose: str
    """One line of help."""
    upstream: tuple[str, ...] = ()
    """Stages whose output it reads."""


STAGES = {
    "shard": Stage("kinema.pipelines.shard", "videos -> clips/: probe, cut, resample, encode, pack"),
    "teach": Stage("kinema.pipelines.teach", "clips/ -> flow/TEACHER/: optical flow between frames", ("shard",)),
    "track": Stage("kinema.pipelines.track", "clips/ (+ flow/) -> tracks/TRACKER/: point tracks", ("shard", "teach")),
    "train": Stage(
        "kinema.pipelines.train",
        "clips/ + flow/ -> a run: checkpoints, metrics, pictures",
        ("shard", "teach", "track"),
    ),
    "evaluate": Stage("kinema.pipelines.evaluate.stage", "a model + a benchmark folder -> one table", ("train",)),
    "register": Stage("kinema.pipelines.registry", "a run -> a version in the MLflow registry", ("train", "evaluate")),
    "embed": Stage("kinema.pipelines.embed", "a registry model + clips/ -> features", ("shard", "register")),
    "transfer": Stage("kinema.pipelines.transfer", "a motion video + a picture + a prompt -> a video"),
    "search": Stage("kinema.pipelines.search", "motion embeddings + a query -> the clips that move alike", ("embed",)),
}
WORKFLOW = Stage("kinema.pipelines.workflow", "all stages of one workflow file; finished stages are skipped")


def run_stage(stage: str, config: Any, **options: Any) -> Any:
    """The stage's summary; embedded tracking lies beside its `out`."""
    from kinema.pipelines import tracking

    with tracking.logging_beside(getattr(config, "out", "")):
        return stage_module(stage).run(config, **options)


def stage_module(stage: str) -> Any:
    """The module whose `run(config)` is the stage; imported when needed, so that `--help` stays quick."""
    return importlib.import_module((WORKFLOW if stage == "run" else STAGES[stage]).module)
