"""Versions and aliases of one registered model in MLflow."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import PIL
import torch

from kinema.pipelines import tracking
from kinema.pipelines.registry.card import Card
from kinema.pipelines.registry.package import Package

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_MODELS = "models:/"
_VERDICTS = ("Champion: ", "Candidate: ")
_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_CONTENT_TAG = "kinema.content_hash"
_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


class Registry:
    """One registered model."""

    def __init__(self, client: MlflowClient, uri: str, name: str):
        self.client, self.uri, self.name = client, uri, name

    @classmethod
    def at(cls, uri: str, address: str) -> Registry:
        """The registry entry that `models:/NAME...` names; ValueError for another address."""
        found = _ADDRESS.fullmatch(address)
        if found is None:
            raise ValueError(f"model address {address!r} is not models:/NAME@ALIAS or models:/NAME/VERSION")
        return cls(tracking.open_client(uri), uri, found["name"])

    def add(self, parts: Package, run_id: str, card: Card, folder: Path) -> int:
        """A new version with these files, alias `candidate`; the present one if these weights are registered.

        Args: folder, a place for the MLflow model that is uploaded.
        """
        self._make_entry(card)
        version = self._same_weights(card.tags[_CONTENT_TAG])
        if version is None:
            model_id = self._log_model(parts, run_id, card, folder)
            with _default_store(self.uri):
                made = self.client.create_model_version(
                    self.name, f"{_MODELS}{model_id}", run_id, tags=dict(card.tags), model_id=model_id
                )
            version = int(made.version)
        for tag, value in card.tags.items():
            self.set_tag(version, tag, value)
        self.client.update_model_version(self.name, str(version), card.description)
        self._log_metrics(version, run_id, card.metrics)
        self.set_alias("candidate", version)
        return version

    def _log_model(self, parts: Package, run_id: str, card: Card, folder: Path) -> str:
        """What `mlflow.pyfunc.log_model` does, without the process-wide store and run that it works on.

        Returns: the id of the logged model, an output of the run.
        """
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        experiment = self.client.get_run(run_id).info.experiment_id
        logged = self.client.create_logged_model(
            experiment,
            self.name,
            source_run_id=run_id,
            tags=dict(card.tags),
            params=dict(card.params),
            model_type=card.kind,
        )
        try:
            record = Model(
                artifact_path=self.name,  # the place itself would tell of this machine
                model_uuid=logged.model_id,
                run_id=run_id,
                model_id=logged.model_id,
                metadata=dict(card.metadata),
            )
            save_pyfunc(parts, folder, record)
            self.client.log_model_artifacts(logged.model_id, str(folder))
        except BaseException:
            self.client.finalize_logged_model(logged.model_id, "FAILED")
            raise
        self.client.finalize_logged_model(logged.model_id, "READY")
        self.client.log_outputs(run_id, models=[LoggedModelOutput(logged.model_id, step=card.step)])
        return logged.model_id

    def _log_metrics(self, version: int, run_id: str, metrics: Mapping[str, float]) -> None:
        """The evaluation's figures, on the model itself: the version's page and comparisons show them."""
        model_id = self.model_id(version)
        if model_id:
            known = {metric.key: metric.value for metric in self.client.get_logged_model(model_id).metrics or ()}
            for name, value in metrics.items():
                if known.get(name) != value:
                    self.client.log_metric(run_id, name, value, model_id=model_id)

    def model_id(self, version: int) -> str:
        """MLflow's id of the logged model behind a version; empty for one that was registered as a run's files."""
        found = self.client.get_model_version(self.name, str(version))
        source = found.source or ""
        return found.model_id or (source.removeprefix(_MODELS) if source.startswith(_MODELS) else "")

    def set_alias(self, alias: str, version: int) -> None:
        """Point an alias at a version."""
        self.client.set_registered_model_alias(self.name, alias, str(version))

    def set_verdict(self, version: int, sentence: str) -> None:
        """Put the sentence on the champion in the version's description, in place of an earlier one."""
        text = self.client.get_model_version(self.name, str(version)).description or ""
        parts = [part for part in text.split("\n\n") if not part.startswith(_VERDICTS)]
        self.client.update_model_version(self.name, str(version), "\n\n".join([*parts[:1], sentence, *parts[1:]]))

    def tags(self, version: int) -> dict[str, str]:
        """All tags of a version."""
        return dict(self.client.get_model_version(self.name, str(version)).tags)

    def set_tag(self, version: int, name: str, value: str) -> None:
        """Set one tag of a version."""
        self.client.set_model_version_tag(self.name, str(version), name, value)

    def champion(self) -> int | None:
        """Version with alias `champion`, if there is one."""
        aliases = self.client.get_registered_model(self.name).aliases
        return int(aliases["champion"]) if "champion" in aliases else None

    def metric(self, version: int, name: str) -> float | None:
        """A metric as recorded with a version."""
        text = self.client.get_model_version(self.name, str(version)).tags.get(f"metric.{name}")
        return None if text is None else float(text)

    def run_metrics(self, run_id: str) -> dict[str, float]:
        """Last value of every metric of a run."""
        return dict(self.client.get_run(run_id).data.metrics)

    def resolve(self, address: str) -> tuple[int, str]:
        """Version that `address` names now, and the hash of its weights and config; ValueError if there is none."""
        from mlflow.exceptions import MlflowException

        found = _ADDRESS.fullmatch(address)
        assert found is not None
        try:
            if found["alias"]:
                version = self.client.get_model_version_by_alias(self.name, found["alias"])
            else:
                version = self.client.get_model_version(self.name, found["version"])
        except MlflowException:
            raise ValueError(
                f"{address} is not in the registry at {self.uri}; register a model first (`kinema register`), or set "
                "MLFLOW_TRACKING_URI to the registry that has it"
            ) from None
        return int(version.version), version.tags.get(_CONTENT_TAG, "")

    def download(self, version: int, folder: Path) -> Path:
        """The files of a version: a folder below `folder`, or the store's own where that is a local one."""
        import mlflow

        model_id = self.model_id(version)
        if model_id:
            source = self.client.get_logged_model(model_id).artifact_location
        else:
            source = self.client.get_model_version_download_uri(self.name, str(version))
        found = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=self.uri)
        return Path(found)

    def _make_entry(self, card: Card) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name, {"kinema.model": card.model}, card.summary)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _same_weights(self, content_hash: str) -> int | None:
        for version in self.client.search_model_versions(f"name = '{self.name}'"):
            if version.tags.get(_CONTENT_TAG) == content_hash:
                return int(version.version)
        return None


def version_of_content(uri: str, content_hash: str) -> str:
    """models:/NAME/VERSION of the newest version with these weights and config in a registry; empty if there is none.

    Raises: StageError if MLflow does not answer.
    """
    client = tracking.open_client(uri)
    found = client.search_model_versions(f"tags.`{_CONTENT_TAG}` = '{content_hash}'")
    newest = max(found, key=lambda version: int(version.creation_timestamp), default=None)
    return f"{_MODELS}{newest.name}/{newest.version}" if newest else ""


def save_pyfunc(parts: Package, folder: Path, record: Any = None) -> None:
    """The package as an MLflow model folder: no pickle, and no path of this machine in it.

    Args: record, the `mlflow.models.Model` that is written as MLmodel.
    """
    import mlflow

    form = importlib.import_module(f"kinema.pipelines.registry.shipped.{parts.serving}")
    with _importable(parts.code), quiet_mlflow():
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(parts.entry),
            artifacts={"weights": str(parts.weights), "config": str(parts.config)},
            code_paths=[str(parts.code)],
            pip_requirements=_requirements(),
            model_config={"device": "cpu"},
            mlflow_model=record,
            signature=signature_of(form),
            input_example=(form.example(), form.PARAMS) if form.PARAMS else form.example(),
        )
    description = folder / "MLmodel"
    text = description.read_text()
    for source in (parts.weights, parts.config):
        text = text.replace(str(source), f"artifacts/{source.name}")
    description.write_text(text.replace(str(parts.entry.parent) + os.sep, ""))


def signature_of(form: Any) -> Any:
    """What `predict` takes and gives, for MLflow.

    Inputs are of MLflow's type `object`, which alone lets both bytes and floats of any size through to `predict`,
    where the form's own checks say what is wrong; outputs and parameters are exact.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    types = {bool: "boolean", int: "long", float: "double", str: "string"}
    return ModelSignature(
        inputs=Schema([TensorSpec(numpy.dtype("O"), (-1,), name) for name in form.INPUTS]),
        outputs=Schema([TensorSpec(numpy.dtype("float32"), shape, name) for name, shape in form.OUTPUTS.items()]),
        params=ParamSchema([ParamSpec(name, types[type(v)], v) for name, v in form.PARAMS.items()]),
    )


@contextlib.contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """MLflow's SQL registry looks the logged model up in the process's default store, whatever the client's is."""
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    before = os.environ.get(_URI_VARIABLE)
    try:
        with _use_tracking_uri(uri):
            yield
    finally:
        if before is None:
            os.environ.pop(_URI_VARIABLE, None)
        else:
            os.environ[_URI_VARIABLE] = before


@contextlib.contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Without MLflow's advice on what is meant so: type hints, whole numbers that cannot be missing, code paths."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _importable(code: Path) -> Iterator[None]:
    """MLflow runs the entry file once while it saves: the package can be imported meanwhile, and is forgotten."""
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(code.parent))
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_bytecode
        sys.path.remove(str(code.parent))
        for name in [n for n in sys.modules if n.partition(".")[0] == code.name]:
            del sys.modules[name]


def _requirements() -> list[str]:
    import mlflow

    packages: dict[str, Any] = {"mlflow": mlflow, "torch": torch, "numpy": numpy, "pillow": PIL}
    return [f"{name}=={str(module.__version__).partition('+')[0]}" for name, module in packages.items()]
