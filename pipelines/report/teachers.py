"""Teachers side by side: the same pairs of frames, each one's flow, where they differ, what is known of their errors
and costs, and which to take for what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32

from kinema.configs.models.table import MODELS
from kinema.models.flow.geometry import resize_flow
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.artifacts.layout import MANIFEST
from kinema.pipelines.loader import Clip, ClipIndex
from kinema.pipelines.pictures.images import flow_picture
from kinema.pipelines.pictures.motion import wheel_picture
from kinema.pipelines.report.page import Page
from kinema.pipelines.report.sections import at_size, flow_pairs, longest, shrink, spread
from kinema.pipelines.scenes.demo import clip_truth
from kinema.pipelines.teach.cost import PairCost, pair_cost

MAX_COMPARED_PAIRS = 64
SHOWN_PAIRS = 4
PICTURE_WIDTH = 230
LONG_GAP = 4
FLAT_PX = 0.5
"""Least full scale of a map of distances: below it teachers are equal for all purposes."""


class Truth(NamedTuple):
    """True motion of a pair, and where it is known."""

    flow_px: Float32[np.ndarray, "2 H W"]
    known: Bool[np.ndarray, "H W"]


@dataclass
class Compared:
    """What is found out about one teacher; sums over pairs by gap."""

    label: str
    flow: Artifact
    cost: PairCost | None = None
    errors_px: dict[int, list[float]] = field(default_factory=dict)
    """Mean error of each compared pair, by the size of its gap."""
    distances_px: dict[int, list[float]] = field(default_factory=dict)
    """Mean distance from the middle of the others, likewise."""
    signals: dict[int, dict[str, float]] = field(default_factory=dict)
    """Means of the stored signals, by the size of the gap."""

    @property
    def teacher(self) -> str:
        """Its name in the table of models, as the artifact tells it."""
        return str(self.flow.manifest["config"].get("teacher", "?"))


def add_teachers(page: Page, targets: Sequence[str], clips_url: str, truth_url: str, with_costs: bool = True) -> None:
    """Compare flow artifacts of the same clips.

    Args: truth_url, a flow artifact that holds the truth, or the folder of rendered videos that were sharded; empty if
        there is none; with_costs, measure processor time and memory of a pair.
    Raises: ValueError for artifacts of different clips, or no pair in common.
    """
    teachers = [Compared(name, Artifact.read(url)) for name, url in zip(_names(targets), targets, strict=True)]
    _check(teachers, targets)
    truth_flow = truth_url if truth_url and (Path(truth_url) / MANIFEST).is_file() else ""
    others = [*targets[1:], *([truth_flow] if truth_flow else [])]
    index = ClipIndex.open(clips_url, targets[0], other_flows=others, skip_duplicates=False)
    pairs = _common_pairs(index, len(targets) + bool(truth_flow))
    if not pairs:
        raise ValueError(f"{', '.join(targets)} have no pair of frames in common; teach them with the same gaps")
    for teacher in teachers:
        teacher.signals = _signals(teacher.flow)
        if with_costs:
            teacher.cost = _cost(teacher)
    chosen = [pairs[i] for i in spread(len(pairs), MAX_COMPARED_PAIRS)]
    shown = {chosen[i] for i in spread(len(chosen), SHOWN_PAIRS)}
    pictures = []
    for number, t, gap in chosen:
        clip = index.clip(number)
        flows = [_flow(clip, i, t, gap) for i in range(len(teachers))]
        truth = _truth(clip, t, gap, truth_url, len(teachers) if truth_flow else None)
        apart = _compare(teachers, flows, truth, abs(gap))
        if (number, t, gap) in shown:
            pictures += _pair_pictures(clip, t, gap, [x.label for x in teachers], flows, truth, apart)
    page.numbers({"teachers": len(teachers), "clips": len(index), "pairs in common": len(pairs),
                  "pairs compared": len(chosen), "with known motion": "yes" if truth_url else "no"})  # fmt: skip
    page.section("Which to take")
    page.table(recommendations(teachers))
    page.section("Figures", _EXPLANATION)
    page.table(_figures(teachers))
    page.section("The same pairs", "Saturation is length, on one scale for all flows of a pair. "
                 "Maps of distances and errors go from black (none) over red and yellow to white.")  # fmt: skip
    page.pictures([(wheel_picture(), "colour of a motion from the centre")])
    for row in pictures:
        page.pictures(row, width=PICTURE_WIDTH)


_EXPLANATION = (
    "Means over the pairs of a gap, forwards and backwards. Error: distance to the true motion where that is known. "
    "To the others: distance from the median of the other teachers' flow (a consensus is none of them, it was made of "
    "theirs). Photometric error, consistency and hidden share are the artifact's own signals. Seconds and memory: one "
    "pair, one direction, one thread of this machine's processor, with random weights; a consensus costs what its "
    "members do."
)


def recommendations(teachers: Sequence[Compared]) -> list[dict[str, Any]]:
    """A teacher for each use, and the figure that speaks for it."""
    gaps = sorted({gap for teacher in teachers for gap in teacher.distances_px})
    groups = {"neighbouring frames": [g for g in gaps if g < LONG_GAP], "long gaps": [g for g in gaps if g >= LONG_GAP]}
    rows = []
    for use, group in groups.items():
        if not group:
            continue
        measure, unit, values = _quality(teachers, group)
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        if known:
            best = min(known, key=lambda name: known[name])
            listed = ", ".join(f"{name} {value:.3g}" for name, value in known.items())
            rows.append({"use": f"{use} (gap {', '.join(map(str, group))})", "take": best,
                         "because": f"least {measure}, {unit}: {listed}"})  # fmt: skip
    costs = {teacher.label: teacher.cost for teacher in teachers if teacher.cost is not None}
    if costs:
        fast = min(costs, key=lambda name: costs[name].cpu_s)
        small = min(costs, key=lambda name: costs[name].peak_gib)
        listed = ", ".join(f"{name} {cost.cpu_s:.3g}" for name, cost in costs.items())
        rows.append({"use": "many clips on processors alone", "take": fast,
                     "because": f"least processor time of a pair, s: {listed}"})  # fmt: skip
        listed = ", ".join(f"{name} {cost.peak_gib:.3g}" for name, cost in costs.items())
        rows.append({"use": "large frames, little memory", "take": small,
                     "because": f"least memory of a pair, GiB: {listed}"})  # fmt: skip
    return rows


def _quality(teachers: Sequence[Compared], gaps: Sequence[int]) -> tuple[str, str, dict[str, float]]:
    """The best measure there is for these gaps, and each teacher's value: true error, else photometric error."""
    if any(teacher.errors_px for teacher in teachers):
        pooled = {t.label: _mean([e for gap in gaps for e in t.errors_px.get(gap, [])]) for t in teachers}
        return "error", "px", pooled
    found = {t.label: _mean([t.signals.get(gap, {}).get("photometric", math.nan) for gap in gaps]) for t in teachers}
    return "photometric error (no true motion is known)", "grey values", found


def _figures(teachers: Sequence[Compared]) -> list[dict[str, Any]]:
    rows = []
    for teacher in teachers:
        for gap in sorted(teacher.distances_px):
            signals = teacher.signals.get(gap, {})
            errors = teacher.errors_px.get(gap, [])
            rows.append(
                {
                    "teacher": teacher.label,
                    "gap": gap,
                    "error, px": _mean(errors) if errors else None,
                    "to the others, px": _mean(teacher.distances_px[gap]),
                    "photometric": signals.get("photometric"),
                    "consistency, px": signals.get("consistency_px"),
                    "hidden share": signals.get("occluded_share"),
                    "s a pair": None if teacher.cost is None else teacher.cost.cpu_s,
                    "GiB": None if teacher.cost is None else teacher.cost.peak_gib,
                }
            )
    return rows


def _check(teachers: Sequence[Compared], targets: Sequence[str]) -> None:
    for teacher, url in zip(teachers, targets, strict=True):
        if teacher.flow.kind != "flow":
            raise ValueError(f"{url} holds {teacher.flow.kind}; teachers are compared by their flow artifacts")
    made_from = [teacher.flow.manifest["inputs"].get("clips") for teacher in teachers]
    if len(set(made_from)) > 1:
        listed = ", ".join(f"{url} from {clips}" for url, clips in zip(targets, made_from, strict=True))
        raise ValueError(f"these were made from different clips ({listed}); give flow of the same clips")


def _names(targets: Sequence[str]) -> list[str]:
    """Last parts of the addresses, or the whole ones where those are the same."""
    short = [target.rstrip("/").rsplit("/", 1)[-1] for target in targets]
    return short if len(set(short)) == len(short) else list(targets)


def _common_pairs(index: ClipIndex, num_flows: int) -> list[tuple[int, int, int]]:
    """(clip, t, gap) of every pair that all hold."""
    found = []
    for number in range(len(index)):
        clip = index.clip(number)
        stored = [set(clip.with_flow(i).flow_pairs) for i in range(num_flows)]
        found += [(number, t, gap) for t, gap in sorted(set.intersection(*stored))]
    return found


def _signals(flow: Artifact) -> dict[int, dict[str, float]]:
    names = ("photometric", "consistency_px", "occluded_share")
    by_gap: dict[int, dict[str, list[float]]] = {}
    for pair in flow_pairs(flow.samples().to_pylist()):
        values = by_gap.setdefault(abs(pair["pair_gap"]), {name: [] for name in names})
        for name in names:
            if pair.get(f"pair_{name}") is not None:
                values[name].append(pair[f"pair_{name}"])
    return {gap: {n: _mean(v) for n, v in values.items() if v} for gap, values in by_gap.items()}


def _cost(teacher: Compared) -> PairCost | None:
    """Of a pair at the size of the stored flow; None for flow that no teacher of the table made."""
    rows = teacher.flow.samples(["height", "width"]).to_pylist()
    row = MODELS.get(teacher.teacher)
    if not rows or row is None or row.teacher is None or not row.build:
        return None
    iters = int(teacher.flow.manifest["config"].get("iters") or 0)
    return pair_cost(teacher.teacher, rows[0]["height"], rows[0]["width"], iters)


def _flow(clip: Clip, number: int, t: int, gap: int) -> Float32[np.ndarray, "2 H W"]:
    """One teacher's flow at the first one's size."""
    flow = clip.with_flow(number).flow(t, gap)
    size = clip.with_flow(0).flow_size
    return flow if flow.shape[1:] == size else resize_flow(torch.from_numpy(flow), *size).numpy()


def _truth(clip: Clip, t: int, gap: int, truth_url: str, number: int | None) -> Truth | None:
    """From the flow artifact `number` of the clip, or from the rendered videos in a folder."""
    if not truth_url:
        return None
    flow = _flow(clip, number, t, gap) if number is not None else None
    if flow is None:
        flow, _ = clip_truth(truth_url, clip.meta).motion(t, gap, clip.with_flow(0).flow_size)
    return Truth(flow, np.isfinite(flow).all(axis=0))


def _compare(
    teachers: Sequence[Compared], flows: Sequence[Float32[np.ndarray, "2 H W"]], truth: Truth | None, gap: int
) -> Float32[np.ndarray, "H W"]:
    """Notes errors and distances of one pair; mean distance of each teacher from the others at each pixel."""
    distances = [np.hypot(*(flow - _middle_of_others(teachers, flows, i))) for i, flow in enumerate(flows)]
    for teacher, flow, distance in zip(teachers, flows, distances, strict=True):
        teacher.distances_px.setdefault(gap, []).append(float(distance.mean()))
        if truth is not None and truth.known.any():
            error = np.hypot(*(flow - truth.flow_px))[truth.known]
            teacher.errors_px.setdefault(gap, []).append(float(error.mean()))
    return np.mean(distances, axis=0)


def _middle_of_others(
    teachers: Sequence[Compared], flows: Sequence[Float32[np.ndarray, "2 H W"]], number: int
) -> Float32[np.ndarray, "2 H W"]:
    """Median of the flows that say something about teacher `number`: those of other networks, if there is one."""
    others = [i for i in range(len(flows)) if i != number]
    by_themselves = [i for i in others if teachers[i].teacher != "consensus"]
    return np.median(np.stack([flows[i] for i in by_themselves or others or [number]]), axis=0)


def _pair_pictures(
    clip: Clip,
    t: int,
    gap: int,
    labels: Sequence[str],
    flows: Sequence[Float32[np.ndarray, "2 H W"]],
    truth: Truth | None,
    apart: Float32[np.ndarray, "H W"],
) -> list[list[tuple[np.ndarray, str]]]:
    """Rows: both frames, the map of disagreement and the true motion; each flow on one scale; the errors below."""
    size = flows[0].shape[1:]
    first, second = (at_size(frame, size) for frame in clip.frames([t, t + gap]))
    known = [] if truth is None else [np.where(truth.known, truth.flow_px, 0.0)]
    scale = max(1e-6, *(longest(flow) for flow in (known or flows)))
    given = [(shrink(first), f"{clip.meta['source']}, frame {t}"), (shrink(second), f"frame {t + gap}")]
    given.append((shrink(heat_picture(apart)), f"disagreement, up to {float(apart.max()):.2f} px"))
    taught = [
        (shrink(flow_picture(torch.from_numpy(flow), scale)), f"{label}, up to {longest(flow):.1f} px")
        for label, flow in zip(labels, flows, strict=True)
    ]
    if truth is None:
        return [given, taught]
    given.append((shrink(flow_picture(torch.from_numpy(truth.flow_px), scale)), "true motion"))
    errors = [np.where(truth.known, np.hypot(*(flow - truth.flow_px)), 0.0) for flow in flows]
    top = max(float(np.percentile(error, 99)) for error in errors)
    wrong = [
        (shrink(heat_picture(error, top)), f"error of {label}, mean {float(error[truth.known].mean()):.2f} px")
        for label, error in zip(labels, errors, strict=True)
    ]
    return [given, taught, wrong]


def heat_picture(values: Float32[np.ndarray, "H W"], top: float = 0.0) -> np.ndarray:
    """Values from 0 to `top` (0: their 99th percentile, at least `FLAT_PX`), black over red and yellow to white."""
    share = np.clip(values / max(top or float(np.percentile(values, 99)), FLAT_PX), 0, 1)[..., None]
    return (255 * np.clip(3 * share - np.arange(3), 0, 1)).astype(np.uint8)


def _mean(values: Sequence[float] | Mapping[str, float]) -> float:
    known = [float(value) for value in values if not math.isnan(float(value))]
    return sum(known) / len(known) if known else math.nan
