"""What `import kinema` offers: stages as functions, artifacts as collections, models by address, predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from kinema.configs import STAGES
from kinema.configs.load import build, to_mapping
from kinema.configs.paths import placed
from kinema.configs.required import check_required
from kinema.pipelines import stages
from kinema.pipelines.model_address import load_address, row_of
from kinema.pipelines.opened import FeatureSet, MotionClips, open_collection
from kinema.pipelines.single import models_table, predict_features, predict_flow

__all__ = [
    "embed",
    "evaluate",
    "list_models",
    "load_model",
    "open",
    "predict_features",
    "predict_flow",
    "register",
    "run",
    "search",
    "shard",
    "teach",
    "track",
    "train",
    "transfer",
]


def open(url: str | Path, *, flow: str | Path = "", tracks: str | Path = "") -> MotionClips | FeatureSet:
    """An artifact as a collection.

    Args: url, folder or URL of clips, flow, tracks or features; flow, tracks, sidecars to join to clips. A flow or
        tracks artifact alone is joined to its clips, if they lie beside it.
    Returns: `MotionClips` (frames, flow, tracks by clip) or `FeatureSet` (maps or means by clip).
    Raises: ValueError if there is no artifact, or its clips are not found.
    """
    return open_collection(str(url), str(flow), str(tracks))


def load_model(name: str, weights: str = "", *, untrained: bool = False) -> nn.Module:
    """A network in eval mode on the CPU.

    Args: name, of the table of models (`kinema.list_models()`), a run folder, a checkpoint, or models:/NAME@ALIAS;
        weights, for a name: file, URL, or empty for the published ones; untrained, random weights instead.
    Raises: ValueError if there is none, or weights do not fit or cannot be had.
    """
    return load_address(name, weights, kind=row_of(name).kind, user="load_model", untrained=untrained).network


def list_models() -> list[dict[str, Any]]:
    """The table of models: name, what it gives, parameters, licence, weights at hand, published figures."""
    return models_table()


def shard(**settings: Any) -> Any:
    """`kinema shard`: videos -> clips. Settings as in `ShardConfig`; sections as mappings, clip={"seconds": 2}.

    Returns: `ShardSummary`. Raises: ValueError for settings; StageError if the stage cannot finish.
    """
    return _run("shard", settings)


def teach(**settings: Any) -> Any:
    """`kinema teach`: optical flow. Settings as in `TeachConfig`; returns `TeachSummary`; raises as `shard`."""
    return _run("teach", settings)


def track(**settings: Any) -> Any:
    """`kinema track`: clips (and flow) -> tracks. Settings as in `TrackConfig`; raises as `shard`."""
    return _run("track", settings)


def train(**settings: Any) -> Any:
    """`kinema train`: a run. Settings as in `TrainConfig`; returns `TrainSummary`; raises as `shard`."""
    return _run("train", settings)


def evaluate(**settings: Any) -> Any:
    """`kinema evaluate`: one table. Settings as in `EvaluateConfig`; returns `EvaluateSummary`; raises as `shard`."""
    return _run("evaluate", settings)


def register(**settings: Any) -> Any:
    """`kinema register`: a registry version. Settings as in `RegisterConfig`; raises as `shard`."""
    return _run("register", settings)


def embed(**settings: Any) -> Any:
    """`kinema embed`: features of every clip. Settings as in `EmbedConfig`; raises as `shard`."""
    return _run("embed", settings)


def transfer(**settings: Any) -> Any:
    """`kinema transfer`: a video that moves as another does. Settings as in `TransferConfig`; raises as `shard`."""
    return _run("transfer", settings)


def search(**settings: Any) -> Any:
    """`kinema search`: the clips that move alike. Settings as in `SearchConfig`; raises as `shard`."""
    return _run("search", settings)


def run(**settings: Any) -> Any:
    """`kinema run`: all stages. Settings as in `WorkflowConfig`, sections as mappings; returns `WorkflowSummary`."""
    return _run("run", settings)


def _run(stage: str, settings: dict[str, Any]) -> Any:
    config = placed(build(STAGES[stage], _plain(settings)))
    check_required(stage, config)
    return stages.run_stage(stage, config)


def _plain(value: Any) -> Any:
    """Paths as text, tuples as lists, dataclasses as mappings: what files could hold."""
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
