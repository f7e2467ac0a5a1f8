"""Overlays of the page: density of the motion at a point, mean flow, how much a poke says about every point.

Shape legend: G side of the grid of queries, S side of a picture in pixels.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from PIL import Image
from scipy.ndimage import binary_erosion, center_of_mass, label, maximum_filter

from kinema.models.fpt.mixture import GaussianMixture
from kinema.pipelines.pictures.images import flow_picture

OVERLAY_PX = 256
DENSITY_PX = 161
"""Odd, so that the middle pixel is no motion."""
SMALLEST_REACH, LARGEST_REACH = 0.02, 1.5
REGIONS = (0.5, 0.9)
"""Credible regions whose borders the density picture shows."""
LOWEST_MODE = 0.1
"""Maxima below this share of the highest are not called modes."""
SMALLEST_FULL_COLOUR = 0.01
"""Flow this long has full colour at the least, in sides of the image: noise around zero must look like zero."""
SMALLEST_FULL_HEAT_NATS = 0.05


@dataclass(frozen=True)
class Density:
    """The density of the flow at one point, as a picture."""

    picture: UInt8[np.ndarray, "S S 4"]
    """RGBA; the middle is no motion, the borders are `reach` away from it."""
    reach: float
    """Half the side, in sides of the image."""
    modes: list[tuple[float, float, float]]
    """Maxima (dx, dy, height relative to the highest), highest first, to the accuracy of a pixel."""


def density_of(mixture: GaussianMixture, side_px: int = DENSITY_PX) -> Density:
    """Colour and opacity by density, white borders around the regions of `REGIONS` of the probability.

    Each pixel shows the density averaged over about its size, so that narrow peaks are not missed between pixels.
    Args: a single mixture, batch shape ().
    """
    reach = _reach(mixture)
    pixel = 2 * reach / side_px
    ticks = (torch.arange(side_px, dtype=torch.float64) + 0.5) * pixel - reach
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    log_density = _blurred(mixture, pixel).log_prob(torch.stack([x, y], dim=-1))
    relative = (log_density - log_density.max()).exp().numpy()
    picture = _coloured(relative, "inferno")
    for probability in REGIONS:
        inside = relative >= _border(relative, probability)
        picture[inside & ~binary_erosion(inside)] = (255, 255, 255, 230)
    return Density(picture, reach, _maxima(relative, ticks.numpy()))


def flow_overlay(flow: Float[np.ndarray, "G G 2"], max_flow: float) -> UInt8[np.ndarray, "S S 3"]:
    """The field in the colours of the flow wheel, smooth between the queries; `max_flow` has full colour."""
    smooth = cv2.resize(flow.astype(np.float32), (OVERLAY_PX, OVERLAY_PX), interpolation=cv2.INTER_LINEAR)
    return flow_picture(torch.from_numpy(smooth).permute(2, 0, 1), max_flow)


def full_colour(flow: Float[np.ndarray, "G G 2"]) -> float:
    """The length that gets full colour: the field's longest vector, within reason."""
    return max(float(np.linalg.norm(flow, axis=-1).max()), SMALLEST_FULL_COLOUR)


def heat_overlay(nats: Float[np.ndarray, "G G"]) -> tuple[UInt8[np.ndarray, "S S 4"], float]:
    """Information in nats as a heat map, clear where there is none, and the value of the hottest colour."""
    hottest = max(float(nats.max()), SMALLEST_FULL_HEAT_NATS)
    smooth = cv2.resize(nats.astype(np.float32), (OVERLAY_PX, OVERLAY_PX), interpolation=cv2.INTER_LINEAR)
    return _coloured(np.clip(smooth / hottest, 0, 1), "inferno"), hottest


def data_uri(picture: UInt8[np.ndarray, "H W C"]) -> str:
    """A picture as a PNG that a page can show at once."""
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"


def png(picture: UInt8[np.ndarray, "H W C"]) -> bytes:
    """PNG, packed quickly rather than tightly."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _coloured(share: Float[np.ndarray, "H W"], palette: str) -> UInt8[np.ndarray, "H W 4"]:
    """A palette from 0 to 1; small values are transparent, but not so that they vanish."""
    picture = (colormaps[palette](0.1 + 0.9 * share) * 255).round().astype(np.uint8)
    picture[..., 3] = (np.sqrt(share) * 235).round().astype(np.uint8)
    return picture


def _reach(mixture: GaussianMixture) -> float:
    """Distance from no motion that holds nearly all of the probability."""
    radius = mixture.covariance.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
    ends = mixture.loc.abs().amax(-1) + 2.5 * radius
    needed = 1.1 * float(ends[mixture.weights > 0.02].max())
    return min(max(needed, SMALLEST_REACH), LARGEST_REACH)


def _blurred(mixture: GaussianMixture, deviation: float) -> GaussianMixture:
    """The mixture after adding independent normal noise."""
    wide = mixture.to(torch.float64)
    covariance = wide.covariance + deviation**2 * torch.eye(2, dtype=torch.float64)
    return GaussianMixture(wide.logits, wide.loc, torch.linalg.cholesky(covariance))


def _border(relative: np.ndarray, probability: float) -> float:
    """The density above which this share of the picture's probability lies."""
    ordered = np.sort(relative, axis=None)[::-1]
    mass = np.cumsum(ordered)
    return float(ordered[np.searchsorted(mass, probability * mass[-1])])


def _maxima(relative: np.ndarray, ticks: np.ndarray) -> list[tuple[float, float, float]]:
    """Peaks inside the picture, those of several equal pixels taken together."""
    highest = (relative == maximum_filter(relative, size=5)) & (relative >= LOWEST_MODE)
    highest[[0, -1]] = highest[:, [0, -1]] = False
    peaks, count = label(highest, np.ones((3, 3)))
    found = []
    for row, column in center_of_mass(peaks > 0, peaks, range(1, count + 1)):
        x, y = (float(np.interp(place, np.arange(len(ticks)), ticks)) for place in (column, row))
        found.append((x, y, float(relative[round(row), round(column)])))
    return sorted(found, key=lambda mode: -mode[2])
