"""`kinema run`: all stages of one file, in order; what is finished and unchanged is skipped.

A stage is skipped when its settings, its inputs' contents and its outputs' files are those of its last finished run
and no stage before it had to run. Stamps live in WORKSPACE/_workflow/STAGE.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import fsspec

from kinema.configs import PricesConfig, WorkflowConfig, config_hash
from kinema.configs.json_text import json_text
from kinema.configs.load import to_mapping
from kinema.configs.rendered import RENDERED
from kinema.configs.shard import FlowLayout, ShardConfig
from kinema.pipelines import engine, tracking
from kinema.pipelines.artifacts import remote
from kinema.pipelines.artifacts.store import is_local
from kinema.pipelines.cluster_status import price_of
from kinema.pipelines.figures import Figures, Listener, export, told_to
from kinema.pipelines.phases import phase_config
from kinema.pipelines.registry import registered_name
from kinema.pipelines.shard.sources import find_sources
from kinema.pipelines.stages import STAGES, stage_module
from kinema.pipelines.summary import summary_fields

# Settings that change how a run is watched or how far it goes, not what it is: a longer run goes on in its folder.
RUN_CADENCE = (
    "out",
    "steps",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "pictures_every",
    "run_name",
)
T = TypeVar("T")
SETTINGS = "settings or inputs changed, running"


@dataclasses.dataclass(frozen=True)
class WorkflowSummary:
    """What each stage did, and where things are."""

    stages: dict[str, str]
    """{stage: `done` or `skipped`}."""
    outputs: dict[str, str]
    """{stage: folder or URL}."""
    summaries: dict[str, dict[str, Any]]
    """{stage: its own summary}; of skipped stages, that of the run that made it."""
    seconds: float
    """Wall time."""
    out: str = ""
    """The workspace."""
    exit_status: int = 0
    """3 if a stage quarantined more than allowed."""


Follow = Callable[[str, str, "WorkflowSummary"], None]


def run(
    config: WorkflowConfig, *, report: Callable[[str], None] | None = None, follow: Follow | None = None
) -> WorkflowSummary:
    """Bring every stage of `config` up to date.

    Args: follow, called as `follow(stage, "begins" | "ended", what there is so far)` around every stage.
    Raises: ValueError for settings that cannot work; StageError from a stage.
    """
    report = report or (lambda line: print(line, file=sys.stderr, flush=True))
    started = time.monotonic()
    if config.phases:
        return _run_phases(config, report, started)
    if "shard" in config.stages and not config.shard.videos:
        raise ValueError("shard.videos is empty; name the folder with your videos: shard.videos=DIR")
    workspace = Path(config.workspace).expanduser().resolve()
    if "shard" in config.stages and not workspace.exists():
        _look_at(config.shard)  # wrong videos leave no workspace behind
    _prepare(workspace)
    with tracking.logging_beside(str(workspace / "_workflow")):
        return _run(config, workspace, report, follow or (lambda stage, event, so_far: None), started)


def _run(
    config: WorkflowConfig, workspace: Path, report: Callable[[str], None], follow: Follow, started: float
) -> WorkflowSummary:
    outputs: dict[str, str] = {}
    states: dict[str, str] = {}
    summaries: dict[str, dict[str, Any]] = {}
    status = 0

    def so_far() -> WorkflowSummary:
        seconds = round(time.monotonic() - started, 2)
        return WorkflowSummary(states, outputs, summaries, seconds, str(workspace), status)

    with _ParentRun(config) as parent:
        for stage in [s for s in STAGES if s in config.stages]:
            section = resolve_stage(config, stage, workspace, outputs)
            fingerprint = _fingerprint(stage, section, outputs)
            stamp_path = workspace / "_workflow" / f"{stage}.json"
            stamp = _read_stamp(stamp_path)
            outputs[stage] = getattr(section, "out", "") or ""
            changed_above = any(states.get(up) == "done" for up in STAGES[stage].upstream)
            reason = _why_run(stamp, fingerprint, outputs[stage], changed_above)
            if reason is None:
                assert stamp is not None
                states[stage], summaries[stage] = "skipped", stamp["summary"]
                report(f"{stage}: up to date, skipped")
                follow(stage, "ended", so_far())
                continue
            report(f"{stage}: {reason}")
            follow(stage, "begins", so_far())
            parent.start()
            stamp_path.unlink(missing_ok=True)
            same_place = stamp is not None and stamp["out"] == outputs[stage]
            if same_place and (stage == "embed" or (stage == "train" and reason != SETTINGS)):
                _remove_output(outputs[stage], workspace, report)
            with told_to(parent.listener(stage)):
                summary = stage_module(stage).run(section)
            status = max(status, int(getattr(summary, "exit_status", 0)))
            summaries[stage] = summary_fields(summary)
            states[stage] = "done"
            _write_stamp(stamp_path, fingerprint, outputs[stage], summaries[stage])
            follow(stage, "ended", so_far())
    return so_far()


def _run_phases(config: WorkflowConfig, report: Callable[[str], None], started: float) -> WorkflowSummary:
    """Every phase in order; all are checked before the first begins. Stages are named PHASE.STAGE in the summary."""
    for name in config.phases:
        phase_config(config, name, "")
    found = WorkflowSummary({}, {}, {}, 0.0)
    previous, status = "", 0
    for name in config.phases:
        report(f"phase {name}")
        done = run(phase_config(config, name, previous), report=report)
        previous, status = done.outputs.get("train", previous), max(status, done.exit_status)
        found.stages.update({f"{name}.{stage}": state for stage, state in done.stages.items()})
        found.outputs.update({f"{name}.{stage}": place for stage, place in done.outputs.items()})
        found.summaries.update({f"{name}.{stage}": summary for stage, summary in done.summaries.items()})
    return dataclasses.replace(found, seconds=round(time.monotonic() - started, 2), exit_status=status)


def _look_at(shard: ShardConfig) -> None:
    """Raises: ValueError for videos, or a data set, that hold nothing usable."""
    if shard.layout in get_args(FlowLayout):
        if not Path(shard.videos).is_dir():
            raise ValueError(f"shard.videos={shard.videos}: no such folder; name that of the data set {shard.layout}")
    else:
        find_sources(shard.videos, shard.layout, root=shard.root)


def resolve_stage(config: WorkflowConfig, stage: str, workspace: Path, outputs: Mapping[str, str]) -> Any:
    """A stage's section with the paths that were left empty filled in."""
    section = getattr(config, stage)
    clips = outputs.get("shard") or config.shard.out or str(workspace / "clips")
    teacher_out = config.teach.out or str(workspace / "flow" / config.teach.teacher)
    if "teach" not in config.stages and config.shard.layout in get_args(FlowLayout):
        teacher_out = config.shard.flow or str(workspace / "flow" / "truth")
    flow = outputs.get("teach") or teacher_out
    if stage == "shard":
        return dataclasses.replace(section, out=section.out or clips)
    if stage == "teach":
        return dataclasses.replace(section, clips=section.clips or clips, out=section.out or flow)
    if stage == "track":
        out = section.out or str(workspace / "tracks" / section.tracker)
        needed = (section.flow or flow) if section.tracker == "chain" else section.flow
        return dataclasses.replace(section, clips=section.clips or clips, flow=needed, out=out)
    if stage == "train":
        tracks = section.tracks or outputs.get("track", "")
        if section.clips != RENDERED:
            section = dataclasses.replace(
                section, clips=section.clips or clips, flow=section.flow or flow, tracks=tracks
            )
        return dataclasses.replace(section, out=section.out or str(_run_folder(section, workspace)))
    run_folder = outputs.get("train", "")
    if stage == "evaluate":
        out = section.out or str(workspace / "evaluation")
        return dataclasses.replace(section, model=section.model or run_folder, out=out)
    if stage == "register":
        return dataclasses.replace(section, model=section.model or run_folder)
    default_model = type(section)().model
    model = section.model
    if model == default_model:
        model = f"models:/{registered_name(config.register, config.train.model)}@champion"
    return dataclasses.replace(
        section, model=model, clips=section.clips or clips, out=section.out or str(workspace / "features")
    )


def _run_folder(section: Any, workspace: Path) -> Path:
    """A training's folder is named by what it is, so that another recipe or other data never resumes into it."""
    settings = {k: v for k, v in to_mapping(section).items() if k not in RUN_CADENCE}
    data = [
        content_hash(url) for url in (section.clips, section.flow, *filter(None, [section.tracks]), *section.other_flow)
    ]
    identity = config_hash({"settings": settings, "data": data})
    return workspace / "runs" / f"{section.model}-{identity[:8]}"


def _prepare(workspace: Path) -> None:
    try:
        (workspace / "_workflow").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"workspace={workspace} cannot be created ({error.strerror}); choose another") from None


def _why_run(stamp: Mapping[str, Any] | None, fingerprint: str, out: str, changed_above: bool) -> str | None:
    """Why a stage has to run, in words, or None."""
    if stamp is None:
        return "running"
    if stamp["fingerprint"] != fingerprint:
        return SETTINGS
    if changed_above:
        return "a stage before it ran, running"
    if stamp["out"] != out or stamp["files"] != _output_state(out):
        return "its output changed or is gone, running"
    return None


def _fingerprint(stage: str, section: Any, outputs: Mapping[str, str]) -> str:
    parts: dict[str, Any] = {"config": to_mapping(section)}
    if stage == "shard":
        parts["videos"] = source_listing(section.videos)
    for upstream in STAGES[stage].upstream:
        if outputs.get(upstream):
            parts[upstream] = content_hash(outputs[upstream])
    return config_hash(json.loads(json_text(parts, default=str)))


def source_listing(videos: str) -> list[Any]:
    """Names, sizes and modification times of everything under a folder, glob, file or URL."""
    return _asked(videos, _list_sources)


def _asked(url: str, question: Callable[[Any, str], T]) -> T:
    """The answer of a URL's file system; an object store is asked again while its failure may pass."""
    if is_local(url):
        return question(*fsspec.core.url_to_fs(url))
    return remote.call(url, lambda: question(*remote.filesystem(url)))


def _list_sources(filesystem: Any, path: str) -> list[Any]:
    if any(c in path for c in "*?["):
        paths = sorted(filesystem.glob(path))
    else:
        paths = [path] if filesystem.exists(path) else []
    found = []
    for top in paths:
        for name, info in sorted(filesystem.find(top, detail=True).items()):
            stamp = info.get("mtime") or info.get("LastModified") or info.get("ETag")
            found.append([name, info["size"], str(stamp)])
    return found


def content_hash(url: str) -> str:
    """Hash of what identifies an artifact's or run's content: its manifest, sample index and run record."""
    return _asked(url, _hash_of_records) if url else ""


def _hash_of_records(filesystem: Any, path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in ("manifest.json", "samples.parquet", "run.json", "table.json"):
        target = f"{path.rstrip('/')}/{name}"
        if filesystem.exists(target):
            digest.update(name.encode() + filesystem.cat_file(target))
    return digest.hexdigest()


def _output_state(out: str) -> str:
    """State of a stage's files; a stage without a folder of its own (register) has the registry's database."""
    if out:
        return listing_hash(out)
    database = tracking.sqlite_path(tracking.tracking_uri())
    return "remote" if database is None else str(database.is_file())


def listing_hash(url: str) -> str:
    """Hash of the names and sizes of all files under a folder; empty if it is not there."""
    return _asked(url, _hash_of_listing) if url else ""


def _hash_of_listing(filesystem: Any, path: str) -> str:
    if not filesystem.exists(path):
        return ""
    files = sorted((name[len(path) :], info["size"]) for name, info in filesystem.find(path, detail=True).items())
    return hashlib.blake2b(json_text(files).encode(), digest_size=16).hexdigest()


def _remove_output(out: str, workspace: Path, report: Callable[[str], None]) -> None:
    """Make room for a stage that is done again; only below the workspace, where the workflow itself wrote it."""
    filesystem, path = fsspec.core.url_to_fs(out)
    if out and filesystem.exists(path) and Path(path).is_relative_to(workspace):
        report(f"removing {out}, which is made again")
        filesystem.rm(path, recursive=True)


def _read_stamp(path: Path) -> dict[str, Any] | None:
    try:
        stamp = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return stamp if {"fingerprint", "out", "files", "summary"} <= stamp.keys() else None


def _write_stamp(path: Path, fingerprint: str, out: str, summary: Mapping[str, Any]) -> None:
    stamp = {"fingerprint": fingerprint, "out": out, "files": _output_state(out), "summary": summary}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json_text(stamp, indent=1, default=str))
    os.replace(temporary, path)


class _ParentRun:
    """The MLflow run above the stages' runs, opened only if a stage has something to do."""

    def __init__(self, config: WorkflowConfig):
        self.config = config
        self.run: Any = None

    def __enter__(self) -> _ParentRun:
        return self

    def start(self) -> None:
        if self.run is None:
            self.run = tracking.start_workflow(self.config.name, to_mapping(self.config))

    def listener(self, stage: str) -> Listener:
        """Logs how far a stage is, and what its nodes have cost, as metrics over seconds since it began."""
        started, hourly = time.monotonic(), _price_per_hour(self.config.prices)

        def log(figures: Figures) -> None:
            seconds = time.monotonic() - started
            numbers = figures.numbers()
            if hourly:
                numbers["cost_dollars"] = seconds / 3600 * hourly
                export(figures.stage, {"cost_dollars": numbers["cost_dollars"]})
            self.run.log_metrics({f"progress.{stage}.{name}": value for name, value in numbers.items()}, int(seconds))

        return log

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.run is not None:
            self.run.end("FINISHED" if error is None else "FAILED")


def _price_per_hour(prices: PricesConfig) -> float:
    """Of the nodes that are there now; without Ray, this machine is one node with CPUs."""
    if not any(dataclasses.astuple(prices)):
        return 0.0
    return sum(price_of(prices, resources) for resources in engine.resources_of_nodes())
