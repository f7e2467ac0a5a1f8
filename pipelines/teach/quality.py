"""What can be said about the flow of a pair of frames without knowing the truth.

Every signal is one number per directed pair, and a list column of the flow artifact's samples.parquet, in the order of
the blob's table (t, gap):

    pair_t, pair_gap         which pair
    pair_motion_px           mean length of the flow
    pair_consistency_px      median of |f + b(w)| over pixels whose target is inside: how far a pixel comes back from
                             where it started; null unless both directions were computed
    pair_occluded_share      share of pixels that fail the forward-backward check; null likewise
    pair_photometric         mean |I1 - I2(w)| of grey values (0..1) over pixels that are inside and not occluded
    pair_still               mean |I1 - I2| without any motion, over the same pixels
    pair_static              the pictures are the same: nothing to learn from
    pair_cut                 the flow explains nothing: no common scene, or a failure

`pair_uncertainty_px` (mean of the teacher's own estimate) and `pair_disagreement_px` (mean distance to another
teacher's flow) are there where they were asked for.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import pyarrow as pa
from jaxtyping import Bool, Float
from torch import Tensor

from kinema.models.flow.geometry import RoundTrip, warp

STATIC_MOTION_PX = 0.1
STATIC_STILL = 0.01
# Set between 120 pairs inside shots of natural videos (occluded share at most 0.37, photometric error 0.06) and 95
# pairs across shots (at least 0.65, and 0.08 over all pixels inside), with the flow of DIS.
CUT_OCCLUDED_SHARE = 0.6
CUT_PHOTOMETRIC = 0.06
NOTHING_AGREES_SHARE = 0.95
CUT_PHOTOMETRIC_ALONE = 0.08
CUT_UNEXPLAINED_SHARE = 0.45


@dataclass(frozen=True)
class PairQuality:
    """The signals of one directed pair; None where they cannot be known."""

    t: int
    gap: int
    motion_px: float
    consistency_px: float | None
    occluded_share: float | None
    photometric: float | None
    still: float | None
    static: bool
    cut: bool
    uncertainty_px: float | None = None
    disagreement_px: float | None = None


_ARROW = {"t": pa.int32(), "gap": pa.int32(), "static": pa.bool_(), "cut": pa.bool_()}
COLUMNS = {f"pair_{f.name}": _ARROW.get(f.name, pa.float32()) for f in fields(PairQuality)}
"""Column names and the type of their lists' elements."""


def pair_quality(
    t: int,
    gap: int,
    grey1: Float[Tensor, "1 H W"],
    grey2: Float[Tensor, "1 H W"],
    flow_px: Float[Tensor, "2 H W"],
    trip: RoundTrip | None = None,
    uncertainty_px: Float[Tensor, "H W"] | None = None,
    other_px: Float[Tensor, "2 H W"] | None = None,
    hidden: Bool[Tensor, "H W"] | None = None,
) -> PairQuality:
    """Signals of the flow from picture 1 to picture 2 (grey, 0..1).

    Args: trip, to picture 2 and back, with a batch of this one pair; uncertainty_px, the network's own; other_px,
        another teacher's flow; hidden, without a trip, the pixels that the teacher itself calls hidden.
    """
    warped, inside = warp(grey2[None], flow_px[None])
    seen, consistency_px, occluded_share = inside[0], None, None
    if trip is not None:
        if bool(trip.inside.any()):
            consistency_px = _number(trip.gap_px2[trip.inside].sqrt().median())
        hidden = trip.occluded()[0]
    if hidden is not None:
        occluded_share = float(hidden.float().mean())
        seen = seen & ~hidden
    motion_px = float(flow_px.square().sum(0).sqrt().nanmean())  # ground truth is not known everywhere
    photometric = _masked_mean((grey1 - warped[0]).abs()[0], seen)
    still = _masked_mean((grey1 - grey2).abs()[0], seen)
    return PairQuality(
        t=t,
        gap=gap,
        motion_px=motion_px,
        consistency_px=consistency_px,
        occluded_share=occluded_share,
        photometric=photometric,
        still=still,
        static=motion_px < STATIC_MOTION_PX and float((grey1 - grey2).abs().mean()) < STATIC_STILL,
        cut=_is_cut(grey1, grey2, warped[0], inside[0], occluded_share),
        uncertainty_px=None if uncertainty_px is None else float(uncertainty_px.mean()),
        disagreement_px=None if other_px is None else float((flow_px - other_px).square().sum(0).sqrt().mean()),
    )


def _is_cut(grey1: Tensor, grey2: Tensor, warped: Tensor, inside: Tensor, occluded_share: float | None) -> bool:
    """Frames without a common scene: the two directions contradict each other, and warping leaves a large difference.

    All pixels inside count, not the consistent ones alone: across a cut the few consistent ones agree by chance.
    Without the other direction the test is how much of the difference the flow removes.
    """
    photometric = _masked_mean((grey1 - warped).abs()[0], inside)
    still = _masked_mean((grey1 - grey2).abs()[0], inside)
    if photometric is None or still is None:
        return True
    if occluded_share is None:
        return photometric > CUT_PHOTOMETRIC_ALONE and photometric > CUT_UNEXPLAINED_SHARE * still
    contradicts = occluded_share > CUT_OCCLUDED_SHARE and photometric > CUT_PHOTOMETRIC
    return contradicts or occluded_share > NOTHING_AGREES_SHARE


def _masked_mean(values: Float[Tensor, "H W"], mask: Bool[Tensor, "H W"]) -> float | None:
    count = int(mask.sum())
    return float(values[mask].mean()) if count else None


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def columns(pairs: list[PairQuality]) -> dict[str, list]:
    """The list columns of one clip, pairs ordered as in the blob."""
    rows = [asdict(pair) for pair in sorted(pairs, key=lambda pair: (pair.t, pair.gap))]
    return {f"pair_{f.name}": [row[f.name] for row in rows] for f in fields(PairQuality)}
