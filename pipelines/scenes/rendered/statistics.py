"""Motion of rendered shots made to follow a histogram: what AutoFlow does by search, on the speeds of layers.

The length of flow at a pixel mixes the speeds of the layers with turning, zooming and the area they cover, so the
shares of speeds are not the histogram itself. They are searched for: each share is scaled by how much its bin falls
short, and the shares of the best round are kept.

Source: Sun et al., "AutoFlow: Learning a Better Training Set for Optical Flow", CVPR 2021.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Float32

from kinema.pipelines.scenes.rendered.settings import REFERENCE_WIDTH, SPEED_EDGES_PX, RenderSettings
from kinema.pipelines.scenes.rendered.shot import RenderedShot

ROUNDS = 8
SHOTS = 48
_SMALL_WIDTH = 64
_DAMPING = 0.7
_FLOOR = 1e-4


def flow_shares(flow_px: Float32[np.ndarray, "2 H W"], gap: int = 1) -> Float[np.ndarray, "bins"]:
    """Known pixels of a field in each bin of SPEED_EDGES_PX, by length a frame at the reference width."""
    lengths = np.hypot(flow_px[0], flow_px[1]).ravel() * (REFERENCE_WIDTH / flow_px.shape[2] / abs(gap))
    known = lengths[np.isfinite(lengths)]
    return np.histogram(np.minimum(known, SPEED_EDGES_PX[-1] - 1e-3), bins=SPEED_EDGES_PX)[0].astype(np.float64)


def rendered_shares(settings: RenderSettings, seed: int = 0, shots: int = SHOTS) -> Float[np.ndarray, "bins"]:
    """The histogram of motion of rendered shots, from small versions of their fields; sums to 1."""
    size = (max(8, _SMALL_WIDTH * settings.height // settings.width), _SMALL_WIDTH)
    total = np.zeros(len(SPEED_EDGES_PX) - 1)
    for index in range(shots):
        total += flow_shares(RenderedShot(settings, seed, index).flow_px(0, 1, size))
    return total / total.sum()


def distance(a: Float[np.ndarray, "bins"], b: Float[np.ndarray, "bins"]) -> float:
    """Earth mover's distance of two histograms, in bins (half octaves)."""
    return float(np.abs(np.cumsum(a / a.sum() - b / b.sum())).sum())


def matched(
    settings: RenderSettings, wanted: Float[np.ndarray, "bins"], rounds: int = ROUNDS, shots: int = SHOTS
) -> tuple[RenderSettings, float, float]:
    """Settings whose shots move like a histogram.

    Args: wanted, pixels in each bin of SPEED_EDGES_PX.
    Returns: the settings, and the distance to the histogram before and after the search.
    Raises: ValueError for an empty histogram.
    """
    if not np.isfinite(wanted).all() or wanted.sum() <= 0:
        raise ValueError("the histogram to match holds no motion; give flow of at least one pair")
    wanted = wanted / wanted.sum()
    current = replace(settings, speed_shares=tuple(np.maximum(wanted, _FLOOR).tolist()))
    first = distance(rendered_shares(settings, shots=shots), wanted)
    best, nearest = settings, first
    for _ in range(rounds):
        got = rendered_shares(current, shots=shots)
        found = distance(got, wanted)
        if found < nearest:
            best, nearest = current, found
        factor = (np.maximum(wanted, _FLOOR) / np.maximum(got, _FLOOR)) ** _DAMPING
        shares = np.array(current.speed_shares) * np.clip(factor, 0.2, 5.0)
        current = replace(current, speed_shares=tuple(np.round(shares / shares.sum(), 8).tolist()))
    return best, first, nearest
