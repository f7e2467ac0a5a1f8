"""Which recipe a config asks for."""

from __future__ import annotations

from typing import Any

from kinema.configs import TrainConfig
from kinema.pipelines.train.recipes.flow import FlowRecipe
from kinema.pipelines.train.recipes.flowfeat import FlowFeatRecipe
from kinema.pipelines.train.recipes.fpt.recipe import FPTRecipe


def make_recipe(config: TrainConfig) -> Any:
    """The recipe of `config.model`, see `protocol.Recipe`."""
    if config.model == "flowfeat":
        return FlowFeatRecipe(config.flowfeat, config.weights)
    if config.model == "fpt":
        return FPTRecipe(config.fpt, config.weights)
    return FlowRecipe(config.model, config.flow_network, config.weights)
