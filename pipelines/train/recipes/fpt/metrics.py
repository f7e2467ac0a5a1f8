"""How well predicted distributions of motion fit the truth: errors, shares within thresholds, by pokes, calibration.

Flow and thresholds are in units of the side of the square that the model sees.

Shape legend: B batch, P pokes (group g knows the g first ones), n queries of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kinema.models.fpt.mixture import GaussianMixture, coverage

BIN_STARTS = (0, 1, 2, 5, 10, 30, 100)
"""Numbers of pokes at which a new bin begins."""
CREDIBLE_PERCENT = (10, 30, 50, 70, 90)
"""Regions whose observed coverage is logged."""
CALIBRATION_QUERIES = 256
"""Queries of a (micro-)batch that the coverage is estimated from, evenly spread; one estimate costs thousands."""
CALIBRATION_POINTS = 64


def poke_bins(num_pokes: int) -> list[tuple[str, slice]]:
    """Name and groups of every bin over 0..num_pokes - 1 known pokes, such as ("2_4", slice(2, 5))."""
    starts = [start for start in BIN_STARTS if start < num_pokes]
    stops = [*starts[1:], num_pokes]
    return [
        (f"{start}" if stop == start + 1 else f"{start}_{stop - 1}", slice(start, stop))
        for start, stop in zip(starts, stops, strict=True)
    ]


@torch.no_grad()
def prediction_metrics(
    mixture: GaussianMixture,
    flow: Float[Tensor, "B P n 2"],
    nll: Float[Tensor, "B P n"],
    thresholds: Sequence[float],
) -> dict[str, Tensor]:
    """Means over all queries, as scalars by name.

    epe, distance of the mixture's mean from the true flow; pck_T, share of queries with an error up to T; epe.pokes_K
    and nll.pokes_K, over the queries that know K pokes (`poke_bins`); coverage_C, share of true flows inside the
    credible region of C %, which is C % for a calibrated model.
    """
    error = (mixture.mean - flow.to(mixture.loc)).norm(dim=-1)
    found = {"epe": error.mean()}
    found |= {f"pck_{threshold:g}": (error <= threshold).double().mean() for threshold in thresholds}
    for name, groups in poke_bins(flow.shape[1]):
        found[f"epe.pokes_{name}"] = error[:, groups].mean()
        found[f"nll.pokes_{name}"] = nll[:, groups].detach().mean()
    return found | observed_coverage(mixture, flow)


@torch.no_grad()
def observed_coverage(mixture: GaussianMixture, flow: Float[Tensor, "B P n 2"]) -> dict[str, Tensor]:
    """coverage_C, estimated from `CALIBRATION_QUERIES` of the queries."""
    count = flow.shape[:-1].numel()
    picked = torch.linspace(0, count - 1, min(count, CALIBRATION_QUERIES), device=flow.device).round().long()
    parts = (mixture.logits, mixture.loc, mixture.scale_tril)
    flat = GaussianMixture(*(rearrange(part, "b p n ... -> (b p n) ...") for part in parts))
    levels = flat[picked].credible_level(flow.flatten(0, 2)[picked].to(mixture.loc), CALIBRATION_POINTS)
    observed = coverage(levels, torch.tensor(CREDIBLE_PERCENT, device=levels.device) / 100)
    return {f"coverage_{percent}": share for percent, share in zip(CREDIBLE_PERCENT, observed, strict=True)}
