"""From a run or a checkpoint back to the trained model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from kinema.configs import TrainConfig, build
from kinema.pipelines.train.checkpoint import read_meta, read_tensors, resolve_checkpoint
from kinema.pipelines.train.recipes.choose import make_recipe


def load_model(run_or_checkpoint: str | Path, ema: bool = True) -> nn.Module:
    """The trained model of a run (newest checkpoint) or of one checkpoint, in eval mode on the CPU.

    Args: ema chooses the averaged weights where the model keeps them.
    Raises: ValueError if the folder holds no complete checkpoint.
    """
    checkpoint = resolve_checkpoint(run_or_checkpoint)
    config = build(TrainConfig, read_meta(checkpoint)["train_config"])
    return make_recipe(config).published_model(read_tensors(checkpoint), ema=ema)
