"""MLflow runs of workflows and stages. The only importer of mlflow besides registry/.

`MLFLOW_TRACKING_URI` is honoured; unset means SQLite beside the stage's `out=`. Opening a run fails early and clearly.
After that, losing MLflow never ends or delays a stage: metrics wait in a spool and are sent from a thread until they
arrive (metric_spool.py), and what else could not be logged is said aloud, once per kind.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kinema.configs.json_text import json_text
from kinema.configs.paths import in_package_cache
from kinema.pipelines.errors import StageError
from kinema.pipelines.metric_spool import Entry, Sender, Spool

try:
    import fcntl
except ImportError:  # Windows has none, and no lock then
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DEFAULT_EXPERIMENT = "kinema"
MAX_PARAM_LENGTH = 5000
MAX_TAG_LENGTH = 5000
PARAMS_PER_CALL = 100
ARRIVAL_S = 30.0
"""How long the end of a run waits for metrics that MLflow has not taken yet."""
PENDING_FILE = "mlflow_pending.jsonl"
"""In a run's folder, while there are some."""
LOCKED_WAITS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Waits between tries while a SQLite database is locked, on top of SQLite's own."""

T = TypeVar("T")

_parent: contextvars.ContextVar[RunHandle | None] = contextvars.ContextVar("kinema_parent_run", default=None)
_home: contextvars.ContextVar[Path | None] = contextvars.ContextVar("kinema_tracking_home", default=None)
_told: set[str] = set()


@dataclass(frozen=True)
class RunHandle:
    """An MLflow run by address; travels to other processes."""

    uri: str
    run_id: str
    experiment_id: str


def tracking_uri(workspace: str | Path | None = None) -> str:
    """`MLFLOW_TRACKING_URI`, or SQLite in a folder: `workspace`, else the one beside `out=`, else the working folder.

    Raises: ValueError for a package cache, which Ray deletes with the database in it.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if given:
        return given
    folder = Path(workspace or _home.get() or ".").expanduser().resolve()
    if in_package_cache(folder):
        raise ValueError(
            f"runs would be logged to {folder / 'mlflow.db'}, in a package cache that Ray deletes; set "
            "MLFLOW_TRACKING_URI, or out= to a folder that all nodes see"
        )
    return f"sqlite:///{folder / 'mlflow.db'}"


def home() -> Path | None:
    """The folder where embedded tracking lies at the moment, if a stage's `out` or a workspace says so."""
    return _home.get()


@contextlib.contextmanager
def logging_beside(out: str) -> Iterator[None]:
    """Meanwhile, what is logged without MLFLOW_TRACKING_URI goes to SQLite beside `out`, if that is a local folder."""
    token = _home.set(None if not out or "://" in out else Path(out).expanduser().resolve().parent)
    try:
        yield
    finally:
        _home.reset(token)


def open_client(uri: str) -> MlflowClient:
    """A client whose store exists. A SQLite database is made and migrated by one process at a time.

    Raises: StageError if the store cannot be reached.
    """
    # A server that is down should be noticed in seconds, not after the default of some minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    # Jitter would be drawn from Python's shared generator, in the middle of a training step.
    os.environ["MLFLOW_HTTP_REQUEST_BACKOFF_JITTER"] = "0"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # tells of every table it creates
    database = sqlite_path(uri)
    try:
        with _one_process(database):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            patiently(lambda: client.search_experiments(max_results=1))
    except _failures() as error:
        raise StageError(_unreachable(uri, database, error)) from None
    return client


def _unreachable(uri: str, database: Path | None, error: Exception) -> str:
    if database is None:
        advice = "start it, or unset MLFLOW_TRACKING_URI to log to SQLite"
        return f"MLflow at {uri} does not answer ({_first_line(error)}); {advice}"
    given = "named by MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "MLFLOW_TRACKING_URI is unset"
    return (
        f"MLflow's own database {database} ({given}) cannot be used: {_first_line(error)}; make its folder writable, "
        "move a damaged file away, or set MLFLOW_TRACKING_URI"
    )


@contextlib.contextmanager
def _one_process(database: Path | None) -> Iterator[None]:
    """Hold a lock beside the database: processes that find none would all create its tables, and all but one fail."""
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_name(f".{database.name}.lock"), "a") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system takes it back however the process ends
        yield


def patiently(call: Callable[[], T]) -> T:
    """The call's result; tried again for a while when other processes keep the database locked."""
    for wait_s in (*LOCKED_WAITS_S, None):
        try:
            return call()
        except _failures() as error:
            if wait_s is None or "database is locked" not in str(error):
                raise
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite:/// address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def workspace_of(record: Mapping[str, Any]) -> Path | None:
    """Folder of the embedded store to which the training of a run.json logged, so that what follows goes there too."""
    database = sqlite_path(record.get("tracking_uri", ""))
    return database.parent if database is not None and database.name == "mlflow.db" else None


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment of this name, created if needed; with SQLite its files lie beside the database."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise ValueError(f"MLflow experiment {name!r} is deleted; restore it or choose another experiment=")
        return found.experiment_id
    database = sqlite_path(uri)
    location = (database.parent / "mlartifacts" / _safe_name(name)).as_uri() if database else None
    with _one_process(database):  # the name is unique: of several processes one creates it
        found = client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        try:
            return patiently(lambda: client.create_experiment(name, artifact_location=location))
        except _failures() as error:
            if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # a server has no such lock: another process was quicker
            if found is None:
                raise
            return found.experiment_id


def start_run(
    experiment: str,
    name: str,
    config: Mapping[str, Any],
    *,
    tags: Mapping[str, str] | None = None,
    inputs: Mapping[str, tuple[str, str]] | None = None,
    parent: RunHandle | None = None,
    resume: str = "",
    workspace: str | Path | None = None,
) -> Tracker:
    """Open a run, nested under `parent` or under the workflow that is going on.

    Args: experiment, its name; empty: the parent's, else `kinema`; config, parameters (nested mappings are flattened to
        dotted names); inputs, {name: (url, hash)} of the data; resume, id of a run to open again if it still exists;
        it goes on, its metrics waiting, where MLflow does not answer.
    Raises: StageError if MLflow does not answer.
    """
    parent = parent or _parent.get()
    uri = parent.uri if parent else tracking_uri(workspace)
    try:
        client = open_client(uri)
    except StageError as error:
        if not resume:
            raise
        _say(f"{error}; this run was there before and goes on, its metrics wait")
        return Tracker.attach(RunHandle(uri, resume, ""))
    _tell_where(uri)
    try:
        if parent and not experiment:
            experiment_number = parent.experiment_id
        else:
            experiment_number = experiment_id(client, uri, experiment or DEFAULT_EXPERIMENT)
        tracker = _reopen(client, uri, resume) if resume else None
        if tracker is None:
            all_tags = {"mlflow.runName": name, **(tags or {})}
            if parent:
                all_tags["mlflow.parentRunId"] = parent.run_id
            run = patiently(lambda: client.create_run(experiment_number, tags=all_tags))
            tracker = Tracker(client, RunHandle(uri, run.info.run_id, experiment_number))
    except _failures() as error:
        raise StageError(f"MLflow at {uri} refused a new run: {_first_line(error)}") from None
    tracker.log_params(flatten(config))
    tracker.log_inputs(inputs or {})
    return tracker


def start_workflow(name: str, config: Mapping[str, Any]) -> Tracker:
    """The parent run; stages that start runs in this process until its `end` are nested below it."""
    experiment = str(config.get("experiment") or config.get("train", {}).get("experiment") or "")
    tracker = start_run(experiment, name, config, tags={"kinema.kind": "workflow"})
    tracker.parent_token = _parent.set(tracker.handle)
    return tracker


class Tracker:
    """One open run. Metrics arrive in order, sooner or later; what else MLflow refuses is reported, never raised."""

    def __init__(self, client: MlflowClient | None, handle: RunHandle, spool: Path | None = None):
        """Args: client, None where MLflow did not answer yet; spool, the file in which metrics wait."""
        self.handle = handle
        self._client = client
        self.problems: dict[str, str] = {}
        self.parent_token: contextvars.Token[RunHandle | None] | None = None
        self.sender = Sender(
            Spool(spool), self._send, _failures, partial(self._report, "metrics for now"), self._refused
        )

    @classmethod
    def attach(cls, handle: RunHandle, spool: Path | None = None) -> Tracker:
        """The same run from another process, whether MLflow answers at the moment or not."""
        return cls(None, handle, spool)

    @property
    def client(self) -> MlflowClient:
        """Raises: StageError while the store cannot be reached."""
        if self._client is None:
            self._client = open_client(self.handle.uri)
        return self._client

    @property
    def run_id(self) -> str:
        """MLflow's id of the run."""
        return self.handle.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters, cut to the length that MLflow stores; names that are set already keep their value."""
        from mlflow.entities import Param

        known = self._try("parameters", lambda: self.client.get_run(self.run_id).data.params) or {}
        fresh = [Param(_safe_name(k), _short(v)) for k, v in params.items() if _safe_name(k) not in known]
        for start in range(0, len(fresh), PARAMS_PER_CALL):
            part = fresh[start : start + PARAMS_PER_CALL]
            self._try("parameters", partial(self.client.log_batch, self.run_id, params=part))

    def log_inputs(self, inputs: Mapping[str, tuple[str, str]]) -> None:
        """The data that went in: {name: (url, hash)}, as MLflow data sets and as tags."""
        from mlflow.entities import Dataset, DatasetInput

        sets = [
            DatasetInput(Dataset(name, digest[:36], "kinema", json_text({"url": url})))
            for name, (url, digest) in inputs.items()
        ]
        if sets:
            self._try("data sets", lambda: self.client.log_inputs(self.run_id, datasets=sets))
        for name, (url, digest) in inputs.items():
            self.set_tag(f"data.{name}.hash", digest)
            self.set_tag(f"data.{name}.url", url)

    def log_metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Queue metrics; they are sent every few seconds and at `flush`."""
        now_ms = int(time.time() * 1000)
        points = [
            {"name": _safe_name(k), "value": float(v), "time_ms": now_ms, "step": step} for k, v in values.items()
        ]
        self.sender.add(points)

    def flush(self, timeout_s: float = ARRIVAL_S) -> None:
        """Wait for queued metrics to arrive, for so long."""
        self.sender.flush(timeout_s)

    def _send(self, entries: list[Entry]) -> None:
        from mlflow.entities import Metric

        if "file" not in entries[0]:
            points = [
                Metric(e["name"], math.nan if e["value"] is None else e["value"], e["time_ms"], e["step"])
                for e in entries
            ]
            patiently(lambda: self.client.log_batch(self.run_id, metrics=points))
        elif Path(entries[0]["file"]).is_file():  # it may be gone by now
            patiently(lambda: self.client.log_artifact(self.run_id, entries[0]["file"], entries[0]["folder"] or None))

    def log_file_later(self, path: str | Path, folder: str = "") -> None:
        """Queue a copy of a file that stays where it is."""
        self.sender.add([{"file": str(path), "folder": folder}])

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Copy a file into the run's artifacts."""
        self._try("files", lambda: self.client.log_artifact(self.run_id, str(path), folder or None))

    def set_tag(self, name: str, value: str) -> None:
        """Set one tag."""
        self._try("tags", lambda: self.client.set_tag(self.run_id, _safe_name(name), str(value)[:MAX_TAG_LENGTH]))

    def end(self, status: str = "FINISHED") -> None:
        """Send what is left and close the run: FINISHED, FAILED or KILLED."""
        self.close()
        self._try("end of run", lambda: self.client.set_terminated(self.run_id, status))
        if self.parent_token is not None:
            _parent.reset(self.parent_token)
            self.parent_token = None

    def close(self) -> None:
        """Send what is left; the run stays open for others."""
        left = self.sender.close(ARRIVAL_S)
        if left:
            path = self.sender.spool.path if self.sender.spool.on_disk else None
            where = f"wait in {path}; the same command sends them" if path else "are lost"
            _say(f"MLflow at {self.handle.uri} does not answer: {left} metric values {where}")

    def _try(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return patiently(call)
        except _failures() as error:
            self._report(what, error)
            return None

    def _refused(self, error: OSError) -> None:
        path = self.sender.spool.path
        _say(f"{path} cannot be written ({_first_line(error)}): metrics that MLflow has not taken are in memory only")

    def _report(self, what: str, error: Exception) -> None:
        if what not in self.problems:
            _say(f"MLflow at {self.handle.uri} did not take {what} of run {self.run_id}: {_first_line(error)}")
        self.problems[what] = _first_line(error)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _reopen(client: MlflowClient, uri: str, run_id: str) -> Tracker | None:
    from mlflow.exceptions import MlflowException

    try:
        info = client.get_run(run_id).info
        if info.lifecycle_stage != "active":
            return None
        client.update_run(run_id, status="RUNNING")
    except MlflowException:
        return None
    return Tracker(client, RunHandle(uri, run_id, info.experiment_id))


def _failures() -> tuple[type[Exception], ...]:
    """What MLflow raises when its store or server fails (requests' errors are OSErrors)."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, StageError)


def _safe_name(name: str) -> str:
    """A name with only the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json_text(value, default=str)
    return text if len(text) <= MAX_PARAM_LENGTH else text[: MAX_PARAM_LENGTH - 3] + "..."


def _first_line(error: Exception) -> str:
    return " ".join(str(error).partition("[SQL:")[0].split())[:300] or type(error).__name__


def _tell_where(uri: str) -> None:
    """Embedded tracking has no address that anybody gave: said once."""
    if not os.environ.get("MLFLOW_TRACKING_URI") and uri not in _told:
        _told.add(uri)
        _say(f"runs are logged to {uri}; look at them with: mlflow ui --host 127.0.0.1 --backend-store-uri {uri}")


def _say(text: str) -> None:
    sys.stderr.write(f"kinema: {text}\n")
