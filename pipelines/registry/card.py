"""What is written beside a registered model for people: what it is, on what it was trained, how to call it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kinema.configs.models.row import ModelRow
from kinema.models.weights import LEDGER

MAX_METRIC_ROWS = 40


@dataclass(frozen=True)
class Card:
    """Texts, tags and figures of one version."""

    model: str
    """Name in the table of models."""
    kind: str
    """What it gives: features, flow, pokes, tracks, motion."""
    summary: str
    """One paragraph for the registered model."""
    description: str
    """Markdown for the version."""
    tags: Mapping[str, str]
    params: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Goes into MLmodel: the true types and shapes of the inputs."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True)
class Origin:
    """Where the weights come from."""

    data: Mapping[str, str] = field(default_factory=dict)
    """{name: URL} of the artifacts it was trained on."""
    step: int = 0
    """Optimizer steps; 0 for published weights."""
    weights: str = ""
    """The published weights' source, where it was not trained here."""
    notices: tuple[str, ...] = ()
    """What a user must know of it."""


def describe_version(
    row: ModelRow, name: str, origin: Origin, metrics: Mapping[str, float], licences: Mapping[str, str]
) -> str:
    """The version's description, Markdown."""
    form = serving_form(row)
    parts = [f"**{row.title}**: {row.summary}"]
    if origin.step:
        data = ", ".join(f"{part} `{url}`" for part, url in origin.data.items())
        parts.append(f"Trained with kinema for {origin.step:,} steps" + (f" on {data}." if data else "."))
    if origin.weights:
        parts.append(f"Published weights: {origin.weights}.")
    parts += [f"**Note:** {notice}." for notice in origin.notices]
    if row.weights in LEDGER:
        parts.append(f"Paper: {LEDGER[row.weights].paper}.")
    if metrics:
        shown = sorted(metrics.items())[:MAX_METRIC_ROWS]
        parts.append("| metric | value |\n|---|---|\n" + "\n".join(f"| {key} | {value:.5g} |" for key, value in shown))
    if licences:
        parts.append("Licences: " + ", ".join(f"{part} {licence}" for part, licence in licences.items()) + ".")
    inputs = "\n".join(f"| `{key}` | {text} |" for key, text in form.INPUTS.items())
    parts.append(f"| input | what it takes |\n|---|---|\n{inputs}")
    outputs = "\n".join(f"| `{key}` | float32, {_axes(shape)} |" for key, shape in form.OUTPUTS.items())
    parts.append(f"| output | what it is |\n|---|---|\n{outputs}")
    if form.PARAMS:
        means = getattr(form, "PARAMS_MEAN", {})
        rows = "\n".join(f"| `{key}` | `{value}` | {means.get(key, '')} |" for key, value in form.PARAMS.items())
        parts.append(f"| param | default | meaning |\n|---|---|---|\n{rows}")
    first = next(iter(form.INPUTS))
    call = first if len(form.INPUTS) == 1 else "{" + ", ".join(f'"{key}": {key}' for key in form.INPUTS) + "}"
    parts.append(
        "```python\nimport mlflow\n\n"
        f'model = mlflow.pyfunc.load_model("models:/{name}@champion")\noutputs = model.predict({call})\n```'
    )
    return "\n\n".join(parts)


def serving_form(row: ModelRow) -> Any:
    """The module that answers `predict` for a model: INPUTS, OUTPUTS, PARAMS, example()."""
    return importlib.import_module(f"kinema.pipelines.registry.shipped.{row.serving}")


def schema_metadata(row: ModelRow) -> dict[str, Any]:
    """Types and shapes in words, for programs that read MLmodel: MLflow's own types know no `uint8 or float`."""
    form = serving_form(row)
    shapes = {name: list(shape) for name, shape in form.OUTPUTS.items()}
    return {"kinema": {"model": row.name, "kind": row.kind, "inputs": dict(form.INPUTS), "outputs": shapes}}


def _axes(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join("any" if side == -1 else str(side) for side in shape) + "]"
