"""Measures of predicted distributions against what happened: calibration, rank correlation, sparsification.

Sources: Guo et al., ICML 2017 (expected calibration error; here over credible regions instead of class scores);
Ilg et al., "Uncertainty Estimates and Multi-Hypotheses Networks for Optical Flow", ECCV 2018 (sparsification curves and
the area between prediction and oracle).
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from scipy import integrate, stats

from kinema.models.fpt.mixture import coverage

CREDIBLE_PROBABILITIES = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Probabilities of the regions whose coverage is counted."""
REMOVED_SHARES = tuple(round(0.02 * step, 2) for step in range(50))
"""Shares of the points that are taken away, the most uncertain first."""


def observed_coverage(levels: Float[np.ndarray, "*B"]) -> Float[np.ndarray, "p"]:
    """Share of true values inside the region of each probability of `CREDIBLE_PROBABILITIES`.

    Args: levels from `GaussianMixture.credible_level` of the true values.
    """
    return coverage(
        torch.from_numpy(levels).double(), torch.tensor(CREDIBLE_PROBABILITIES, dtype=torch.float64)
    ).numpy()


def calibration_error(observed: Float[np.ndarray, "p"]) -> float:
    """Mean distance of observed from expected coverage, 0..0.5: 0 for a calibrated model."""
    return float(np.abs(observed - np.array(CREDIBLE_PROBABILITIES)).mean())


def correlations(uncertainty: Float[np.ndarray, "*B"], error: Float[np.ndarray, "*B"]) -> dict[str, float]:
    """{"spearman", "pearson"} correlation of uncertainty with error; nan where one of them never varies."""
    x, y = uncertainty.ravel(), error.ravel()
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"spearman": float("nan"), "pearson": float("nan")}
    return {"spearman": float(stats.spearmanr(x, y).statistic), "pearson": float(stats.pearsonr(x, y).statistic)}


def sparsification(error: Float[np.ndarray, "*B"], uncertainty: Float[np.ndarray, "*B"]) -> Float[np.ndarray, "s"]:
    """Mean error of what is left when the most uncertain share is taken away, relative to the mean of all.

    For each of `REMOVED_SHARES`. Equal uncertainties count as in random order: where all are equal the curve is 1.
    """
    error, uncertainty = error.ravel().astype(np.float64), uncertainty.ravel()
    total = error.mean()
    if not total:
        return np.full(len(REMOVED_SHARES), np.nan)
    _, group = np.unique(uncertainty, return_inverse=True)
    expected = (np.bincount(group, error) / np.bincount(group))[group]
    kept_first = expected[np.argsort(uncertainty, kind="stable")]
    means = np.cumsum(kept_first) / np.arange(1, len(error) + 1)
    kept = np.maximum(1, np.rint((1 - np.array(REMOVED_SHARES)) * len(error)).astype(int))
    return means[kept - 1] / total


def area_to_oracle(curves: Mapping[str, Float[np.ndarray, "s"]], name: str) -> float:
    """Area between a sparsification curve and "oracle", the one that the errors themselves give; 0 is best."""
    return float(integrate.trapezoid(curves[name] - curves["oracle"], np.array(REMOVED_SHARES)))


def average_precision(score: Float[np.ndarray, "*B"], truth: np.ndarray) -> float:
    """Area under the precision-recall curve of a score for a mask that has both values; equal scores count together."""
    score, truth = score.ravel(), truth.ravel()
    order = np.argsort(-score, kind="stable")
    last_of_group = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    hits = np.cumsum(truth[order])[last_of_group]
    recall_step = np.diff(hits, prepend=0) / max(1, hits[-1])
    return float((recall_step * hits / (last_of_group + 1)).sum())


def iou_by_threshold(
    score: Float[np.ndarray, "*B"], truth: np.ndarray, thresholds: Float[np.ndarray, "t"]
) -> Float[np.ndarray, "t"]:
    """Intersection over union of `score >= threshold` and the mask, for increasing thresholds."""
    truth = truth.ravel()
    above = np.searchsorted(thresholds, score.ravel(), side="right")  # passes so many thresholds
    size = len(thresholds) + 1
    predicted, hits = (
        np.bincount(above, weights, size)[::-1].cumsum()[::-1][1:] for weights in (np.ones(len(truth)), truth)
    )
    return hits / np.maximum(predicted + truth.sum() - hits, 1)
