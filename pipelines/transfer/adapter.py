"""The adapter behind `weights=`, and the motion extractor that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kinema.configs import TrainConfig, build
from kinema.models.dismo.transfer.model import NAME, read_adapter
from kinema.pipelines.train.bucket_run import is_url
from kinema.pipelines.train.checkpoint import read_meta, read_tensors, resolve_checkpoint


@dataclass(frozen=True)
class Adapter:
    """Tensors under the published keys, and where they are from."""

    tensors: Mapping[str, Tensor]
    source: str
    extractor: str = ""
    """What the training that made it read motion with; empty for a file."""


def find_adapter(weights: str) -> Adapter:
    """An adapter by what `weights=` says. Raises: ValueError if there is none."""
    if weights in ("", "published"):
        return Adapter(read_adapter("published"), "published")
    is_run = Path(weights).is_dir() or (is_url(weights) and not Path(weights).suffix)
    if not is_run:
        return Adapter(read_adapter(weights), weights)
    checkpoint = resolve_checkpoint(weights, setting="weights")
    trained = build(TrainConfig, read_meta(checkpoint)["train_config"])
    if trained.model != NAME:
        raise ValueError(f"weights={weights} is a run of {trained.model}; give one of model={NAME}, or a file")
    return Adapter(read_tensors(checkpoint), weights, trained.settings.extractor)
