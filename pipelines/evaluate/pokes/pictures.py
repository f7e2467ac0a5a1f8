"""Pictures of the `pokes` and `moving_part` benchmarks: curves, and what was predicted on some images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from kinema.models.flow.geometry import points_norm_to_px
from kinema.models.fpt.data_rules import central_square
from kinema.pipelines.evaluate.pokes.parts import PartImage, PartScores, at_pixels
from kinema.pipelines.evaluate.pokes.scores import PokeSample, PokeScores
from kinema.pipelines.pictures.images import panel

POKE_COLOUR = (255, 235, 59)
TRUE_COLOUR = (102, 187, 106)
PREDICTED_COLOUR = (239, 83, 80)
EXAMPLE_SIDE_PX = 320
_SUBPIXEL_BITS = 4
_COLOURS = ("#3e63dd", "#e5484d", "#30a46c", "#8e4ec6", "#f76b15", "#12a594", "#ad7f58", "#60646c")

Picture = UInt8[np.ndarray, "H W 3"]


def error_picture(scores: PokeScores, side_px: int) -> Picture:
    """End-point error and log-likelihood over the number of pokes, with what needs no model beside them."""
    figure, (left, right) = _figure(2)
    counts = [f"{row['pokes']:g}" for row in scores.rows]
    places = range(len(counts))
    left.plot(places, [row["epe_px"] for row in scores.rows], "o-", color=_COLOURS[0], label="predicted mean")
    nearest = [row["nearest_poke_epe_px"] for row in scores.rows]
    left.plot(places, nearest, "s--", color=_COLOURS[1], label="copy of the nearest poke")
    left.axhline(scores.summary["still_epe_px"], color=_COLOURS[7], linestyle=":", label="no motion")
    left.set_ylim(bottom=0)
    left.set_ylabel(f"end-point error, px at {side_px} x {side_px}")
    left.legend(frameon=False, fontsize=8)
    right.plot(places, [row["nll_nats"] for row in scores.rows], "o-", color=_COLOURS[0])
    right.set_ylabel("negative log-likelihood, nats")
    for axes in (left, right):
        axes.set_xticks(list(places), counts)
        axes.set_xlabel("pokes")
    return _drawn(figure)


def calibration_picture(scores: PokeScores) -> Picture:
    """Observed over expected coverage of credible regions, one curve per number of pokes."""
    figure, (axes,) = _figure(1)
    expected = [0.0, *scores.curves["probabilities"], 1.0]
    axes.plot([0, 1], [0, 1], color="#b0b4ba", linewidth=1, label="calibrated")
    for number, (count, observed) in enumerate(scores.curves["coverage"].items()):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(expected, [0.0, *observed, 1.0], color=colour, linewidth=1.4, label=f"{count} pokes")
    axes.set_xlabel("probability of the credible region")
    axes.set_ylabel("share of true motions inside")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize=8)
    return _drawn(figure)


def sparsification_picture(scores: PokeScores) -> Picture:
    """Error of what is left when the most uncertain points are taken away; mean over the numbers of pokes above 0."""
    figure, (axes,) = _figure(1)
    curves = [curve for count, curve in scores.curves["sparsification"].items() if count != "0"]
    styles = {"deviation": (_COLOURS[0], "-"), "entropy": (_COLOURS[1], "--"), "oracle": (_COLOURS[7], ":")}
    labels = {"deviation": "by predicted deviation", "entropy": "by predicted entropy", "oracle": "by the error itself"}
    removed = scores.curves["removed_shares"]
    for name, (colour, style) in styles.items():
        mean = np.mean([curve[name] for curve in curves], axis=0)
        axes.plot(removed, mean, style, color=colour, linewidth=1.4, label=labels[name])
    axes.axhline(1, color="#b0b4ba", linewidth=1, label="at random")
    axes.set_xlabel("share of points taken away")
    axes.set_ylabel("error of the rest, relative")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return _drawn(figure)


def threshold_picture(scores: PartScores) -> Picture:
    """Mean IoU over the threshold of the divergence, on the images that it was chosen on and on the others."""
    figure, (axes,) = _figure(1)
    for number, split in enumerate(("test", "tune")):
        if scores.of(split):  # type: ignore[arg-type]
            curve = scores.curve(split)  # type: ignore[arg-type]
            axes.plot(scores.thresholds_nats, curve, color=_COLOURS[number], linewidth=1.4, label=f"{split} images")
    axes.axvline(scores.threshold_nats, color="#60646c", linestyle=":", label=f"{scores.threshold_nats:.3g} nats")
    axes.axhline(scores.flat()["everything_miou"], color="#b0b4ba", linewidth=1, label="everything moves")
    axes.set_xscale("log")
    axes.set_xlabel("threshold of the divergence, nats")
    axes.set_ylabel("mean IoU")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    return _drawn(figure)


def sample_picture(
    sample: PokeSample, means: Mapping[int, Float[np.ndarray, "Q 2"]], side: int = EXAMPLE_SIDE_PX
) -> Picture:
    """One panel per number of pokes: pokes (yellow), true (green) and predicted (red) motion of the queries.

    Args: means, the predicted motion by number of pokes.
    """
    image = ((sample.image.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte().numpy()
    grey = _greyed(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA))
    panels = []
    for count, mean in means.items():
        picture = grey.copy()
        for colour, flow in ((TRUE_COLOUR, sample.query_flow.numpy()), (PREDICTED_COLOUR, mean)):
            _arrows(picture, sample.query_pos.numpy(), flow, colour)
        _arrows(picture, sample.poke_pos[:count].numpy(), sample.poke_flow[:count].numpy(), POKE_COLOUR, thickness=2)
        panels.append(_titled(picture, f"{count} pokes"))
    return panel(panels, columns=min(4, len(panels)))


def part_picture(
    image: PartImage,
    information: Float[np.ndarray, "pokes g g"],
    threshold_nats: float,
    side: int = EXAMPLE_SIDE_PX,
) -> Picture:
    """One row per poke: the image with the poke, the divergence, and what it calls moving (red), the part outlined."""
    top, left, size = central_square(*image.frame.shape[:2])
    square = cv2.resize(image.frame[top : top + size, left : left + size], (side, side), interpolation=cv2.INTER_AREA)
    panels = []
    for poke, nats in zip(image.pokes, information, strict=True):
        shown = at_pixels(nats, side)
        poked = square.copy()
        _arrows(poked, np.array([poke.pos]), np.array([poke.flow]), POKE_COLOUR, thickness=2)
        part = cv2.resize(poke.mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST).astype(bool)
        panels += [poked, _heat(np.log1p(shown)), _mask_picture(square, shown >= threshold_nats, part)]
    return panel(panels, columns=3)


def _mask_picture(square: Picture, found: Bool[np.ndarray, "S S"], part: Bool[np.ndarray, "S S"]) -> Picture:
    picture = _greyed(square)
    picture[found] = picture[found] // 2 + np.array(PREDICTED_COLOUR, np.uint8) // 2
    outlines, _ = cv2.findContours(part.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, TRUE_COLOUR, 1, cv2.LINE_AA)
    return picture


def _heat(values: Float[np.ndarray, "S S"]) -> Picture:
    scaled = np.rint(255 * values / max(float(values.max()), 1e-9)).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def _greyed(picture: Picture) -> Picture:
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor((grey // 2 + 40).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def _arrows(
    picture: Picture, pos: np.ndarray, flow: np.ndarray, colour: tuple[int, int, int], thickness: int = 1
) -> None:
    side = len(picture)
    starts, ends = (points_norm_to_px(torch.from_numpy(p), side, side).numpy() for p in (pos, pos + flow))
    for start, end in zip(_fixed(starts), _fixed(ends), strict=True):
        cv2.arrowedLine(picture, start, end, colour, thickness, cv2.LINE_AA, _SUBPIXEL_BITS, tipLength=0.25)


def _fixed(points_px: np.ndarray) -> list[tuple[int, int]]:
    limit = 1 << 14  # beyond, what is drawn is far outside and the fixed-point numbers would overflow
    steps = np.rint(np.clip(points_px, -limit, limit) * (1 << _SUBPIXEL_BITS)).astype(int)
    return [(int(x), int(y)) for x, y in steps]


def _titled(picture: Picture, title: str) -> Picture:
    cv2.putText(picture, title, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    return picture


def _figure(columns: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * columns, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        for side, spine in one.spines.items():
            spine.set_visible(side in ("left", "bottom"))
        one.grid(alpha=0.25)
    return figure, axes


def _drawn(figure: Any) -> Picture:
    figure.canvas.draw()
    return np.array(figure.canvas.buffer_rgba())[..., :3].copy()
