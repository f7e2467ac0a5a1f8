"""What a Flow Poke Transformer says about an image: pokes, density at a point, mean flow, a joint sample."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from kinema.models.backbones.rotary_layers import cell_centres
from kinema.models.flow.geometry import resize_flow
from kinema.models.fpt.mixture import GaussianMixture
from kinema.models.fpt.model import FlowPokeTransformer
from kinema.pipelines.pictures.images import flow_picture, panel
from kinema.pipelines.pictures.motion import ARROW_COLOUR

PICTURE_SAMPLES = 3
PICTURE_PX = 256
POKES_SHOWN = 4
DENSITY_CELLS = 64
FLOW_CELLS = 32
SAMPLE_CELLS = 7
TRUTH_COLOUR = (80, 220, 100)


@torch.no_grad()
def prediction_pictures(
    model: FlowPokeTransformer, batch: dict[str, Any], image: Float[Tensor, "B 3 S S"]
) -> UInt8[np.ndarray, "H W 3"]:
    """A row for each of the first samples, each told `POKES_SHOWN` of its pokes.

    Columns: the image with pokes; where the queried point may end (brighter is likelier; a ring at the point, a green
    arrow to its true end); mean flow on a grid, as colours; one joint sample on a coarse grid, as arrows.
    """
    shown: list[np.ndarray] = []
    for i in range(min(PICTURE_SAMPLES, len(image))):
        one = slice(i, i + 1)
        d_img = model.project_image(model.embed_image(image[one]))
        known = min(POKES_SHOWN, batch["poke_pos"].shape[1] - 1)
        pokes = (batch["poke_pos"][one, :known], batch["poke_flow"][one, :known])
        static = batch["camera_static"][one]
        picture = image_to_picture(image[i])

        query, truth = (batch[name][one, known, :1] for name in ("query_pos", "query_flow"))
        density = density_on_square(model.predict_parallel(*pokes, query, static, d_img)[0, 0], query[0, 0])
        mean = mean_flow(model, *pokes, static, d_img)
        places = _grid(SAMPLE_CELLS, image.device)
        sampled = model.predict_autoregressive(*pokes, places, static, d_img, randomize_order=True)
        greyed = _grey(picture)
        shown += [
            arrows(picture, *(p[0] for p in pokes)),
            arrows(_with_density(greyed, density), query[0], truth[0], TRUTH_COLOUR, ring=True),
            flow_picture(resize_flow(mean, PICTURE_PX, PICTURE_PX)),
            arrows(greyed, places[0], sampled[0]),
        ]
    return panel(shown, columns=4)


def mean_flow(
    model: FlowPokeTransformer,
    poke_pos: Float[Tensor, "1 P 2"],
    poke_flow: Float[Tensor, "1 P 2"],
    camera_static: Bool[Tensor, "1"],
    d_img: dict[str, Tensor],
) -> Float[Tensor, "2 cells cells"]:
    """Mean of the predicted motion on `FLOW_CELLS` x `FLOW_CELLS` cells, in cells."""
    places = _grid(FLOW_CELLS, poke_pos.device)
    mixture = model.predict_parallel(poke_pos, poke_flow, places, camera_static, d_img)
    return mixture.mean[0].float().T.reshape(2, FLOW_CELLS, FLOW_CELLS) * FLOW_CELLS


def density_on_square(mixture: GaussianMixture, start: Float[Tensor, "2"]) -> Float[np.ndarray, "cells cells"]:
    """Probability density of the end of a point's motion over the square, 1 at the most likely cell."""
    ends = _grid(DENSITY_CELLS, start.device)[0]
    log_density = mixture.log_prob((ends - start).to(mixture.loc))
    return (log_density - log_density.max()).exp().reshape(DENSITY_CELLS, DENSITY_CELLS).float().cpu().numpy()


def arrows(
    picture: UInt8[np.ndarray, "H W 3"],
    pos: Float[Tensor, "N 2"],
    flow: Float[Tensor, "N 2"],
    colour: tuple[int, int, int] = ARROW_COLOUR,
    ring: bool = False,
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture of the square with an arrow from every position to where it moves."""
    picture, side = picture.copy(), len(picture)
    starts, ends = ((p.float().cpu().numpy() * side - 0.5).clip(-side, 2 * side) for p in (pos, pos + flow))
    for start, end in zip(starts.round().astype(int), ends.round().astype(int), strict=True):
        cv2.circle(picture, start.tolist(), 4 if ring else 2, colour, 1 if ring else cv2.FILLED, cv2.LINE_AA)
        if np.abs(end - start).max() > 1:
            cv2.arrowedLine(picture, start.tolist(), end.tolist(), colour, 1, cv2.LINE_AA, tipLength=0.25)
    return picture


def image_to_picture(image: Float[Tensor, "3 S S"]) -> UInt8[np.ndarray, "H W 3"]:
    """An image in -1..1 at the size of the pictures."""
    pixels = ((image.permute(1, 2, 0).float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    return cv2.resize(pixels, (PICTURE_PX, PICTURE_PX), interpolation=cv2.INTER_AREA)


def _grid(cells: int, device: torch.device) -> Float[Tensor, "1 N 2"]:
    return cell_centres(cells, cells, device=device).reshape(1, -1, 2)


def _grey(picture: np.ndarray) -> np.ndarray:
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return cv2.cvtColor((grey // 2 + 40).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def _with_density(picture: np.ndarray, density: np.ndarray) -> np.ndarray:
    """Red where the density is high; its root, so that tails are seen."""
    strength = cv2.resize(np.sqrt(density), picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)[..., None]
    return (picture * (1 - strength) + np.array([255, 60, 40]) * strength).round().astype(np.uint8)
