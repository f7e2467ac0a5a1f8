"""Settings: dataclasses (`schema`) and how files and command lines become them (`load`)."""

from kinema.configs.load import build, config_hash, load_stage, resolve_config_path
from kinema.configs.schema import (
    STAGES,
    ClipConfig,
    EmbedConfig,
    EvaluateConfig,
    FlowFeatConfig,
    FPTConfig,
    LoaderConfig,
    PageConfig,
    RegisterConfig,
    ShardConfig,
    TeachConfig,
    TrackConfig,
    TrainConfig,
    WorkflowConfig,
)

__all__ = [
    "STAGES",
    "ClipConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "FPTConfig",
    "FlowFeatConfig",
    "LoaderConfig",
    "PageConfig",
    "RegisterConfig",
    "ShardConfig",
    "TeachConfig",
    "TrackConfig",
    "TrainConfig",
    "WorkflowConfig",
    "build",
    "config_hash",
    "load_stage",
    "resolve_config_path",
]
