"""What `model=` means, everywhere: a name of the table of models, a run folder, a checkpoint, or a registry address."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.configs import TrainConfig, build
from kinema.configs.models.row import Kind, ModelRow
from kinema.configs.models.table import MODELS
from kinema.pipelines.model_names import REGISTRY_SCHEMES, named_row
from kinema.pipelines.registry.files import load_registered, registered_architecture
from kinema.pipelines.train.bucket_run import is_url
from kinema.pipelines.train.checkpoint import MODEL_FILE, read_meta, resolve_checkpoint
from kinema.pipelines.train.trained import load_model

GIVES = {
    "features": "dense features",
    "flow": "flow",
    "pokes": "motion from pokes",
    "tracks": "tracks",
    "motion": "motion embeddings",
    "video": "video",
}


@dataclass(frozen=True)
class LoadedModel:
    """A network in eval mode on the CPU, and what is known of it."""

    network: Any
    row: ModelRow
    trained: TrainConfig | None = None
    """Settings of the run that trained it, where the address is one."""


def load_address(
    address: str,
    weights: str = "",
    *,
    kind: Kind,
    user: str,
    options: dict[str, Any] | None = None,
    untrained: bool = False,
) -> LoadedModel:
    """The network behind an address, if it is of this kind.

    Args: address, as in `model=`; weights, for a name of the table: a file, a URL, or `published`, which is what empty
        means too, unless `untrained` asks for random ones; user, who asks, for the message ("benchmark=davis");
        options, further arguments of the network's builder.
    Raises: ValueError if there is none, it is of another kind, or weights that do not fit or cannot be had;
        StageError if MLflow does not answer.
    """
    row = named_row(address)
    if row is not None:
        _check_kind(address, row, kind, user)
        published = weights == "published" or (not weights and not untrained)
        network = row.make(address, pretrained=published, weights="" if published else weights, **(options or {}))
        return LoadedModel(network, row)
    if weights:
        names = ", ".join(_names(kind))
        raise ValueError(f"weights={weights} goes with a name ({names}); model={address} has its own; leave it out")
    if address.startswith(REGISTRY_SCHEMES):
        row = MODELS[registered_architecture(address)]
        _check_kind(address, row, kind, user)
        return LoadedModel(load_registered(address), row)
    if not is_url(address) and not Path(address).is_dir():
        raise ValueError(_unknown(address, user, _names(kind)))
    checkpoint = resolve_checkpoint(address)
    config = build(TrainConfig, read_meta(checkpoint)["train_config"])
    row = MODELS[config.model]
    _check_kind(address, row, kind, user)
    if options:
        return LoadedModel(row.make(weights=str(checkpoint / MODEL_FILE), **options), row, config)
    return LoadedModel(load_model(checkpoint), row, config)


def row_of(address: str) -> ModelRow:
    """The row of the model behind an address, without loading it. Raises: ValueError if there is none."""
    row = named_row(address)
    if row is not None:
        return row
    if address.startswith(REGISTRY_SCHEMES):
        return MODELS[registered_architecture(address)]
    if not is_url(address) and not Path(address).is_dir():
        names = [name for row in MODELS.values() if row.build for name in row.names()]
        raise ValueError(_unknown(address, "it", names))
    return MODELS[read_meta(resolve_checkpoint(address))["train_config"]["model"]]


def check_kind(address: str, kind: Kind, user: str) -> ModelRow:
    """The row of the model behind an address. Raises: ValueError if it is of another kind, or there is none."""
    row = row_of(address)
    _check_kind(address, row, kind, user)
    return row


def _check_kind(address: str, row: ModelRow, kind: Kind, user: str) -> None:
    if row.kind != kind:
        fitting = " or ".join(MODELS.of_kind(kind))
        what = f"a {row.title}, which gives {GIVES[row.kind]}"
        raise ValueError(f"model={address} is {what}; {user} takes what gives {GIVES[kind]}: {fitting}")


def _unknown(address: str, user: str, names: Sequence[str]) -> str:
    """That there is no such model, with the name that may have been meant, or all that could."""
    near = difflib.get_close_matches(address, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"names are {', '.join(names)}"
    return f"model={address} does not exist; {user} takes a run, a checkpoint, models:/NAME@ALIAS, or a name: {hint}"


def _names(kind: Kind) -> list[str]:
    return [name for model in MODELS.of_kind(kind) if MODELS[model].build for name in MODELS[model].names()]
