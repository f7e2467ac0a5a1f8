"""`kinema evaluate benchmark=flow`: every flow benchmark that a folder holds, for one network or several.

Each network sees each pair once; what cannot be read is left out, counted and named. The test splits, whose truth is
withheld, become submissions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from kinema.pipelines.evaluate.flow.metrics import ErrorBySpeed, FlowErrors
from kinema.pipelines.evaluate.flow.protocols import GROUPED, PROTOCOLS, measures
from kinema.pipelines.evaluate.flow.scores import evaluation_mode, predict
from kinema.pipelines.evaluate.flow.submissions import SUBMITTED, Submission
from kinema.pipelines.flow_datasets import BadPair, FlowDataset, FlowSample, Selection, list_dataset

_KITTI_2012_FOLDERS = ("colored_0", "image_0")


@dataclass
class WorstPair:
    """A pair with a large error, kept for its picture."""

    id: str
    epe_px: float
    image1: UInt8[np.ndarray, "H W 3"]
    flow_px: Float32[np.ndarray, "2 H W"]
    truth_px: Float32[np.ndarray, "2 H W"]
    error_px: Float32[np.ndarray, "H W"]


@dataclass
class SetResult:
    """One network on one data set, or on one rendering of it."""

    dataset: str
    group: str
    scores: dict[str, float]
    pairs: int
    expected: int | None
    """Pairs of the published training split."""
    by_speed: ErrorBySpeed
    worst: list[WorstPair]

    @property
    def name(self) -> str:
        """As in the names of metrics: `sintel_clean`, `kitti2015`."""
        return f"{self.dataset}_{self.group}" if self.dataset in GROUPED else self.dataset


@dataclass
class ModelResult:
    """One network on all data sets."""

    model: str
    row: str
    """Its name in the table of models."""
    sets: list[SetResult] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    """{pair: why it could not be used}."""


def find_sets(root: str | Path, wanted: Sequence[str] = (), split: str = "training") -> dict[str, FlowDataset]:
    """The data sets below a folder: it is one, or its sub-folders are. With `wanted`, those and no others.

    Raises: ValueError where there is none, one that is wanted is not there, or a pair's truth is there without its
    frames.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; benchmark=flow needs the folder of the data sets: data=DIR")
    found: dict[str, FlowDataset] = {}
    for place in [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]:
        for name in wanted or PROTOCOLS:
            if name in found or (not wanted and _is_other_kitti(name, place)):
                continue
            dataset = _listed(name, place, split)
            if dataset is not None:
                found[name] = dataset
    absent = [name for name in wanted if name not in found]
    if absent or not found:
        looked = ", ".join(absent or PROTOCOLS)
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder}: no {split} pairs of {looked} here or one folder below; found {there}")
    for dataset in found.values():
        if dataset.num_broken:
            raise ValueError(f"{dataset.num_broken} pairs with ground truth lack files; {dataset.shortfall()}")
    return {name: found[name] for name in PROTOCOLS if name in found}


def evaluate_sets(
    network: Any,
    name: str,
    row: str,
    datasets: dict[str, FlowDataset],
    iters: int | None,
    keep_worst: int,
    progress: Callable[[str], None],
) -> ModelResult:
    """One network on every pair. `progress` is called with the pair's name after each."""
    result = ModelResult(name, row)
    for dataset_name, dataset in datasets.items():
        protocol = PROTOCOLS[dataset_name]
        steps = iters or getattr(network, "benchmark_iters", {}).get(protocol.iters_as)
        groups: dict[str, _Group] = {}
        with evaluation_mode(network, protocol.padding):
            for sample in _readable(dataset, result, progress):
                flow = predict(network, sample, steps)
                groups.setdefault(sample.group, _Group(keep_worst)).add(sample, flow)
                progress(f"{name} {dataset_name} {sample.id}")
        for group, collected in groups.items():
            expected = None if dataset.expected is None else dataset.expected // (2 if dataset_name in GROUPED else 1)
            result.sets.append(
                SetResult(
                    dataset_name,
                    group,
                    measures(dataset_name, collected.errors),
                    len(collected.errors),
                    expected,
                    collected.errors.by_speed,
                    collected.worst,
                )
            )
    return result


def write_submissions(
    network: Any, datasets: dict[str, FlowDataset], folder: Path, iters: int | None, progress: Callable[[str], None]
) -> dict[str, Path]:
    """Predictions for the test splits: {data set: what to upload or to pack}.

    Raises: BadPair for a pair that cannot be read: a server takes whole submissions only.
    """
    written = {}
    for name, dataset in datasets.items():
        submission = Submission(folder / name, name)
        steps = iters or getattr(network, "benchmark_iters", {}).get(PROTOCOLS[name].iters_as)
        with evaluation_mode(network, PROTOCOLS[name].padding):
            for pair in dataset.pairs:
                submission.add(pair, predict(network, pair.read(), steps))
                progress(f"{name} {pair.id}")
        written[name] = submission.close()
    return written


class _Group:
    """Pairs that are averaged together."""

    def __init__(self, keep_worst: int):
        self.errors, self.keep_worst = FlowErrors(), keep_worst
        self.worst: list[WorstPair] = []

    def add(self, sample: FlowSample, flow: Float32[np.ndarray, "2 H W"]) -> None:
        assert sample.flow_px is not None  # training splits have it
        # Sintel's published figures count its invalid pixels too; the mask is no region of its own.
        regions = {name: mask for name, mask in sample.masks.items() if name != "invalid"}
        error = self.errors.add(
            flow, sample.flow_px, occluded=sample.occlusion, candidates_px=sample.candidates_px, masks=regions
        )
        epe = float(np.nanmean(error))
        self.worst.append(WorstPair(sample.id, epe, sample.image1, flow, sample.flow_px, error))
        self.worst.sort(key=lambda pair: -pair.epe_px)
        del self.worst[self.keep_worst :]


def _readable(dataset: FlowDataset, result: ModelResult, progress: Callable[[str], None]) -> Iterator[FlowSample]:
    for pair in dataset.pairs:
        try:
            yield pair.read()
        except BadPair as error:
            result.quarantined[f"{dataset.name}/{pair.id}"] = f"{type(error).__name__}: {error}"
            progress(f"{dataset.name} {pair.id}: left out")


def _listed(name: str, place: Path, split: str) -> FlowDataset | None:
    """A data set's pairs, if the folder holds any of it."""
    if split == "test" and name not in SUBMITTED:
        return None
    passes = tuple(
        p for p in ("clean", "final") if any((place / part / p).is_dir() for part in ("", "training", "test"))
    )
    both_ways = split == "test"
    selection = Selection(
        split="test" if split == "test" else "training",
        passes=passes or ("clean", "final"),
        cameras=("left", "right") if both_ways else ("left",),
        directions=("forward", "backward") if both_ways else ("forward",),
    )
    dataset = list_dataset(name, place, selection)
    return dataset if len(dataset) or dataset.num_broken else None


def _is_other_kitti(name: str, place: Path) -> bool:
    """Both KITTIs have one layout but for the images' folder."""
    if not name.startswith("kitti"):
        return False
    is_2012 = any(
        (place / part / kind).is_dir() for part in ("", "training", "testing") for kind in _KITTI_2012_FOLDERS
    )
    return is_2012 != (name == "kitti2012")


def total_pairs(datasets: dict[str, FlowDataset]) -> int:
    """Pairs that one network will see."""
    return sum(len(dataset) for dataset in datasets.values())
