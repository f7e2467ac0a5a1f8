"""How much motion a frame's features know: error in pixels of a linear map from features to flow.

The map is fitted as in FlowFeat's training (ridge regression onto standardised flow), on one half of a frame's cells
of a checkerboard, and judged on the other half. So it measures what features say about motion at pixels whose flow
the fit never saw, against true flow where that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kinema.models.flow_geometry import known_flow, resize_flow
from kinema.models.flowfeat_training import NormalEquations
from kinema.pipelines.pictures import normalise_images, size_for_model

CELLS = 8


@dataclass(frozen=True)
class FlowError:
    """Mean end-point errors over the held-out pixels of all frames, in pixels of the frames as given."""

    epe_px: float
    """Of the linear map from features."""
    constant_epe_px: float
    """Of the best constant, the mean flow of the fitted half: what features without any knowledge reach."""


@torch.no_grad()
def flow_error(
    model: nn.Module,
    frames: Sequence[np.ndarray],
    flows_px: Sequence[np.ndarray],
    valid: Sequence[np.ndarray] | None = None,
    ridge_alpha: float = 0.1,
    short_side: int = 224,
) -> FlowError:
    """Error of flow predicted from a FlowFeat's dense features, by a map fitted on the other half of each frame.

    Args: model, a FlowFeat (`model(x)` gives y_enc, y_dec); frames, uint8 [H, W, 3]; flows_px, float [2, H, W], the
        frames' true flow; valid, bool [H, W], pixels that count (default: all with known flow); ridge_alpha, as in
        training; short_side, frames are shown to the model at this shorter side (rounded to its patch).
    Raises: ValueError if there are no frames, not as many flows as frames, or no pixel that counts.
    """
    if not frames or len(frames) != len(flows_px):
        raise ValueError(f"flow_error: {len(frames)} frames and {len(flows_px)} flows; give one each, at least 1")
    device = next(model.parameters()).device
    errors, constant_errors = [], []
    for number, (frame, flow_px) in enumerate(zip(frames, flows_px, strict=True)):
        image = torch.from_numpy(np.ascontiguousarray(frame)).to(device).permute(2, 0, 1)[None].float() / 255
        truth = torch.from_numpy(np.ascontiguousarray(flow_px)).to(device).float()
        counts = known_flow(truth)
        if valid is not None:
            counts &= torch.from_numpy(np.ascontiguousarray(valid[number])).to(device)
        size = size_for_model(tuple(image.shape[-2:]), short_side, model.encoder)
        shown = F.interpolate(image, size, mode="bilinear", antialias=True)
        features = model(normalise_images(shown))[1][0]  # [C, h, w]
        error, constant = _frame_errors(features, truth, counts, ridge_alpha)
        errors.append(error)
        constant_errors.append(constant)
    if not sum(len(error) for error in errors):
        raise ValueError("flow_error: no held-out pixel has known flow; check the frames' flow and `valid`")
    return FlowError(torch.cat(errors).mean().item(), torch.cat(constant_errors).mean().item())


def _frame_errors(
    features: Float[Tensor, "C h w"], flow_px: Float[Tensor, "2 H W"], counts: Bool[Tensor, "H W"], alpha: float
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """End-point error at every held-out pixel that counts: of the fitted map, and of the fitted half's mean."""
    size = features.shape[-2:]
    full = flow_px.shape[-2:]
    target = resize_flow(torch.where(counts, flow_px, 0.0), *size) if size != full else flow_px
    usable = F.interpolate(counts[None, None].float(), size, mode="area")[0, 0] == 1
    # Pixels that the fit must not see are left out of its sums by weight 0.
    fitted = (usable & ~checkerboard(*size, device=flow_px.device)).float().flatten()  # [P]
    number = fitted.sum().clamp(min=1)
    x = features.float().flatten(1).T  # [P, C]
    y = target.flatten(1).T  # [P, 2]
    mean = (y * fitted[:, None]).sum(0) / number
    spread = (((y - mean).square() * fitted[:, None]).sum(0) / number).sqrt() + 1e-5
    chosen = fitted.bool()
    equations = NormalEquations()
    equations.add(x[chosen], ((y - mean) / spread)[chosen])
    flow_map = equations.solve(alpha)
    predicted = (x @ flow_map[:-1] + flow_map[-1]) * spread + mean  # [P, 2]
    predicted = resize_flow(predicted.T.unflatten(1, size), *full) if size != full else predicted.T.unflatten(1, size)
    judged = counts & checkerboard(*full, device=flow_px.device)
    scale = flow_px.new_tensor([full[1] / size[1], full[0] / size[0]])
    error = (predicted - flow_px).norm(dim=0)[judged]
    constant = ((mean * scale)[:, None, None] - flow_px).norm(dim=0)[judged]
    return error, constant


def checkerboard(height: int, width: int, device: torch.device | None = None) -> Bool[Tensor, "H W"]:
    """True on the held-out cells; the shorter side has `CELLS` of them, at any size the same cells."""
    cells_y = CELLS * max(1, round(height / min(height, width)))
    cells_x = CELLS * max(1, round(width / min(height, width)))
    y = (torch.arange(height, device=device) + 0.5) * cells_y // height
    x = (torch.arange(width, device=device) + 0.5) * cells_x // width
    return (y[:, None] + x[None, :]) % 2 == 1
