"""`kinema evaluate`: a model and a benchmark folder in, one table out, logged to the model's run."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinema.configs import EvaluateConfig
from kinema.configs.json_text import json_text
from kinema.configs.models.benchmarks import BENCHMARKS
from kinema.configs.models.row import resolve
from kinema.configs.models.table import MODELS
from kinema.pipelines import tracking
from kinema.pipelines.artifacts.layout import RUN_FILE


@dataclass(frozen=True)
class EvaluateSummary:
    """One number per metric, and where they are."""

    metrics: dict[str, float] = field(default_factory=dict)
    """{name: value}; names begin with the benchmark."""
    model: str = ""
    """What was evaluated."""
    benchmark: str = ""
    """On what."""
    seconds: float = 0.0
    """Wall time."""
    run_id: str = ""
    """MLflow run that got the table."""
    out: str = ""
    """Folder of the table, if one was asked for."""

    def flat(self) -> dict[str, Any]:
        """What `--json` prints: every metric a key of its own."""
        return {**self.metrics, **{k: v for k, v in dataclasses.asdict(self).items() if k != "metrics"}}


def run(config: EvaluateConfig, *, report: Callable[[Any], None] | None = None) -> EvaluateSummary:
    """Evaluate `config.model` on `config.benchmark`.

    Raises: ValueError for a model or folder that does not fit the benchmark; names what would.
    """
    started = time.monotonic()
    benchmark = BENCHMARKS[config.benchmark]
    if not config.data and benchmark.needs_data:
        raise ValueError(f"data is empty; name the folder of the {config.benchmark} benchmark: data=DIR")
    if not config.model:
        fitting = ", ".join(name for name, row in MODELS.items() if config.benchmark in row.benchmarks)
        raise ValueError(f"model is empty; give a run folder, models:/NAME@ALIAS, or one of {fitting}")
    if config.out:
        _check_writable(Path(config.out))
    if tracking.tracking_uri().startswith("http"):
        tracking.open_client(tracking.tracking_uri())  # a server that is down is told before the work
    metrics, pictures = resolve(benchmark.run)(config)
    run_id = _log(config, metrics, pictures)
    summary = EvaluateSummary(
        metrics, config.model, config.benchmark, round(time.monotonic() - started, 2), run_id, config.out
    )
    if config.out:
        write_table(Path(config.out), summary)
    return summary


def _check_writable(folder: Path) -> None:
    """Known before the work, not after it. Raises: ValueError."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "is not a folder" if not there.is_dir() else "is not writable"
        raise ValueError(f"out={folder} cannot be made: {there} {why}; choose another out=")


def _log(config: EvaluateConfig, metrics: dict[str, float], pictures: Sequence[Path] = ()) -> str:
    """Log to the run asked for, else to the run that made the model, else to a run of its own; returns its id."""
    run_id, workspace = config.run_id, None
    for folder in (Path(config.model), Path(config.model).parent.parent):
        if (folder / RUN_FILE).is_file():
            record = json.loads((folder / RUN_FILE).read_text())
            run_id, workspace = run_id or record.get("run_id", ""), tracking.workspace_of(record)
            break
    tracker = tracking.start_run(
        config.experiment,
        f"evaluate-{config.benchmark}",
        {"evaluate": dataclasses.asdict(config)},
        tags={"kinema.kind": "evaluate"},
        resume=run_id,
        workspace=workspace,
    )
    tracker.log_metrics({f"evaluate.{name}": value for name, value in metrics.items() if value == value})
    for picture in pictures:
        tracker.log_artifact(picture, f"evaluate/{config.benchmark}")
    tracker.end()
    return tracker.run_id


def write_table(folder: Path, summary: EvaluateSummary) -> None:
    """`table.json` and `table.csv` in the folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".table.partial"
    partial.write_text(json_text(summary.flat(), indent=1, sort_keys=True) + "\n")
    os.replace(partial, folder / "table.json")
    with partial.open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["metric", "value"])
        rows.writerows(sorted(summary.metrics.items()))
    os.replace(partial, folder / "table.csv")
