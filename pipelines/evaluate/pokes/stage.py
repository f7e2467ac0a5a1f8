"""The benchmarks `pokes` and `moving_part` of `kinema evaluate`: model, data, tables and pictures."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinema.configs import EvaluateConfig
from kinema.configs.json_text import json_text
from kinema.models.fpt.data_rules import SamplingRule
from kinema.models.fpt.model import FlowPokeTransformer
from kinema.pipelines.evaluate.pokes.data import TrackSamples
from kinema.pipelines.evaluate.pokes.parts import PartImage, PartScores, Split, evaluate_parts
from kinema.pipelines.evaluate.pokes.parts_data import PartFolder, scene_images
from kinema.pipelines.evaluate.pokes.pictures import (
    calibration_picture,
    error_picture,
    part_picture,
    sample_picture,
    sparsification_picture,
    threshold_picture,
)
from kinema.pipelines.evaluate.pokes.scores import PokeModel, PokeSample, predict_samples, score
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.model_address import load_address
from kinema.pipelines.pictures.images import write_png
from kinema.pipelines.progress import Progress

SCENES = "scenes"
"""`data=scenes` asks for rendered scenes instead of a folder (a folder of that name is `data=./scenes`)."""
EXAMPLE_COUNTS = 4


@dataclass(frozen=True)
class EvaluatedModel:
    """A network and what it was trained to be shown."""

    network: FlowPokeTransformer
    gap_s: float = 1.0
    """Time over which it predicts motion."""
    image_px: int = 512
    """Side of the square it is handed."""
    rule: SamplingRule = SamplingRule()
    """When a camera counts as static."""
    clips: str = ""
    """Clips it was trained on, where known."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device


def load_poke_model(model: str, weights: str = "") -> EvaluatedModel:
    """A Flow Poke Transformer from a run, checkpoint or registry URI, or by name (published weights or `weights`).

    Raises: ValueError for another model, a folder without a complete checkpoint, or weights that do not fit.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_address(model, weights, kind="pokes", user="this benchmark")
    network = loaded.network.to(device)
    if loaded.trained is None:
        return EvaluatedModel(network)
    shown = loaded.trained.settings
    rule = SamplingRule(static_flow=shown.static_flow, static_share=shown.static_share)
    return EvaluatedModel(network, shown.gap_s, shown.image_px, rule, loaded.trained.clips)


def run_pokes(config: EvaluateConfig) -> tuple[dict[str, float], list[Path]]:
    """Measures by number of pokes on clips with tracks, and the pictures written.

    Raises: ValueError for a model or data that do not fit.
    """
    if not (config.clips and config.tracks):
        raise ValueError(
            "clips= or tracks= is empty; benchmark=pokes takes clips and the tracks that `kinema track` made from them"
        )
    settings = config.pokes
    index = ClipIndex.open(config.clips, None, config.tracks)
    model = load_poke_model(config.model, config.weights)
    if model.clips and os.path.abspath(model.clips) == os.path.abspath(config.clips):
        _say(f"clips={config.clips} are those that the run was trained on: these are not held-out figures")
    samples = TrackSamples(
        index,
        settings.counts,
        num_queries=settings.num_queries,
        gap_s=settings.gap_s or model.gap_s,
        image_px=model.image_px,
        draws_per_clip=settings.draws_per_clip,
        max_clips=settings.max_clips,
        seed=settings.seed,
        rule=model.rule,
    )
    if unknown := [f"{count}" for count in settings.counts if count not in samples.counts]:
        _say(f"nothing for {', '.join(unknown)} pokes: under half of the clips have tracks for so many")
    progress = Progress("evaluate", len(samples), "samples")
    found = predict_samples(
        model.network,
        samples,
        samples.counts,
        batch_size=settings.batch_size,
        seed=settings.seed,
        device=model.device,
        progress=progress.update,
    )
    progress.close()
    if samples.left_out:
        _say("left out: " + ", ".join(f"{n} {why}" for why, n in sorted(samples.left_out.items())))
    scores = score(found, samples.counts, pck_thresholds=settings.pck_thresholds, side_px=settings.side_px)
    pictures: list[Path] = []
    if config.out:
        folder = Path(config.out)
        _write_rows(folder / "pokes.csv", scores.rows)
        _write_json(folder / "pokes.json", {"rows": scores.rows, "summary": scores.summary, **scores.curves})
        named = {
            "error": error_picture(scores, settings.side_px),
            "calibration": calibration_picture(scores),
            "sparsification": sparsification_picture(scores),
        }
        examples = _examples(model, samples, settings.num_examples)
        pictures = _write_pictures(folder, {**named, **dict(examples)})
    return {f"pokes_{name}": value for name, value in scores.flat().items()}, pictures


def run_moving_part(config: EvaluateConfig) -> tuple[dict[str, float], list[Path]]:
    """Measures of moving-part segmentation, and the pictures written.

    Raises: ValueError for a model or data that do not fit.
    """
    settings = config.pokes
    folder = None if config.data == SCENES else PartFolder(config.data)
    model = load_poke_model(config.model, config.weights)
    images: Iterable[PartImage] = folder or scene_images(
        settings.num_scenes, settings.gap_s or model.gap_s, settings.seed
    )
    total = len(folder) if folder else settings.num_scenes
    looked: list[tuple[PartImage, np.ndarray]] = []

    def look(image: PartImage, split: Split, maps: np.ndarray) -> None:
        if split == "test" and len(looked) < settings.num_examples:
            looked.append((image, maps))

    progress = Progress("evaluate", total, "images")
    scores = evaluate_parts(
        model.network,
        images,
        threshold_nats=settings.threshold_nats,
        grid=settings.grid,
        batch_size=settings.batch_size,
        seed=settings.seed,
        image_px=model.image_px,
        device=model.device,
        progress=progress.update,
        look=look,
    )
    progress.close()
    pictures: list[Path] = []
    if config.out:
        out = Path(config.out)
        _write_rows(out / "moving_part.csv", _part_rows(scores))
        _write_json(out / "moving_part.json", _part_curves(scores))
        named = {"iou_over_threshold": threshold_picture(scores)}
        for number, (image, maps) in enumerate(looked):
            named[f"example_{number}"] = part_picture(image, maps, scores.threshold_nats)
        pictures = _write_pictures(out, named)
    return {f"moving_part_{name}": value for name, value in scores.flat().items()}, pictures


def _examples(model: EvaluatedModel, samples: TrackSamples, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Pictures of the first samples, with a few numbers of pokes from the smallest to the largest."""
    places = np.unique(np.linspace(0, len(samples.counts) - 1, EXAMPLE_COUNTS).round().astype(int))
    shown = [samples.counts[place] for place in places]
    for number, sample in zip(range(count), samples, strict=False):
        means = {n: predicted_mean(model.network, sample, n, model.device) for n in shown}
        yield f"example_{number}", sample_picture(sample, means)


@torch.no_grad()
def predicted_mean(model: PokeModel, sample: PokeSample, num_pokes: int, device: torch.device) -> np.ndarray:
    """Mean predicted motion [Q, 2] of a sample's queries, given its first pokes."""
    d_img = model.embed_image(sample.image[None].to(device))
    pos, flow, queries = (
        x[None].to(device) for x in (sample.poke_pos[:num_pokes], sample.poke_flow[:num_pokes], sample.query_pos)
    )
    return model.predict_parallel(pos, flow, queries, sample.camera_static, d_img).mean[0].cpu().numpy()


def _part_rows(scores: PartScores) -> list[dict[str, Any]]:
    return [
        {
            "image": result.image,
            "poke": result.poke,
            "split": result.split,
            "iou": scores.at(result),
            "average_precision": result.average_precision,
            "part_share": result.part_share,
        }
        for result in scores.results
    ]


def _part_curves(scores: PartScores) -> dict[str, Any]:
    splits: tuple[Split, ...] = ("tune", "test")
    return {
        **scores.flat(),
        "thresholds_nats": scores.thresholds_nats,
        "miou": {split: scores.curve(split) for split in splits if scores.of(split)},
    }


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    def write(partial: Path) -> None:
        with partial.open("w", newline="") as handle:
            table = csv.DictWriter(handle, list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    _whole(path, write)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _whole(path, lambda partial: partial.write_text(json_text(_plain(value), indent=1) + "\n"))


def _plain(value: Any) -> Any:
    """Arrays as lists, and null for what is not a number."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def _write_pictures(folder: Path, pictures: Mapping[str, np.ndarray]) -> list[Path]:
    paths = [folder / f"{name}.png" for name in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        write_png(path, picture)
    return paths


def _say(text: str) -> None:
    print(f"evaluate: {text}", file=sys.stderr, flush=True)
