"""The registered network, for the predictor and for `load_registered`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .weights_file import read_weights


def build_model(network: Callable[..., nn.Module], config: dict[str, Any], weights: str | Path) -> nn.Module:
    """The network with the arguments that config.json gives and the weights, loaded strictly, in eval mode."""
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in config["arguments"].items()}
    model = network(**arguments)
    model.load_state_dict(read_weights(weights), strict=True)
    return model.eval()
