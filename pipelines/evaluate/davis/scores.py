"""`evaluate` on DAVIS: scores of mask folders, and of features through a segmentation protocol.

Protocols turn features and the first annotation into masks of every frame: "mlp" and "attention" fit a
small probe to the first frame, "propagation" copies labels to the most similar places frame by frame.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kinema.pipelines.evaluate.davis.folder import (
    VOID,
    DavisSequence,
    find_sequences,
    read_labels,
    write_labels,
)
from kinema.pipelines.evaluate.davis.measures import (
    Statistics,
    contour_accuracy,
    match_proposals,
    region_similarity,
    statistics,
)
from kinema.pipelines.evaluate.davis.propagation import segment_by_propagation
from kinema.pipelines.evaluate.probes.attention import segment_by_attention
from kinema.pipelines.evaluate.probes.mlp import segment_by_mlp

PROTOCOLS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "mlp": segment_by_mlp,
    "propagation": segment_by_propagation,
    "attention": segment_by_attention,
}
TASKS = ("semi-supervised", "unsupervised")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class DavisScores:
    """Means over all objects of all sequences; every object weighs the same."""

    jf_mean: float
    """J&F: mean of j_mean and f_mean."""
    j_mean: float
    """Region similarity."""
    j_recall: float
    """Share of frames with J above 0.5."""
    j_decay: float
    """Loss of J from the first to the last quarter of a sequence."""
    f_mean: float
    """Contour accuracy."""
    f_recall: float
    """Share of frames with F above 0.5."""
    f_decay: float
    """Loss of F from the first to the last quarter of a sequence."""
    objects: Mapping[str, tuple[Statistics, Statistics]] = field(default_factory=dict)
    """J and F statistics by `SEQUENCE_OBJECT`, objects counted from 1."""

    def as_dict(self) -> dict[str, float]:
        """One number per measure."""
        return {name: value for name, value in vars(self).items() if name != "objects"}


def evaluate_davis(
    features: Callable[..., Any],
    davis_root: str | Path,
    sequences: list[str] | None = None,
    protocol: str = "mlp",
    *,
    split: str = "val",
    progress: Progress | None = None,
    masks_out: str | Path | None = None,
    **options: Any,
) -> DavisScores:
    """J, F and J&F of features on DAVIS (semi-supervised task).

    Args:
        features: `features(frame [3, H, W] float RGB in 0..1) -> [C, h, w]`; for "attention" it returns
            the pair (y_enc [D, h, w], y_dec [C, H, W]).
        davis_root, sequences, split: see `davis_folder.find_sequences`.
        protocol: "mlp", "propagation" or "attention".
        progress: called with (done, total, sequence) after every sequence.
        masks_out: folder for the predicted masks, as `SEQUENCE/00000.png`.
        options: further arguments of the protocol's function (`segment_by_mlp` ...).

    Raises: ValueError for an unknown protocol, or a folder without sequences of 3 or more frames.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} is not one of {', '.join(PROTOCOLS)}")
    found = find_sequences(davis_root, sequences, split)
    for sequence in found:
        _check_length(sequence)
    per_object: dict[str, tuple[Statistics, Statistics]] = {}
    for done, sequence in enumerate(found, 1):
        predicted, annotated = PROTOCOLS[protocol](features, sequence, **options)
        if masks_out is not None:
            names = [path.stem for path in sequence.annotations]
            write_labels(Path(masks_out) / sequence.name, names, predicted)
        per_object |= score_sequence(sequence.name, predicted, annotated)
        if progress is not None:
            progress(done, len(found), sequence.name)
    return summarise(per_object)


def score_results(
    results_root: str | Path,
    davis_root: str | Path,
    sequences: list[str] | None = None,
    task: str = "semi-supervised",
    *,
    split: str = "val",
    progress: Progress | None = None,
) -> DavisScores:
    """Official scores of a folder of predicted masks `SEQUENCE/00000.png`.

    Without `sequences` and without a list in ImageSets, the sequences that have results are scored.

    Raises: ValueError for missing files, or labels that the annotation does not have.
    """
    results_root = Path(results_root)
    found = find_sequences(davis_root, sequences, split, frames=False)
    scored = [sequence for sequence in found if (results_root / sequence.name).is_dir()]
    if not scored or (sequences is not None and len(scored) < len(found)):
        missing = [sequence.name for sequence in found if sequence not in scored]
        raise ValueError(f"{results_root}: no folder of masks for {', '.join(missing[:5])}")
    per_object: dict[str, tuple[Statistics, Statistics]] = {}
    for done, sequence in enumerate(scored, 1):
        predicted = read_labels(_result_files(results_root / sequence.name, sequence))
        per_object |= score_sequence(sequence.name, predicted, sequence.labels(), task)
        if progress is not None:
            progress(done, len(scored), sequence.name)
    return summarise(per_object)


def score_sequence(
    name: str,
    predicted: UInt8[np.ndarray, "T H W"],
    annotated: UInt8[np.ndarray, "T H W"],
    task: str = "semi-supervised",
) -> dict[str, tuple[Statistics, Statistics]]:
    """J and F statistics of every object of the first annotation, by `SEQUENCE_OBJECT`.

    Semi-supervised: object k is label k, the first and last frame are left out, void is background.
    Unsupervised: labels are proposals that are matched to objects; void pixels count nowhere.

    Raises: ValueError if sizes differ, or (semi-supervised) if a label has no object.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not one of {', '.join(TASKS)}")
    if predicted.shape != annotated.shape:
        raise ValueError(f"{name}: predicted masks are {predicted.shape}, annotations {annotated.shape}")
    void = annotated == VOID
    num_objects = int(np.where(void[0], 0, annotated[0]).max())
    num_predicted = int(np.where(predicted == VOID, 0, predicted).max())
    if num_objects == 0:
        raise ValueError(f"{name}: the first annotation shows no object")
    if task == "unsupervised":
        objects, proposals = _one_mask_each(annotated, num_objects), _one_mask_each(predicted, num_predicted)
        j, f = match_proposals(proposals, objects, void)
    else:
        if num_predicted > num_objects:
            raise ValueError(f"{name}: predicted label {num_predicted}, but the first annotation has {num_objects}")
        inner = slice(1, -1)
        pairs = [(predicted[inner] == k, annotated[inner] == k) for k in range(1, num_objects + 1)]
        j = np.stack([region_similarity(*pair) for pair in pairs])
        f = np.stack([contour_accuracy(*pair) for pair in pairs])
    return {f"{name}_{k}": (statistics(jk), statistics(fk)) for k, (jk, fk) in enumerate(zip(j, f, strict=True), 1)}


def summarise(objects: Mapping[str, tuple[Statistics, Statistics]]) -> DavisScores:
    """Means over objects."""
    j, f = (Statistics(*np.mean([pair[i] for pair in objects.values()], axis=0).tolist()) for i in (0, 1))
    return DavisScores(
        jf_mean=(j.mean + f.mean) / 2,
        j_mean=j.mean,
        j_recall=j.recall,
        j_decay=j.decay,
        f_mean=f.mean,
        f_recall=f.recall,
        f_decay=f.decay,
        objects=dict(objects),
    )


def _one_mask_each(labels: np.ndarray, count: int) -> np.ndarray:
    return np.stack([labels == k for k in range(1, count + 1)]) if count else np.zeros((0, *labels.shape), bool)


def _check_length(sequence: DavisSequence) -> None:
    if len(sequence.annotations) < 3:
        raise ValueError(
            f"sequence {sequence.name} has {len(sequence.annotations)} frames; the first and last are not "
            "scored, so at least 3 are needed: leave it out with sequences="
        )


def _result_files(folder: Path, sequence: DavisSequence) -> list[Path]:
    files = [folder / path.name for path in sequence.annotations]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{folder}: no mask for {', '.join(missing[:3])}" + (" ..." if len(missing) > 3 else ""))
    return files
