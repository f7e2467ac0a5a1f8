"""Which recipe a config asks for: that of its model's row in the table of models."""

from __future__ import annotations

from kinema.configs import TrainConfig
from kinema.configs.models.row import resolve
from kinema.configs.models.table import MODELS
from kinema.pipelines.train.recipes.protocol import Recipe


def make_recipe(config: TrainConfig) -> Recipe:
    """The recipe of `config.model`."""
    return resolve(MODELS[config.model].recipe).of(config)
