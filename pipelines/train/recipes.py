"""Which recipe a config asks for."""

from __future__ import annotations

from kinema.configs.schema import TrainConfig
from kinema.pipelines.train.flowfeat_recipe import FlowFeatRecipe


def make_recipe(config: TrainConfig) -> FlowFeatRecipe:
    """The recipe of `config.model`."""
    assert config.model == "flowfeat"
    return FlowFeatRecipe(config.flowfeat, config.weights)


def recipe_settings(config: TrainConfig) -> dict[str, object]:
    """The section of the config that belongs to the recipe."""
    return {"flowfeat": config.flowfeat}
