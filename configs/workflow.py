"""Settings of `kinema run`: a section per stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kinema.configs.embed import EmbedConfig
from kinema.configs.evaluate import EvaluateConfig
from kinema.configs.prices import PricesConfig
from kinema.configs.register import RegisterConfig
from kinema.configs.search import SearchConfig
from kinema.configs.shard import ShardConfig
from kinema.configs.teach import TeachConfig
from kinema.configs.track import TrackConfig
from kinema.configs.train import TrainConfig
from kinema.configs.transfer import TransferConfig


@dataclass(frozen=True)
class WorkflowConfig:
    """`kinema run`: all stages in order. Paths left empty are filled in under `workspace`."""

    name: str = "workflow"
    """Name of the parent MLflow run."""
    workspace: str = "workspace"
    """Folder under which stages write unless told otherwise."""
    experiment: str = ""
    """MLflow experiment of the workflow and of its stages; empty: that of `train`, else kinema."""
    stages: tuple[Literal["shard", "teach", "track", "train", "evaluate", "register", "embed"], ...] = (
        "shard",
        "teach",
        "train",
        "register",
        "embed",
    )
    """Stages to run."""
    shard: ShardConfig = field(default_factory=ShardConfig)
    """Section of `kinema shard`."""
    teach: TeachConfig = field(default_factory=TeachConfig)
    """Section of `kinema teach`."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Section of `kinema track`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Section of `kinema train`."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Section of `kinema evaluate`."""
    register: RegisterConfig = field(default_factory=RegisterConfig)
    """Section of `kinema register`."""
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    """Section of `kinema embed`."""
    prices: PricesConfig = field(default_factory=PricesConfig)
    """What nodes cost, for `kinema status` and the workflow's metrics."""
    transfer: TransferConfig = field(default_factory=TransferConfig)
    """Section of `kinema transfer`, which is no stage of a workflow."""
    phases: dict[str, Any] = field(default_factory=dict)
    """A curriculum: {name: what differs from this file}. Each is a workflow of its own, under workspace/NAME, whose
    training starts from the weights of the one before."""


STAGES: dict[str, Any] = {
    "shard": ShardConfig,
    "teach": TeachConfig,
    "track": TrackConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
    "embed": EmbedConfig,
    "transfer": TransferConfig,
    "search": SearchConfig,
    "run": WorkflowConfig,
}
