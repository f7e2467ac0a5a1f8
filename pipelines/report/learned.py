"""What a FlowFeat has learned, to look at: frame, teacher's flow, flow read from the features, and the features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kinema.models.flowfeat.training import NormalEquations
from kinema.pipelines.loader import Clip, ClipIndex
from kinema.pipelines.pictures.images import flow_picture, normalise_images
from kinema.pipelines.pictures.projection import Projection
from kinema.pipelines.report.page import Page
from kinema.pipelines.report.variety import caption_of, spread, varied
from kinema.pipelines.train.recipes.flowfeat import square_flow, square_image

COLUMNS = ("frame (the map is fitted inside the outline)", "teacher's flow", "flow read from the features", "features")
FIT_SHARE = 0.75
"""Side of the window, relative to the frame's, on which the linear map is fitted; the rest is prediction."""
SHOWN_SIDE = 224


@dataclass(frozen=True)
class Seen:
    """One frame of a clip as the model saw it."""

    image: Tensor
    """uint8 [3, S, S]."""
    flow_px: Tensor
    """The teacher's, [2, S, S]."""
    predicted_px: Tensor
    """Read from the features."""
    features: Tensor
    """[C, S, S]."""


def add_learned(
    page: Page, model: Any, index: ClipIndex, *, side: int, ridge_alpha: float, sources: int = 6, frames: int = 6
) -> int:
    """Rows of varied clips over time, with one slider. Args: side, of the square at which the model sees a frame.

    Returns: the number of sources shown.
    """
    rows, seen_sources = [], set()
    for number in varied(index, sources):
        clip = index.clip(number)
        seen = look_at(clip, model, side, ridge_alpha, frames)
        if not seen:
            continue
        seen_sources.add(clip.meta["source"])
        basis = Projection.of([one.features for one in seen])
        longest = max(_longest(one.flow_px) for one in seen)
        cells: list[list[np.ndarray]] = [[], [], [], []]
        for one in seen:
            pictures = (
                _outlined(one.image),
                flow_picture(one.flow_px, _longest(one.flow_px)),
                flow_picture(one.predicted_px, _longest(one.flow_px)),
            )
            for cell, picture in zip(cells, (*pictures, basis.picture(one.features)), strict=True):
                cell.append(picture)
        rows.append((f"{caption_of(clip)}; flow up to {longest:.1f} px", cells))
    if rows:
        page.times(COLUMNS, rows)
    return len(seen_sources)


@torch.inference_mode()
def look_at(clip: Clip, model: Any, side: int, ridge_alpha: float, count: int) -> list[Seen]:
    """Frames of a clip, spread over time, with the longest gap's forward flow.

    The linear map from features to flow is fitted for each frame on its middle window only.
    """
    forward = [(t, gap) for t, gap in clip.flow_pairs if gap > 0]
    if not forward:
        return []
    longest = max(gap for _, gap in forward)
    times = sorted({t for t, gap in forward if gap == longest})
    chosen = [times[i] for i in spread(len(times), count)]
    found = []
    for t, frame in zip(chosen, clip.frames(chosen), strict=True):
        image = square_image(torch.from_numpy(np.ascontiguousarray(frame)), side)
        flow = square_flow(torch.from_numpy(np.ascontiguousarray(clip.flow(t, longest))), side)
        flow = torch.nan_to_num(flow)
        features = model(normalise_images(image.float() / 255)[None])[1][0].float()
        found.append(Seen(image, flow, _read_flow(features, flow, ridge_alpha), features))
    return found


def _read_flow(features: Tensor, flow: Tensor, ridge_alpha: float) -> Tensor:
    """Flow [2, S, S] of a linear map fitted on the middle window."""
    side = flow.shape[-1]
    window = slice(*_window(side))
    seen, wanted = (rearrange(m[:, window, window], "c h w -> (h w) c") for m in (features, flow))
    mean, spread_px = wanted.mean(dim=0), wanted.std(dim=0) + 1e-5
    equations = NormalEquations()
    equations.add(seen, (wanted - mean) / spread_px)
    flow_map = equations.solve(ridge_alpha)
    predicted = (rearrange(features, "c h w -> (h w) c") @ flow_map[:-1] + flow_map[-1]) * spread_px + mean
    return rearrange(predicted, "(h w) c -> c h w", h=side)


def _longest(flow_px: Tensor) -> float:
    """Length that gets the full colour: all but a hundredth of the pixels are shorter."""
    return max(float(flow_px.norm(dim=0).quantile(0.99)), 0.1)


def _window(side: int) -> tuple[int, int]:
    margin = round(side * (1 - FIT_SHARE) / 2)
    return margin, side - margin


def _outlined(image: Tensor) -> np.ndarray:
    picture = rearrange(image, "c h w -> h w c").numpy().copy()
    low, high = _window(picture.shape[0])
    picture[[low, high - 1], low:high] = 255
    picture[low:high, [low, high - 1]] = 255
    return picture
