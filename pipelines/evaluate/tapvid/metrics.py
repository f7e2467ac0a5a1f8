"""TAP-Vid's measures of point tracks: average Jaccard, position accuracy, occlusion accuracy.

Source: Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video", NeurIPS 2022, arXiv:2211.03726.
Deviation: one video per call, because the published function divides the occlusion accuracy by the evaluated
entries of all videos it is given, which is only right for one.
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

QueryMode = Literal["first", "strided"]
THRESHOLDS_PX = (1, 2, 4, 8, 16)


def tapvid_metrics(
    query_frames: Int[np.ndarray, "N"],
    gt_tracks: Float[np.ndarray, "N T 2"],
    gt_occluded: Bool[np.ndarray, "N T"],
    tracks: Float[np.ndarray, "N T 2"],
    occluded: Bool[np.ndarray, "N T"],
    mode: QueryMode = "first",
) -> dict[str, float]:
    """Measures of one video, 0..1.

    Args: tracks in pixels of the 256 x 256 video; query_frames, the frame each point was given in. Mode "first"
        counts the frames after it, "strided" all but that frame.

    Returns: `average_jaccard` (AJ), `average_pts_within_thresh` (delta_avg), `occlusion_accuracy` (OA), and
        `jaccard_D`, `pts_within_D` for D of 1, 2, 4, 8 and 16 px (strictly closer). nan where nothing counts.
    Raises: ValueError for another mode or arrays that do not fit.
    """
    _check(query_frames, gt_tracks, gt_occluded, tracks, occluded, mode)
    frames, start = np.arange(gt_tracks.shape[1]), query_frames[:, None]
    counted = frames > start if mode == "first" else frames != start
    visible, predicted = ~gt_occluded & counted, ~occluded & counted
    squared_px = np.sum((tracks.astype(np.float64) - gt_tracks.astype(np.float64)) ** 2, axis=-1)
    values = {"occlusion_accuracy": _ratio((gt_occluded == occluded) & counted, counted.sum())}
    for threshold in THRESHOLDS_PX:
        near = squared_px < threshold**2
        values[f"pts_within_{threshold}"] = _ratio(near & visible, visible.sum())
        false_positives = predicted & (gt_occluded | ~near)
        values[f"jaccard_{threshold}"] = _ratio(near & visible & predicted, visible.sum() + false_positives.sum())
    for name, parts in (("average_jaccard", "jaccard"), ("average_pts_within_thresh", "pts_within")):
        values[name] = float(np.mean([values[f"{parts}_{threshold}"] for threshold in THRESHOLDS_PX]))
    return values


def mean_metrics(videos: list[dict[str, float]]) -> dict[str, float]:
    """The benchmark's figure: the mean over videos of each measure; videos in which nothing counts are left out."""
    means = {}
    for name in videos[0]:
        values = np.array([video[name] for video in videos])
        counts = values[~np.isnan(values)]
        means[name] = float(counts.mean()) if len(counts) else float("nan")
    return means


def _ratio(hits: np.ndarray, total: np.integer) -> float:
    return float(hits.sum() / total) if total else float("nan")


def _check(query_frames: np.ndarray, gt: np.ndarray, gt_occluded: np.ndarray, *predicted: object) -> None:
    tracks, occluded, mode = predicted
    assert isinstance(tracks, np.ndarray) and isinstance(occluded, np.ndarray)
    if mode not in ("first", "strided"):
        raise ValueError(f"mode={mode!r} is not one of 'first', 'strided'")
    shapes = {
        "gt_tracks": (gt.shape, (*gt.shape[:2], 2)),
        "query_frames": (query_frames.shape, gt.shape[:1]),
        "gt_occluded": (gt_occluded.shape, gt.shape[:2]),
        "tracks": (tracks.shape, gt.shape),
        "occluded": (occluded.shape, gt.shape[:2]),
    }
    for name, (found, wanted) in shapes.items():
        if found != wanted:
            raise ValueError(f"{name} is {list(found)}; with gt_tracks of {list(gt.shape)} it must be {list(wanted)}")
    for name, flags in (("gt_occluded", gt_occluded), ("occluded", occluded)):
        if flags.dtype != bool:
            raise ValueError(f"{name} is {flags.dtype}; it must be bool, True where the point is not seen")
