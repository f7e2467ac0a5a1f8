"""How much motion a frame's features know: error in pixels of a linear map from features to flow.

The question is the one FlowFeat is trained on: a map fitted by ridge regression on one crop of a frame has to give
the flow of another crop. Here it is asked of frames with true flow, which training need not have seen, and answered
in pixels: lower is better, and the error of the first crop's mean flow is what features without knowledge reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from kinema.models.flow.geometry import known_flow
from kinema.models.flowfeat.training import NormalEquations, random_crop_matrix, sample_crop
from kinema.pipelines.pictures.images import normalise_images
from kinema.pipelines.train.recipes.flowfeat import square_image

MIN_SPREAD_PX = 0.25


@dataclass(frozen=True)
class FlowError:
    """Mean end-point errors over the judged crops of all frames, in pixels of the frames as given."""

    epe_px: float
    """Of the linear map from features."""
    constant_epe_px: float
    """Of the mean flow of the crop on which the map was fitted."""
    r2: float = math.nan
    """Share of the flow's variance over the judged crops that the linear map explains. The variance is that around each
    judged crop's own mean, the best constant flow, which explains 0; every frame counts the same, as its flow is
    divided by its deviation. Frames that deviate by less than `MIN_SPREAD_PX` have no motion to explain."""
    num_frames: int = 0
    """Frames that entered r2."""


@torch.no_grad()
def flow_error(
    model: nn.Module,
    frames: Sequence[np.ndarray],
    flows_px: Sequence[np.ndarray],
    valid: Sequence[np.ndarray] | None = None,
    *,
    resize: int = 448,
    crop: int = 224,
    crop_scale: tuple[float, float] = (0.5, 0.75),
    ridge_alpha: float = 0.1,
    crops_per_frame: int = 4,
    seed: int = 0,
) -> FlowError:
    """Error of the flow that a FlowFeat's dense features give on one crop, by a map fitted on another.

    Args: model, a FlowFeat (`model(x)` gives y_enc, y_dec); frames, uint8 [H, W, 3]; flows_px, float [2, H, W], their
        true flow; valid, bool [H, W], pixels that count (default: all with known flow); resize, crop, crop_scale and
        ridge_alpha, as in training; crops_per_frame, pairs of crops, drawn from `seed`: the same for every model.
    Raises: ValueError if there are no frames, not as many flows as frames, or no pixel that counts.
    """
    if not frames or len(frames) != len(flows_px):
        raise ValueError(f"flow_error: {len(frames)} frames and {len(flows_px)} flows; give one each, at least 1")
    device = next(model.parameters()).device
    rng = np.random.default_rng(seed)
    sums = torch.zeros(5, dtype=torch.float64)  # error of the map, of the constant, pixels; squares left, and there
    num_moving = 0
    for number, (frame, flow) in enumerate(zip(frames, flows_px, strict=True)):
        image = square_image(torch.from_numpy(np.ascontiguousarray(frame)), resize).to(device)
        truth = _centre_square(torch.from_numpy(np.ascontiguousarray(flow)).float()).to(device)
        counts = known_flow(truth)
        if valid is not None:
            counts &= _centre_square(torch.from_numpy(np.ascontiguousarray(valid[number]))).to(device)
        maps = torch.cat([torch.where(counts, truth, 0.0), counts[None].float()])
        spread = _spread(truth, counts)
        num_moving += spread >= MIN_SPREAD_PX
        for _ in range(crops_per_frame):
            windows = [random_crop_matrix((resize, resize), rng, crop_scale) for _ in range(2)]
            found = _crop_errors(model, image, maps, torch.stack(windows).to(device), crop, ridge_alpha)
            found[3:] *= float(spread >= MIN_SPREAD_PX) / max(spread, MIN_SPREAD_PX) ** 2
            sums += found
    if not sums[2]:
        raise ValueError("flow_error: no pixel has known flow; check the frames' flow and `valid`")
    r2 = float(1 - sums[3] / sums[4]) if sums[4] else math.nan
    return FlowError(float(sums[0] / sums[2]), float(sums[1] / sums[2]), r2, num_moving)


def _spread(flow: Tensor, counts: Tensor) -> float:
    """Deviation of the flow from its mean over the pixels that count, both components together, in pixels."""
    if not counts.any():
        return 0.0
    return float(flow[:, counts].var(dim=1, correction=0).sum().sqrt())


def _crop_errors(
    model: nn.Module, image: Tensor, maps: Tensor, windows: Tensor, crop: int, ridge_alpha: float
) -> Tensor:
    """Sums over the second crop's pixels that count: error of the map, of the constant, their number, squared error of
    the map, and squared distance to the crop's mean flow.

    Args: image, uint8 [3, S, S]; maps, [3, s, s], flow and whether it counts; windows, [2, 2, 3], crop matrices.
    """
    pair = (2, -1, -1, -1)
    images = normalise_images(image.float() / 255).expand(pair)
    features = model(sample_crop(images, windows, (crop, crop)))[1].float()
    x = rearrange(features, "two c h w -> two (h w) c")
    seen = rearrange(sample_crop(maps.expand(pair), windows, (crop, crop)), "two c h w -> two (h w) c")
    flow, counts = seen[..., :2], seen[..., 2] > 1 - 1e-4
    if not counts[0].any() or not counts[1].any():
        return torch.zeros(5, dtype=torch.float64)
    fitted = flow[0][counts[0]]
    mean, spread = fitted.mean(dim=0), fitted.std(dim=0, correction=0) + 1e-5
    equations = NormalEquations()
    equations.add(x[0][counts[0]], (fitted - mean) / spread)
    flow_map = equations.solve(ridge_alpha)
    predicted = (x[1] @ flow_map[:-1] + flow_map[-1]) * spread + mean
    judged = counts[1]
    error = (predicted - flow[1]).norm(dim=1)[judged].sum()
    constant = (mean - flow[1]).norm(dim=1)[judged].sum()
    there = flow[1][judged]
    left = (predicted[judged] - there).square().sum()
    variance = (there - there.mean(dim=0)).square().sum()
    return torch.stack([error, constant, judged.sum(), left, variance]).double().cpu()


def _centre_square(maps: Tensor) -> Tensor:
    """The centre square of [..., H, W]; the one that `square_image` shows."""
    height, width = maps.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return maps[..., top : top + side, left : left + side]
