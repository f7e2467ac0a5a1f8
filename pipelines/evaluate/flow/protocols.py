"""Which numbers each flow benchmark is judged by, under the names of the table.

Sources: Butler et al. (Sintel) ECCV 2012; Geiger et al. and Menze and Geiger (KITTI) CVPR 2012 and 2015; Mehl et al.
(Spring) CVPR 2023; Baker et al. (Middlebury) IJCV 2011. `metrics` has their definitions.
"""

from __future__ import annotations

from dataclasses import dataclass

from kinema.pipelines.evaluate.flow.metrics import FlowErrors

_SHARES = ("px1", "px3", "px5")


@dataclass(frozen=True)
class Protocol:
    """How one data set is evaluated."""

    title: str
    iters_as: str
    """Key of a network's `benchmark_iters`."""
    padding: str = "sintel"
    """Padding of networks that have a choice."""
    per_image: bool = False
    """The end-point error is the mean over images of each image's (KITTI, Middlebury), not over all pixels."""


PROTOCOLS = {
    "sintel": Protocol("MPI Sintel", "sintel"),
    "kitti2012": Protocol("KITTI 2012", "kitti", "kitti", per_image=True),
    "kitti2015": Protocol("KITTI 2015", "kitti", "kitti", per_image=True),
    "spring": Protocol("Spring", "spring"),
    "middlebury": Protocol("Middlebury", "middlebury", per_image=True),
}
"""Data sets of `kinema evaluate benchmark=flow`, in the order of the table."""

GROUPED = ("sintel",)
"""Data sets with several renderings, each a row of its own."""


def measures(name: str, errors: FlowErrors) -> dict[str, float]:
    """Every measure of a data set: epe in px; px1, px3, px5 shares below; 1px (above), fl_all and wauc in percent.

    With occlusion masks also epe_matched and epe_unmatched; epe_s0_10, epe_s10_40, epe_s40plus by speed; Spring's
    detail, rigid and sky regions.
    """
    subset = "valid" if PROTOCOLS[name].per_image else "all"
    pooled = errors.pooled(subset)
    scores = {"epe": errors.per_image(subset)["epe"] if PROTOCOLS[name].per_image else pooled["epe"]}
    scores |= {share: pooled[share] for share in _SHARES}
    scores |= {"1px": 100 * pooled["1px"], "fl_all": pooled["fl_all"], "wauc": pooled["wauc"]}
    renamed = {"visible": "epe_matched", "occluded": "epe_unmatched"}
    for part in errors.subsets:
        if part not in ("all", "valid") and (found := errors.pooled(part)):
            scores[renamed.get(part, f"epe_{part}")] = found["epe"]
    return scores
