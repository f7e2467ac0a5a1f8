"""Benchmark `knn`: action classification, and whether appearance leaks, from the nearest neighbours of embeddings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kinema.configs import EvaluateConfig
from kinema.pipelines.errors import StageError
from kinema.pipelines.evaluate.knn.embedders import (
    Embedder,
    flow_histogram,
    frame_features,
    motion_embedder,
    untrained_encoder,
)
from kinema.pipelines.evaluate.knn.neighbours import knn_accuracy
from kinema.pipelines.evaluate.knn.videos import (
    SCENES,
    LabelledVideo,
    find_labelled,
    rendered_videos,
)
from kinema.pipelines.model_address import load_address
from kinema.pipelines.progress import Progress
from kinema.pipelines.video.at_rate import read_video
from kinema.pipelines.video.errors import SourceError


def run_knn(config: EvaluateConfig) -> tuple[dict[str, float], list[Path]]:
    """Accuracy of every label, of the model and of the baselines, and how far above chance it is.

    Raises: ValueError for a model or data that do not fit; StageError when no video can be read.
    """
    settings = config.knn
    model = load_address(config.model, config.weights, kind="motion", user="benchmark=knn").network
    embedders: dict[str, Embedder] = {"": motion_embedder(model)}
    if settings.baselines:
        embedders["flow_histogram"] = flow_histogram()
        embedders["untrained_frames"] = frame_features(untrained_encoder(model, settings.seed))
    total, videos = _videos(config, model.max_delta_time + 1)
    progress = Progress("evaluate knn", total, "videos")
    rows: dict[str, list[Tensor]] = {name: [] for name in embedders}
    labels: list[dict[str, str]] = []
    for video in videos:
        for name, embed in embedders.items():
            rows[name].append(embed(video.frames))
        labels.append(video.labels)
        progress.update(len(labels), video.name)
    progress.close()
    if len(labels) < 2:
        raise StageError(f"{len(labels)} videos of data={config.data} could be embedded; at least 2 are needed")
    metrics = _accuracies({name: torch.stack(values) for name, values in rows.items()}, labels, settings.k)
    metrics["knn_videos"] = float(len(labels))
    metrics["knn_left_out"] = float(total - len(labels))
    return metrics, []


def _videos(config: EvaluateConfig, least_frames: int) -> tuple[int, Iterator[LabelledVideo]]:
    """How many there are, and those that can be embedded; the others are named."""
    settings = config.knn
    if config.data == SCENES:
        frames = max(least_frames, settings.num_frames)
        side, close_up = settings.side_px, settings.close_up
        return settings.num_videos, rendered_videos(settings.num_videos, settings.seed, side, frames, close_up)
    found = find_labelled(config.data, settings.max_videos)

    def read() -> Iterator[LabelledVideo]:
        for path, known in zip(found.paths, found.labels, strict=True):
            try:
                frames = read_video(path, settings.fps, settings.side_px, settings.max_seconds)
            except (SourceError, OSError) as error:
                sys.stderr.write(f"evaluate knn: {path} is left out: {error}\n")
                continue
            if len(frames) < least_frames:
                sys.stderr.write(
                    f"evaluate knn: {path} is left out: {len(frames)} frames at {settings.fps:g} a second, "
                    f"{least_frames} are needed\n"
                )
                continue
            yield LabelledVideo(path.name, frames, known)

    return len(found.paths), read()


def _accuracies(embeddings: dict[str, Tensor], labels: list[dict[str, str]], k: int) -> dict[str, float]:
    """`knn_LABEL`, `..._chance`, `..._over_chance`, and `..._BASELINE` for every label."""
    metrics: dict[str, float] = {}
    for label in labels[0]:
        values = [known[label] for known in labels]
        chance = 1 / len(set(values))
        for name, matrix in embeddings.items():
            accuracy = knn_accuracy(matrix, values, k)
            suffix = f"_{name}" if name else ""
            metrics[f"knn_{label}{suffix}"] = accuracy
            metrics[f"knn_{label}{suffix}_over_chance"] = accuracy / chance
        metrics[f"knn_{label}_chance"] = chance
    return metrics
