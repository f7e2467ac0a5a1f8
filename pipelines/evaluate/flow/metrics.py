"""Measures of optical flow: end-point error, shares within 1, 3, 5 px, Fl-all, speed ranges, weighted AUC.

Two ways of averaging are in use. Pooled: every counted pixel of the data set weighs the same (Sintel,
Chairs; Fl-all of KITTI). Per image: the mean over images of the image's mean (EPE of KITTI, ptlflow).
`FlowErrors` keeps sums per image, so both come out of one pass.

Sources: Butler et al. (Sintel) ECCV 2012; Menze and Geiger (KITTI 2015) CVPR 2015; the evaluation
scripts of RAFT, gmflow and ptlflow.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float32

THRESHOLDS_PX = (1, 3, 5)
FL_ABSOLUTE_PX, FL_RELATIVE = 3.0, 0.05
WAUC_STEPS, WAUC_MAX_PX = 100, 5.0


class FlowErrors:
    """Collects the errors of a data set image by image.

    Each image counts all its pixels under "all", valid ones under "valid", and valid ones that are
    occluded or visible under "occluded" and "visible".
    """

    def __init__(self) -> None:
        self._images: list[dict[str, dict[str, float]]] = []
        self.by_speed = ErrorBySpeed()

    def add(
        self,
        flow_px: Float32[np.ndarray, "2 H W"],
        flow_gt_px: Float32[np.ndarray, "2 H W"],
        valid: Bool[np.ndarray, "H W"] | None = None,
        occluded: Bool[np.ndarray, "H W"] | None = None,
        candidates_px: Float32[np.ndarray, "K 2 H W"] | None = None,
        masks: Mapping[str, Bool[np.ndarray, "H W"]] | None = None,
    ) -> Float32[np.ndarray, "H W"]:
        """Counts one image; pixels whose ground truth is not finite count nowhere.

        Args: candidates_px, several true flows of a pixel, of which the nearest counts (see `nearest_truth`); masks,
            further subsets of the valid pixels, by name.
        Returns: the end-point error of every pixel, nan where the truth is unknown.
        Raises: ValueError if the fields differ in size.
        """
        if flow_px.shape != flow_gt_px.shape:
            raise ValueError(f"flow is {list(flow_px.shape)}, ground truth {list(flow_gt_px.shape)}")
        if candidates_px is None:
            error, speed = endpoint_error(flow_px, flow_gt_px), np.sqrt((flow_gt_px**2).sum(axis=0))
            longest = speed
        else:
            error, longest, speed = nearest_truth(flow_px, candidates_px)
        known = np.isfinite(error)
        valid = known if valid is None or candidates_px is not None else known & valid
        subsets = {"all": known, "valid": valid}
        if occluded is not None:
            subsets |= {"occluded": valid & occluded, "visible": valid & ~occluded}
        fast = speed > 40 if candidates_px is None else speed >= 40  # Spring's ranges are half open, Sintel's closed
        subsets |= {
            "s0_10": known & (speed < 10),
            "s10_40": known & (speed >= 10) & ~fast,
            "s40plus": known & fast,
        }
        subsets |= {name: valid & mask for name, mask in (masks or {}).items()}
        self._images.append({name: _sums(error[mask], longest[mask]) for name, mask in subsets.items()})
        self.by_speed.add(error[valid], speed[valid])
        return error

    @property
    def subsets(self) -> tuple[str, ...]:
        """Names of the subsets that some image has."""
        return tuple(dict.fromkeys(name for image in self._images for name in image))

    def __len__(self) -> int:
        return len(self._images)

    def pooled(self, subset: str = "all") -> dict[str, float]:
        """Measures over all counted pixels together; see `_measures` for the names."""
        images = [image[subset] for image in self._images if subset in image]
        return _measures({name: sum(image[name] for image in images) for name in images[0]} if images else {})

    def per_image(self, subset: str = "valid") -> dict[str, float]:
        """Mean over the images of each image's measures (a count of 0 pixels is taken as 1)."""
        images = [_measures(image[subset], minimum=1) for image in self._images if subset in image]
        return {name: float(np.mean([image[name] for image in images])) for name in images[0]} if images else {}

    def sintel(self) -> dict[str, float]:
        """Pooled over all pixels: epe, px1, px3, px5, speed ranges; matched and unmatched where masks exist."""
        overall = self.pooled("all")
        scores = {name: overall[name] for name in ("epe", "px1", "px3", "px5")}
        scores |= {name: self.pooled(name).get("epe", float("nan")) for name in ("s0_10", "s10_40", "s40plus")}
        if any("occluded" in image for image in self._images):
            scores["epe_matched"] = self.pooled("visible").get("epe", float("nan"))
            scores["epe_unmatched"] = self.pooled("occluded").get("epe", float("nan"))
        return scores

    def kitti(self) -> dict[str, float]:
        """epe: mean over images of the valid-pixel mean; fl_all: percent of all valid pixels, pooled."""
        pooled = self.pooled("valid")
        return {"epe": self.per_image("valid")["epe"], "fl_all": pooled["fl_all"]}

    def middlebury(self) -> dict[str, float]:
        """epe: mean over images of the known-pixel mean; px1, px3, px5: shares of all known pixels."""
        pooled = self.pooled("valid")
        return {"epe": self.per_image("valid")["epe"]} | {k: pooled[k] for k in ("px1", "px3", "px5")}


def endpoint_error(
    flow_px: Float32[np.ndarray, "2 H W"], flow_gt_px: Float32[np.ndarray, "2 H W"]
) -> Float32[np.ndarray, "H W"]:
    """Length of the difference vector at every pixel."""
    return np.sqrt(((flow_px - flow_gt_px) ** 2).sum(axis=0))


def nearest_truth(
    flow_px: Float32[np.ndarray, "2 H W"], candidates_px: Float32[np.ndarray, "K 2 H W"]
) -> tuple[Float32[np.ndarray, "H W"], Float32[np.ndarray, "H W"], Float32[np.ndarray, "H W"]]:
    """Spring's measures where a pixel has several true flows: the least end-point error, longest and mean length.

    The longest decides whether an error is an outlier, the mean which speed range the pixel is in; all are nan where
    none of the candidates is known. Source: the evaluation of Mehl et al. (Spring), CVPR 2023.
    """
    known = np.isfinite(candidates_px).all(axis=1)
    count = known.sum(axis=0)
    candidates = np.where(known[:, None], candidates_px, np.float32(0))
    errors = np.sqrt(((flow_px - candidates) ** 2).sum(axis=1))
    lengths = np.sqrt((candidates**2).sum(axis=1))
    unknown = np.float32(np.nan)
    error = np.where(count > 0, np.where(known, errors, np.inf).min(axis=0), unknown)
    longest = np.where(count > 0, np.where(known, lengths, -np.inf).max(axis=0), unknown)
    mean = np.where(count > 0, lengths.sum(axis=0) / np.maximum(count, 1), unknown)
    return error.astype(np.float32), longest.astype(np.float32), mean.astype(np.float32)


class ErrorBySpeed:
    """Mean end-point error against how far pixels move, in ranges that double."""

    edges_px = (0.0, *(2.0**i for i in range(-1, 10)), np.inf)

    def __init__(self) -> None:
        self.count = np.zeros(len(self.edges_px) - 1)
        self.total = np.zeros(len(self.edges_px) - 1)

    def add(self, error: Float32[np.ndarray, " N"], speed: Float32[np.ndarray, " N"]) -> None:
        """Count pixels."""
        place = np.searchsorted(self.edges_px, speed, side="right") - 1
        self.count += np.bincount(place, minlength=len(self.count))
        self.total += np.bincount(place, weights=error, minlength=len(self.total))

    def merge(self, other: ErrorBySpeed) -> None:
        """Count another's pixels too."""
        self.count, self.total = self.count + other.count, self.total + other.total

    def curve(self) -> tuple[list[float], list[float]]:
        """Lower edge of every range with pixels (the first is at 0.25 px), and the mean error in it, pixels."""
        there = self.count > 0
        edges = np.array([0.25, *self.edges_px[1:-1]])
        return edges[there].tolist(), (self.total[there] / self.count[there]).tolist()


def _sums(error: np.ndarray, speed: np.ndarray) -> dict[str, float]:
    """Counts and sums over the pixels of one image and subset."""
    # No motion: any error is infinitely large relative to it, and none is not an outlier.
    relative = np.divide(error, speed, out=np.full_like(error, np.inf), where=speed > 0)
    sums = {
        "count": error.size,
        "epe": float(error.sum(dtype=np.float64)),
        "fl_all": int(((error > FL_ABSOLUTE_PX) & (relative > FL_RELATIVE)).sum()),
        "wauc": _wauc_sum(error),
    }
    for threshold in THRESHOLDS_PX:
        sums[f"px{threshold}"] = int((error < threshold).sum())
        sums[f"{threshold}px"] = int((error > threshold).sum())
    return sums


def _wauc_sum(error: np.ndarray) -> float:
    """Sum over pixels of the weighted share of thresholds 0.05, 0.10 .. 5 px that the error meets."""
    thresholds = (np.arange(1, WAUC_STEPS + 1) * (WAUC_MAX_PX / WAUC_STEPS)).astype(np.float32)
    weights = 1 - np.arange(WAUC_STEPS) / WAUC_STEPS
    met = np.append(np.cumsum(weights[::-1])[::-1], 0.0) / weights.sum()  # weight met from step i on
    return float(met[np.searchsorted(thresholds, error, side="left")].sum())


def _measures(sums: dict[str, float], minimum: int = 0) -> dict[str, float]:
    """epe in px; px1, px3, px5: shares below; 1px, 3px, 5px: shares above; fl_all and wauc in percent."""
    count = max(sums.get("count", 0), minimum)
    if count == 0:
        return {}
    percent = {"fl_all": 100.0, "wauc": 100.0}
    return {name: percent.get(name, 1.0) * value / count for name, value in sums.items() if name != "count"}
