"""Published and measured numbers side by side, for every flow network of the project, as a table and as a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float32, UInt8

from kinema.configs.models.table import MODELS
from kinema.pipelines.evaluate.flow.protocols import GROUPED, PROTOCOLS
from kinema.pipelines.evaluate.flow.suite import ModelResult, SetResult
from kinema.pipelines.pictures.images import flow_picture
from kinema.pipelines.report.page import Page

PUBLISHED_PAIRS = {
    "Sintel clean / final": ("sintel_clean_epe", "sintel_final_epe"),
    "KITTI-15 EPE / Fl-all": ("kitti2015_epe", "kitti2015_fl_all"),
}
"""How the table of models writes published figures (Chairs, then Things; Sintel train, KITTI-15 train), and their names
among the metrics."""
ERROR_SCALE_PX = 5.0
SHOWN_WIDTH_PX = 250
_ZERO = "zero flow"
_TITLES = {"epe": "EPE, px", "fl_all": "Fl-all, %"}
_MEASURES = ("epe", "px1", "px3", "px5", "1px", "fl_all", "wauc", "epe_matched", "epe_unmatched")
_SPEEDS = ("epe_s0_10", "epe_s10_40", "epe_s40plus")


def published_figures(row: str) -> dict[str, float]:
    """Figures of a model's paper, by metric; empty where the table of models has none."""
    found: dict[str, float] = {}
    for title, names in PUBLISHED_PAIRS.items():
        numbers = re.findall(r"\d+\.?\d*", MODELS[row].published.get(title, ""))
        found |= {name: float(number) for name, number in zip(names, numbers, strict=False)}
    return found


def comparison(results: Sequence[ModelResult]) -> list[dict[str, Any]]:
    """A line for every flow network of the project, and for every other model that was measured.

    Columns: model; for each figure, `... published` and `... measured`; pairs that were measured. What is unknown is
    an empty cell.
    """
    columns = [*(name for pair in PUBLISHED_PAIRS.values() for name in pair), *_further_columns(results)]
    measured = {result.model: result for result in results}
    lines = []
    for model, row in _lines(results):
        published, own = published_figures(row), measured.get(model)
        line: dict[str, Any] = {"model": model}
        for name in columns:
            value = None if own is None else _measured(own, name)
            if name in published or any(name in published_figures(r) for _, r in _lines(results)):
                line[f"{name} published"] = published.get(name, "")
            line[f"{name} measured"] = "" if value is None else round(value, 3)
        line["pairs"] = "" if own is None else ", ".join(_count(s) for s in own.sets)
        lines.append(line)
    return lines


def metrics(result: ModelResult, prefix: str) -> dict[str, float]:
    """{PREFIX_SET_MEASURE: value} of one model."""
    found = {f"{prefix}_{s.name}_{name}": value for s in result.sets for name, value in s.scores.items()}
    found |= {f"{prefix}_{s.name}_pairs": float(s.pairs) for s in result.sets}
    return found | {f"{prefix}_quarantined": float(len(result.quarantined))}


def write_page(results: Sequence[ModelResult], path: Path) -> Path:
    """The table, every measure, error against motion, and the worst pairs with their error maps."""
    page = Page(
        "Optical flow: published and measured",
        "Zero-shot figures: published ones are of Chairs-then-Things training on the whole training splits; measured "
        "ones of the pairs that were there. They compare where the pairs are all of them.",
    )
    page.section("All flow networks")
    page.table([_readable(line) for line in comparison(results)])
    for result in results:
        page.text(f"{result.model} saw pairs of: {', '.join(_count(s) for s in result.sets)}.")
    page.text(
        "epe: mean end-point error, px; px1, px3, px5: share of pixels nearer to the truth than that; 1px, fl_all: "
        "percent of pixels farther than 1 px, or than 3 px and 5 % of the motion; wauc: percent, 100 is perfect; "
        "s0_10, s10_40, s40plus: by motion in px; matched, unmatched: seen and hidden in the second frame."
    )
    for dataset in dict.fromkeys(s.name for result in results for s in result.sets):
        parts = [(result, s) for result in results for s in result.sets if s.name == dataset]
        first = parts[0][1]
        title = PROTOCOLS[first.dataset].title
        page.section(f"{title} {first.group}" if first.dataset in GROUPED else title)
        page.table([_scores_line(result.model, s) for result, s in parts])
        page.text(
            "Mean error against how far pixels move; ranges double, marked at their middles. Above the dashed line it "
            "would be better to say that nothing moves."
        )
        curves = {result.model: _at_middles(s.by_speed.curve()) for result, s in parts}
        places = sorted({x for xs, _ in curves.values() for x in xs})
        curves[_ZERO] = (places, places)
        page.line_chart(curves, "motion, px", "end-point error, px", doubling=True, reference=_ZERO)
        for result, s in parts:
            for worst in s.worst:
                page.pictures(_pictures(result.model, worst), width=SHOWN_WIDTH_PX)
    left_out = [{"model": r.model, "pair": p, "why": why} for r in results for p, why in r.quarantined.items()]
    page.section("Pairs that were left out")
    page.table(left_out)
    return page.write(path)


def error_picture(error_px: Float32[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """End-point errors from dark (none) to bright (`ERROR_SCALE_PX` and more); grey where the truth is unknown."""
    known = np.isfinite(error_px)
    shade = np.clip(np.where(known, error_px, 0) / ERROR_SCALE_PX, 0, 1)
    picture = (matplotlib.colormaps["inferno"](shade)[..., :3] * 255).round().astype(np.uint8)
    picture[~known] = 128
    return picture


def _at_middles(curve: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    """A curve at the middles of its ranges instead of their lower ends."""
    return [x * 2**0.5 for x in curve[0]], curve[1]


def _readable(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the comparison without the counts, its columns in words."""
    words: dict[str, Any] = {}
    for name, value in line.items():
        figure, _, kind = name.partition(" ")
        measure = next((m for m in _TITLES if figure.endswith(f"_{m}")), "")
        place = figure.removesuffix(f"_{measure}")
        title = " ".join([PROTOCOLS[d].title if d in PROTOCOLS else d for d in place.split("_")])
        if name != "pairs":
            words[f"{title} {_TITLES[measure]} {kind}" if measure else name] = value
    return words


def _pictures(model: str, worst: Any) -> list[tuple[np.ndarray, str]]:
    truth, flow = torch.from_numpy(worst.truth_px), torch.from_numpy(worst.flow_px)
    longest = float(np.nanmax(np.sqrt((worst.truth_px**2).sum(axis=0))))
    return [
        (worst.image1, worst.id),
        (flow_picture(truth, longest), f"truth, up to {longest:.1f} px"),
        (flow_picture(flow, longest), f"{model}, error {worst.epe_px:.2f} px"),
        (error_picture(worst.error_px), f"error, bright from {ERROR_SCALE_PX:g} px"),
    ]


def _lines(results: Sequence[ModelResult]) -> list[tuple[str, str]]:
    """(shown name, row) of the flow networks that were not measured under another name, and of all that were."""
    seen = {result.row for result in results}
    listed = [(name, name) for name in MODELS.of_kind("flow") if name not in seen]
    return [(result.model, result.row) for result in results] + listed


def _further_columns(results: Sequence[ModelResult]) -> list[str]:
    known = {name for pair in PUBLISHED_PAIRS.values() for name in pair}
    wanted = [f"{s.name}_epe" for result in results for s in result.sets]
    return [name for name in dict.fromkeys(wanted) if name not in known]


def _measured(result: ModelResult, metric: str) -> float | None:
    for s in result.sets:
        if metric.startswith(f"{s.name}_") and metric.removeprefix(f"{s.name}_") in s.scores:
            return s.scores[metric.removeprefix(f"{s.name}_")]
    return None


def _count(s: SetResult) -> str:
    return f"{s.name} {s.pairs}" + (f" of {s.expected}" if s.expected else "")


def _scores_line(model: str, s: SetResult) -> dict[str, Any]:
    order = [*_MEASURES, *_SPEEDS, *(name for name in s.scores if name not in (*_MEASURES, *_SPEEDS))]
    return {"model": model, "pairs": s.pairs} | {n: round(s.scores[n], 3) for n in order if n in s.scores}
