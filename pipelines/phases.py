"""A curriculum in one workflow file: phases, each a workflow that differs from the file's in what the phase says.

A phase trains from the weights of the one before it, and keeps its artifacts in a folder of its own name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kinema.configs import WorkflowConfig, build
from kinema.configs.load import to_mapping


def phase_config(config: WorkflowConfig, name: str, previous_run: str) -> WorkflowConfig:
    """The workflow of one phase.

    Args: previous_run, folder of the run whose weights it starts from unless it names others; empty for the first.
    Raises: ValueError, naming the phase, for keys or values that no workflow has.
    """
    changes = config.phases[name]
    if not isinstance(changes, Mapping):
        raise ValueError(f"phases.{name}={changes!r} is a section; write phases.{name}.train.steps=VALUE and such")
    base = {key: value for key, value in to_mapping(config).items() if key != "phases"}
    try:
        phase = build(WorkflowConfig, _merged(base, changes))
    except ValueError as error:
        raise ValueError(f"phases.{name}: {error}") from None
    if phase.phases:
        raise ValueError(f"phases.{name} has phases of its own; write them one after another")
    train = phase.train
    if previous_run and not train.weights:
        train = dataclasses.replace(train, weights=previous_run)
    workspace = phase.workspace if "workspace" in changes else str(Path(config.workspace) / name)
    return dataclasses.replace(phase, name=f"{config.name}-{name}", workspace=workspace, train=train)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `changes` says, section by section; lists are replaced."""
    found = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merged(found[key], value) if both else value
    return found
