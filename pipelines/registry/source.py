"""What is registered: the newest checkpoint of a run, or a network of the table with weights; and its card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinema.configs import TrainConfig
from kinema.configs.json_text import json_text
from kinema.configs.load import build
from kinema.configs.models.row import ModelRow
from kinema.configs.models.table import MODELS
from kinema.models.weights import LEDGER, licence_notice
from kinema.pipelines import tracking
from kinema.pipelines.artifacts.layout import RUN_FILE
from kinema.pipelines.model_names import named_row
from kinema.pipelines.registry.card import Card, Origin, describe_version, schema_metadata
from kinema.pipelines.train.checkpoint import read_meta, read_tensors, resolve_checkpoint
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.train.recipes.protocol import ExportedModel


@dataclass(frozen=True)
class Source:
    """A model to register, and what is known of it."""

    row: ModelRow
    exported: ExportedModel
    origin: Origin
    experiment: str = ""
    run_id: str = ""
    """MLflow run that trained it."""
    workspace: Path | None = None
    """Folder of the embedded store that the training logged to."""
    tags: Mapping[str, str] = field(default_factory=dict)


def source_of(model: str, weights: str = "") -> Source:
    """What `model=` names. Raises: ValueError if it is nothing that can be registered."""
    row = named_row(model)
    if row is not None:
        return _published(row, model, weights)
    if weights:
        raise ValueError(f"weights={weights} goes with the name of a network; model={model} has its own; leave it out")
    checkpoint = resolve_checkpoint(model)
    meta = read_meta(checkpoint)
    path = checkpoint.parent.parent / RUN_FILE
    record = json.loads(path.read_text()) if path.is_file() else {}
    trained = build(TrainConfig, meta["train_config"])
    row = MODELS[trained.model]
    _check_served(row, model)
    recipe = make_recipe(trained)
    inputs = record.get("inputs", {})
    tags = {"kinema.step": str(meta["step"]), "kinema.config_hash": record.get("config_hash", "")}
    return Source(
        row,
        recipe.export(recipe.published_model(read_tensors(checkpoint))),
        Origin(
            {name: entry["url"] for name, entry in inputs.items()}, meta["step"], "", tuple(record.get("notices", ()))
        ),
        trained.experiment,
        record.get("run_id", ""),
        tracking.workspace_of(record),
        tags | {f"kinema.data.{name}": entry["hash"] for name, entry in inputs.items()},
    )


def make_card(source: Source, name: str, metrics: Mapping[str, float], content_hash: str) -> Card:
    """Description, tags and figures of the version."""
    row, licences = source.row, source.exported.licences
    tags = {"kinema.model": row.name, "kinema.kind": row.kind, "kinema.content_hash": content_hash, **source.tags}
    tags |= {f"licence.{part}": licence for part, licence in licences.items()}
    tags |= {f"metric.{key}": repr(value) for key, value in metrics.items()}
    if source.origin.notices:
        tags["kinema.notice"] = "; ".join(source.origin.notices)
    parameters = sum(tensor.numel() for tensor in source.exported.tensors.values())
    return Card(
        model=row.name,
        kind=row.kind,
        summary=f"{row.title}: {row.summary}",
        description=describe_version(row, name, source.origin, metrics, licences),
        tags=tags,
        params={"parameters": str(parameters), **{key: json_text(v) for key, v in source.exported.config.items()}},
        metadata=schema_metadata(row),
        metrics=metrics,
        step=source.origin.step,
    )


def _published(row: ModelRow, name: str, weights: str) -> Source:
    _check_served(row, name)
    published = weights in ("", "published")
    network = row.make(name, pretrained=published, weights="" if published else weights)
    exported = _exported(row, name, network)
    entry = LEDGER.get(
        f"{row.name}/{name}" if f"{row.name}/{name}" in LEDGER else name if name in LEDGER else row.weights
    )
    licences = dict(exported.licences)
    if published and entry is not None:
        licences["weights"] = entry.licence
    notice = licence_notice(next((key for key, known in LEDGER.items() if known is entry), "")) if published else ""
    shown = entry.url if published and entry is not None else Path(weights).name
    origin = Origin(weights=shown, notices=tuple(filter(None, [notice])))
    return Source(row, dataclasses.replace(exported, licences=licences), origin)


def _exported(row: ModelRow, name: str, network: Any) -> ExportedModel:
    """As a training's recipe would export it; a network that is not trained here has one form."""
    if not row.recipe:
        return ExportedModel(row.name, {}, dict(network.state_dict()))
    assert row.settings is not None, "a model that is trained here has settings"
    settings: Any = row.settings()
    chooser = next((f.name for f in dataclasses.fields(settings) if f.name in ("variant", "preset")), "")
    if chooser and name != row.name:
        settings = dataclasses.replace(settings, **{chooser: name})
    return make_recipe(TrainConfig(model=row.name, settings=settings)).export(network)


def _check_served(row: ModelRow, model: str) -> None:
    if not row.serving:
        known = ", ".join(name for name, other in MODELS.items() if other.serving)
        raise ValueError(f"model={model} is a {row.title}, which has no form in the registry; known are {known}")
