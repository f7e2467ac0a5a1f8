"""The flow networks by name, as the table of models lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kinema.configs.models.table import MODELS
from kinema.models.flow.dis import DIS


def dis(pretrained: bool = False, weights: str | Path | None = None) -> DIS:
    """OpenCV's Dense Inverse Search behind the call of a network. Raises: ValueError for weights; it has none."""
    if weights:
        raise ValueError(f"weights={weights}: dis has no weights; leave weights out")
    return DIS()


def flow_network(name: str, pretrained: bool = False, weights: str | Path | None = None, scale: int = 0) -> nn.Module:
    """A flow network in eval mode, `model(image1, image2, iters=None) -> [B, 2, H, W]` px.

    Raises: ValueError for an unknown name, weights that do not fit, or a scale where there is none.
    """
    names = [known for known in MODELS.of_kind("flow") if MODELS[known].build]
    if name not in names:
        raise ValueError(f"model={name} is no flow network; use one of {', '.join(names)}")
    row = MODELS[name]
    options: dict[str, Any] = {}
    if row.teacher is not None and row.teacher.takes_scale:
        options["scale"] = scale
    elif scale:
        raise ValueError(f"scale={scale}: {name} runs at the size of the frames; use a sea_raft_* network or scale=0")
    return row.make(pretrained=pretrained, weights=weights, **options)
