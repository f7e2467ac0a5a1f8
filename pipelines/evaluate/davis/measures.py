"""DAVIS measures: region similarity J, contour accuracy F, and their mean, recall and decay.

Masks are boolean [T, H, W], one object over T frames; pixels under `void` count nowhere.

Source: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation",
CVPR 2016, and the official DAVIS 2017 evaluation, whose numbers are reproduced.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float64
from scipy.optimize import linear_sum_assignment

BOUNDARY_TOLERANCE = 0.008  # of the picture's diagonal
RECALL_ABOVE = 0.5
NUM_DECAY_BINS = 4
MAX_PROPOSALS = 20

Masks = Bool[np.ndarray, "T H W"]


class Statistics(NamedTuple):
    """Summary of a measure over the frames of one object."""

    mean: float
    """Mean over frames with a value."""
    recall: float
    """Share of all frames above 0.5."""
    decay: float
    """Mean of the first quarter of the frames minus mean of the last."""


def region_similarity(predicted: Masks, annotated: Masks, void: Masks | None = None) -> Float64[np.ndarray, "T"]:
    """Intersection over union of every frame; 1 where both masks are empty.

    Raises: ValueError if the masks differ in size.
    """
    predicted, annotated = _without_void(predicted, annotated, void)
    overlap = np.count_nonzero(predicted & annotated, axis=(1, 2))
    union = np.count_nonzero(predicted | annotated, axis=(1, 2))
    return np.divide(overlap, union, out=np.ones(len(union)), where=union > 0)


def contour_accuracy(predicted: Masks, annotated: Masks, void: Masks | None = None) -> Float64[np.ndarray, "T"]:
    """F-measure of the boundaries of every frame, matched within 0.8 % of the picture's diagonal.

    Raises: ValueError if the masks differ in size.
    """
    predicted, annotated = _without_void(predicted, annotated, void)
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*predicted.shape[1:]))
    pairs = zip(predicted, annotated, strict=True)
    return np.array([_boundary_f(boundary(p), boundary(a), radius) for p, a in pairs])


def boundary(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels that differ from their right, lower or lower-right neighbour.

    The last row compares to the right only, the last column downwards only.
    """
    edge = np.zeros_like(mask)
    right, lower = mask[:, :-1] ^ mask[:, 1:], mask[:-1] ^ mask[1:]
    edge[:, :-1] |= right
    edge[:-1] |= lower
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


def statistics(values: Float64[np.ndarray, "T"], eight_bit_bins: bool = False) -> Statistics:
    """Mean, recall and decay over the frames; nan frames have no value and are not above 0.5.

    Args:
        eight_bit_bins: keep the bin borders in 8 bits as the official code does; from 256 frames on its
            decay is then nan (under numpy 2), so the default keeps them whole.

    Raises: ValueError if there is no frame.
    """
    if not len(values):
        raise ValueError("no frame to average: a sequence needs at least 3 annotated frames")
    first = np.round(np.linspace(1, len(values), NUM_DECAY_BINS + 1) + 1e-10).astype(int) - 1
    stop = first + 1  # neighbouring bins share the frame on their border
    if eight_bit_bins:
        first, stop = first % 256, stop % 256
    decay = _nanmean(values[first[0] : stop[1]]) - _nanmean(values[first[-2] : stop[-1]])
    return Statistics(_nanmean(values), float((values > RECALL_ABOVE).mean()), decay)


def match_proposals(
    proposals: Bool[np.ndarray, "P T H W"],
    objects: Bool[np.ndarray, "N T H W"],
    void: Masks | None = None,
) -> tuple[Float64[np.ndarray, "N T"], Float64[np.ndarray, "N T"]]:
    """J and F of every annotated object under the best one-to-one assignment of proposals to objects.

    The assignment is one for the whole sequence and maximises the mean of (J + F) / 2; an object without
    a proposal is compared with an empty mask.

    Raises: ValueError for more than 20 proposals.
    """
    if len(proposals) > MAX_PROPOSALS:
        raise ValueError(f"{len(proposals)} proposals; the unsupervised task allows {MAX_PROPOSALS}")
    missing = max(0, len(objects) - len(proposals))
    if missing:
        proposals = np.concatenate([proposals, np.zeros((missing, *objects.shape[1:]), bool)])
    j = np.stack([[region_similarity(p, o, void) for p in proposals] for o in objects])  # [N, P, T]
    f = np.stack([[contour_accuracy(p, o, void) for p in proposals] for o in objects])
    rows, columns = linear_sum_assignment(-(j.mean(2) + f.mean(2)) / 2)
    return j[rows, columns], f[rows, columns]


def _without_void(predicted: Masks, annotated: Masks, void: Masks | None) -> tuple[Masks, Masks]:
    shapes = {m.shape for m in (predicted, annotated, void) if m is not None}
    if len(shapes) > 1:
        raise ValueError(f"masks of different sizes: {', '.join(map(str, sorted(shapes)))}")
    return (predicted, annotated) if void is None else (predicted & ~void, annotated & ~void)


def _boundary_f(predicted: np.ndarray, annotated: np.ndarray, radius: int) -> float:
    num_predicted, num_annotated = int(predicted.sum()), int(annotated.sum())
    if not num_predicted or not num_annotated:
        return float(num_predicted == num_annotated)
    # Dilation costs by area: leave out what is farther than the radius from every boundary.
    rows, columns = np.nonzero((predicted | annotated).any(1))[0], np.nonzero((predicted | annotated).any(0))[0]
    window = (
        slice(max(0, rows[0] - radius), rows[-1] + radius + 1),
        slice(max(0, columns[0] - radius), columns[-1] + radius + 1),
    )
    predicted, annotated = predicted[window], annotated[window]
    precision = np.count_nonzero(predicted & _dilate(annotated, radius)) / num_predicted
    recall = np.count_nonzero(annotated & _dilate(predicted, radius)) / num_annotated
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within `radius` of the mask."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x * x + y * y <= radius * radius).astype(np.uint8)
    return cv2.dilate(mask.view(np.uint8), disk).view(bool)


def _nanmean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
