"""From a registry address back to the network, without pickle."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from kinema.configs.models.row import resolve
from kinema.configs.models.table import MODELS
from kinema.pipelines import tracking
from kinema.pipelines.registry.package import maker_of
from kinema.pipelines.registry.shipped.network import build_model
from kinema.pipelines.registry.versions import Registry


def load_registered(address: str, uri: str = "") -> nn.Module:
    """The module behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`, in eval mode on the CPU, without pickle.

    Args: uri, the registry; default: `MLFLOW_TRACKING_URI`, or the one in the workspace.
    Raises: ValueError if the address is malformed or names nothing; StageError if MLflow does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="kinema-model-") as folder:
        files = _download(address, uri, Path(folder))
        config = _config(address, files)
        # The class is the table's: a version registered before a module moved loads all the same.
        network = resolve(maker_of(MODELS[config["architecture"]], config["arguments"]))
        return build_model(network, config, files / "weights.safetensors")


def registered_architecture(address: str, uri: str = "") -> str:
    """The name in the table of models of what lies behind an address. Raises: as `load_registered`."""
    with tempfile.TemporaryDirectory(prefix="kinema-model-") as folder:
        return _config(address, _download(address, uri, Path(folder)))["architecture"]


def _download(address: str, uri: str, folder: Path) -> Path:
    registry = Registry.at(uri or tracking.tracking_uri(), address)
    version, _ = registry.resolve(address)
    return registry.download(version, folder) / "artifacts"


def _config(address: str, files: Path) -> dict[str, Any]:
    config = json.loads((files / "config.json").read_text())
    if config["architecture"] not in MODELS:
        raise ValueError(f"{address} is a {config['architecture']}, which this kinema cannot build; update it")
    return config
