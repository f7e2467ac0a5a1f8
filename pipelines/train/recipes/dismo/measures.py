"""What the labels of held-out clips say of the embeddings while they are learned: kNN accuracy of every label."""

from __future__ import annotations

import json
from typing import Any

import torch

from kinema.models.dismo import MotionExtractor
from kinema.models.dismo.target_offset import frame_times, frames_at_rate
from kinema.pipelines.evaluate.knn.neighbours import knn_accuracy
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.loader.clip import DamagedClip

MAX_CLIPS = 256
NEIGHBOURS = 10
MOST_VALUES = 64
"""A label with more values names the clips, not what they show."""


def label_accuracies(extractor: MotionExtractor, clips: ClipIndex, fps: float) -> dict[str, float]:
    """`knn_LABEL`, share of clips whose label most of their nearest neighbours have, and `knn_LABEL_over_chance`.

    And `knn_clips` and `knn_left_out`, how many were embedded, and how many were too short or damaged.
    Only labels that all clips have count, with at least two values; there are none where the clips have no labels.
    Args: clips, of which at most `MAX_CLIPS`, spread over all, are embedded, each by the mean over its frames.
    """
    labels = [json.loads(text) if text else {} for text in _label_column(clips)]
    if not any(labels):
        return {}
    device = next(extractor.parameters()).device
    chosen = torch.linspace(0, len(clips) - 1, min(MAX_CLIPS, len(clips))).round().long().unique().tolist()
    means, known = [], []
    for number in chosen:
        clip = clips.clip(number)
        frames = frames_at_rate(frame_times(clip.meta["pts"], clip.meta["time_base"]), fps).tolist()
        if len(frames) <= extractor.max_delta_time:
            continue
        try:
            video = torch.from_numpy(clip.frames(frames))[None]
        except DamagedClip:
            continue
        means.append(extractor.forward_sliding(video.to(device)).float().mean(dim=1)[0].cpu())
        known.append(labels[number])
    found: dict[str, float] = {"knn_clips": len(means), "knn_left_out": len(chosen) - len(means)}
    for name in sorted({name for one in known for name in one}):
        values = [str(one.get(name, "")) for one in known]
        kinds = len(set(values))
        if all(values) and 1 < kinds <= MOST_VALUES and kinds < len(values):
            accuracy = knn_accuracy(torch.stack(means), values, min(NEIGHBOURS, len(values) - 1))
            found |= {f"knn_{name}": accuracy, f"knn_{name}_over_chance": accuracy * kinds}
    return found


def _label_column(clips: ClipIndex) -> list[Any]:
    table = clips.table
    return table["labels"].to_pylist() if "labels" in table.column_names else [None] * table.num_rows
