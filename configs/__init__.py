"""Settings: one file of dataclasses per stage, and how files and command lines become them (`load`)."""

from kinema.configs.embed import EmbedConfig
from kinema.configs.evaluate import EvaluateConfig, KNNConfig, PokesConfig
from kinema.configs.flow_dataset import FlowDatasetConfig
from kinema.configs.load import build, config_hash, load_stage, resolve_config_path
from kinema.configs.loader import LoaderConfig, PairFilterConfig
from kinema.configs.models.dismo import DisMoConfig
from kinema.configs.models.flow_network import FlowNetworkConfig
from kinema.configs.models.flowfeat import FlowFeatConfig
from kinema.configs.models.fpt import FPTConfig
from kinema.configs.models.transfer import TransferTrainingConfig
from kinema.configs.page import PageConfig
from kinema.configs.prices import PricesConfig
from kinema.configs.register import RegisterConfig
from kinema.configs.rendered import EffectsConfig, RenderedConfig
from kinema.configs.search import SearchConfig
from kinema.configs.shard import ClipConfig, MasksConfig, ShardConfig
from kinema.configs.teach import TeachConfig
from kinema.configs.track import TrackConfig
from kinema.configs.train import TrainConfig
from kinema.configs.transfer import TransferConfig
from kinema.configs.workflow import STAGES, WorkflowConfig

__all__ = [
    "STAGES",
    "ClipConfig",
    "DisMoConfig",
    "EffectsConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "FPTConfig",
    "FlowDatasetConfig",
    "FlowFeatConfig",
    "FlowNetworkConfig",
    "KNNConfig",
    "LoaderConfig",
    "MasksConfig",
    "PageConfig",
    "PairFilterConfig",
    "PokesConfig",
    "PricesConfig",
    "RegisterConfig",
    "RenderedConfig",
    "SearchConfig",
    "ShardConfig",
    "TeachConfig",
    "TrackConfig",
    "TrainConfig",
    "TransferConfig",
    "TransferTrainingConfig",
    "WorkflowConfig",
    "build",
    "config_hash",
    "load_stage",
    "resolve_config_path",
]
