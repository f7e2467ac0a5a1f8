"""Which stored flow a clip offers: pairs fit to learn from, one teacher or the average of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32

from kinema.configs import PairFilterConfig
from kinema.models.flow.geometry import resize_flow
from kinema.pipelines.sidecars.flow_codec import FlowBlob, FlowHeader, FlowPair

_BOTH_WAYS = "teach with directions=[forward,backward]"
_SOURCES = {
    "pair_consistency_px": _BOTH_WAYS,
    "pair_occluded_share": _BOTH_WAYS,
    "pair_uncertainty_px": "teach with a sea_raft_* teacher and uncertainty=true",
    "pair_disagreement_px": "teach with compare=OTHER_FLOW",
}
"""How each signal comes about that flow need not have."""


def signal_columns(limits: PairFilterConfig) -> tuple[str, ...]:
    """The signals that the limits ask for, as columns of the flow's samples.parquet."""
    return tuple(dict.fromkeys(limit.column for limit in _limits(limits)))


def check_signals(limits: PairFilterConfig, known: Set[str]) -> None:
    """Args: known, columns of `signal_columns` in which some pair has a value.

    Raises: ValueError for a limit that would do nothing, because no pair has its signal.
    """
    for limit in _limits(limits):
        if limit.column not in known:
            how = _SOURCES.get(limit.column, "teach the flow anew")
            raise ValueError(f"loader.pairs.{limit.setting} has nothing to go by: no pair has {limit.column}; {how}")


def usable_pairs(limits: PairFilterConfig, row: Mapping[str, Any]) -> list[bool]:
    """For every pair of a clip's row, in the order of its blob, whether it is within the limits.

    A signal that could not be known (null) passes: no consistency without backward flow, no photometric error where
    every pixel leaves the picture (such a pair is a cut).
    """
    kept = [True] * row["num_pairs"]
    for limit in _limits(limits):
        for number, value in enumerate(row[limit.column]):
            if value is not None and not limit.low <= value <= limit.high:
                kept[number] = False
    return kept


class _Limit(NamedTuple):
    """A setting of PairFilterConfig that is in force."""

    setting: str
    column: str
    low: float
    high: float


def _limits(limits: PairFilterConfig) -> list[_Limit]:
    """Those that are set."""
    highest = {
        "motion_px": limits.max_motion_px,
        "consistency_px": limits.max_consistency_px,
        "occluded_share": limits.max_occluded_share,
        "photometric": limits.max_photometric,
        "uncertainty_px": limits.max_uncertainty_px,
        "disagreement_px": limits.max_disagreement_px,
    }
    found = [_Limit(f"max_{name}", f"pair_{name}", -math.inf, high) for name, high in highest.items() if high >= 0]
    if limits.min_motion_px >= 0:
        found.append(_Limit("min_motion_px", "pair_motion_px", limits.min_motion_px, math.inf))
    if limits.skip_static:
        found.append(_Limit("skip_static", "pair_static", 0, 0))
    return found + ([_Limit("skip_cuts", "pair_cut", 0, 0)] if limits.skip_cuts else [])


class AveragedFlow:
    """Several teachers' flow of one clip as if it were one blob: pairs that all have, at the first one's size.

    Flow is the mean of the teachers; a pixel is occluded when any of them says so.
    """

    def __init__(self, blobs: Sequence[FlowBlob]):
        self._blobs = blobs

    @property
    def header(self) -> FlowHeader:
        """That of the first teacher."""
        return self._blobs[0].header

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs stored by all, ordered."""
        shared = set(self._blobs[0].pairs).intersection(*(blob.pairs for blob in self._blobs[1:]))
        return sorted(shared)

    def flow(self, t: int, gap: int) -> Float32[np.ndarray, "2 H W"]:
        """Mean flow in pixels of the first teacher's size."""
        size = self.header.height, self.header.width
        flows = [resize_flow(torch.from_numpy(blob.flow(t, gap)), *size) for blob in self._blobs]
        return torch.stack(flows).mean(0).numpy()

    def occlusion(self, t: int, gap: int) -> Bool[np.ndarray, "H W"] | None:
        """Where any teacher sees the pixel hidden; None when none of them stored occlusion."""
        size = self.header.height, self.header.width
        masks = [blob.occlusion(t, gap) for blob in self._blobs]
        known = [_resized_mask(mask, size) for mask in masks if mask is not None]
        return np.logical_or.reduce(known) if known else None

    def pair(self, t: int, gap: int) -> FlowPair:
        """Flow and occlusion."""
        return FlowPair(t, gap, self.flow(t, gap), self.occlusion(t, gap))


def _resized_mask(mask: Bool[np.ndarray, "h w"], size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    if mask.shape == size:
        return mask
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]
