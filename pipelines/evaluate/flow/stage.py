"""Benchmarks of flow networks: Sintel, KITTI, Middlebury, one by one or all that a folder holds."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

from kinema.configs import EvaluateConfig
from kinema.configs.models.table import MODELS
from kinema.pipelines.evaluate.flow.comparison import comparison, metrics, write_page
from kinema.pipelines.evaluate.flow.scores import evaluate_flow, find_samples
from kinema.pipelines.evaluate.flow.suite import (
    ModelResult,
    evaluate_sets,
    find_sets,
    total_pairs,
    write_submissions,
)
from kinema.pipelines.model_address import check_kind, load_address, named_row, row_of
from kinema.pipelines.progress import Progress


def run_flow(config: EvaluateConfig) -> tuple[dict[str, float], list[Path]]:
    """Error of a flow network on a benchmark's pairs. Raises: ValueError for a model or data that do not fit."""
    user = f"benchmark={config.benchmark}"
    model = load_address(config.model, config.weights, kind="flow", user=user, options=_options(config))
    total = len(find_samples(config.data, config.benchmark))  # type: ignore[arg-type]
    progress = Progress("evaluate", total, "pairs")
    values = evaluate_flow(
        model.network,
        config.data,
        config.benchmark,  # type: ignore[arg-type]
        iters=config.iters or None,
        progress=lambda done, _total, name: progress.update(done, name),
    )
    progress.close()
    return {f"{config.benchmark}_{name}": float(value) for name, value in values.items()}, []


def run_suite(config: EvaluateConfig) -> tuple[dict[str, float], list[Path]]:
    """Every flow benchmark in a folder, for `model` and `flow.models`; or submissions for the withheld splits.

    Metrics are `flow_SET_MEASURE`, those of further models `flow_MODEL_SET_MEASURE`; `out` gets flow.html, flow.csv.
    Raises: ValueError for a model or data that do not fit.
    """
    user = f"benchmark={config.benchmark}"
    datasets = find_sets(config.data, config.flow.datasets, config.flow.split)
    for dataset in filter(lambda d: not d.is_complete, datasets.values()):
        sys.stderr.write(f"evaluate: {dataset.shortfall()}; measuring what is there\n")
    if config.flow.split == "test":
        return _submit(config, datasets, user)
    addresses = [(config.model, config.weights), *(_address(text) for text in config.flow.models)]
    for address, _ in addresses[1:]:
        check_kind(address, "flow", user)
    progress = Counted(Progress("evaluate", len(addresses) * total_pairs(datasets), "pairs"))
    results = []
    for number, (address, weights) in enumerate(addresses):
        options = _options(config) if number == 0 else {}
        loaded = load_address(address, weights, kind="flow", user=user, options=options)
        name = address if address in MODELS else Path(address).name or address
        iters = (config.iters or None) if number == 0 else None
        results.append(
            evaluate_sets(loaded.network, name, loaded.row.name, datasets, iters, config.flow.worst, progress.step)
        )
    progress.close()
    found = metrics(results[0], "flow")
    for result in results[1:]:
        found |= metrics(result, f"flow_{result.model}")
    return found, _write(config, results)


def _write(config: EvaluateConfig, results: list[ModelResult]) -> list[Path]:
    """The page and its table in `out`, if there is one."""
    if not config.out:
        return []
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    lines, partial = comparison(results), folder / ".flow.partial"
    with partial.open("w", newline="") as handle:
        table = csv.DictWriter(handle, list(dict.fromkeys(name for line in lines for name in line)))
        table.writeheader()
        table.writerows(lines)
    partial.replace(folder / "flow.csv")
    return [write_page(results, folder / "flow.html"), folder / "flow.csv"]


def _submit(config: EvaluateConfig, datasets: dict, user: str) -> tuple[dict[str, float], list[Path]]:
    if not config.out:
        raise ValueError("out is empty; name the folder for the submissions: out=DIR")
    if config.flow.models:
        raise ValueError(f"flow.models={list(config.flow.models)}: submissions are of one model; give model alone")
    loaded = load_address(config.model, config.weights, kind="flow", user=user, options=_options(config))
    progress = Counted(Progress("evaluate", total_pairs(datasets), "pairs"))
    written = write_submissions(loaded.network, datasets, Path(config.out), config.iters or None, progress.step)
    progress.close()
    for name, path in written.items():
        sys.stderr.write(f"evaluate: {name} submission in {path}\n")
    return {f"flow_{name}_submitted": float(len(datasets[name])) for name in written}, []


def _address(text: str) -> tuple[str, str]:
    """(model, weights) of an entry of `flow.models`."""
    name, _, weights = text.partition(":")
    return (name, weights) if name in MODELS else (text, "")


class Counted:
    """Progress by steps instead of totals."""

    def __init__(self, progress: Progress):
        self.progress, self.done = progress, 0
        self.close = progress.close

    def step(self, note: str) -> None:
        """One more."""
        self.done += 1
        self.progress.update(self.done, note)


def _options(config: EvaluateConfig) -> dict[str, Any]:
    """What the network's builder is told. Raises: ValueError for a scale where there is none."""
    if not config.scale:
        return {}
    row = named_row(config.model) or row_of(config.model)
    if row.teacher is None or not row.teacher.takes_scale:
        listed = ", ".join(name for name, other in MODELS.items() if other.teacher and other.teacher.takes_scale)
        raise ValueError(f"scale={config.scale}: {row.name} runs at the size of the frames; use scale=0, or {listed}")
    return {"scale": config.scale}
