"""Which stored flow a clip offers: pairs fit to learn from, one teacher or the average of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32

from kinema.configs.schema import PairFilterConfig
from kinema.models.flow_geometry import resize_flow
from kinema.pipelines.flow_codec import FlowBlob, FlowHeader, FlowPair


def signal_columns(limits: PairFilterConfig) -> tuple[str, ...]:
    """The signals that the limits ask for, as columns of the flow's samples.parquet."""
    return tuple(dict.fromkeys(column for column, *_ in _ranges(limits)))


def usable_pairs(limits: PairFilterConfig, row: Mapping[str, Any]) -> list[bool]:
    """For every pair of a clip's row, in the order of its blob, whether it is within the limits.

    A signal that could not be known (null) passes: no consistency without backward flow, no photometric error where
    every pixel leaves the picture (such a pair is a cut).
    """
    kept = [True] * row["num_pairs"]
    for column, low, high in _ranges(limits):
        for number, value in enumerate(row[column]):
            if value is not None and not low <= value <= high:
                kept[number] = False
    return kept


def _ranges(limits: PairFilterConfig) -> list[tuple[str, float, float]]:
    """(column, lowest, highest) of every limit that is set."""
    ranges = [
        ("pair_motion_px", -np.inf, limits.max_motion_px),
        ("pair_consistency_px", -np.inf, limits.max_consistency_px),
        ("pair_occluded_share", -np.inf, limits.max_occluded_share),
        ("pair_photometric", -np.inf, limits.max_photometric),
        ("pair_uncertainty_px", -np.inf, limits.max_uncertainty_px),
        ("pair_disagreement_px", -np.inf, limits.max_disagreement_px),
    ]
    ranges = [limit for limit in ranges if limit[2] >= 0]
    ranges += [("pair_motion_px", limits.min_motion_px, np.inf)] if limits.min_motion_px >= 0 else []
    ranges += [("pair_static", 0, 0)] if limits.skip_static else []
    return ranges + ([("pair_cut", 0, 0)] if limits.skip_cuts else [])


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
