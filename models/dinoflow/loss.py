"""DinoFlow's training loss: masked L1 end-point error.

Source: model card of blanchon/dinoflow-model, which names the loss and its cap of 400 pixels.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def endpoint_loss(
    flow: Float[Tensor, "B 2 H W"],
    flow_gt: Float[Tensor, "B 2 H W"],
    valid: Float[Tensor, "B H W"],
    max_motion_px: float = 400.0,
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    """|du| + |dv| in pixels, averaged over the pixels of each sample that count.

    A pixel counts where `valid` is at least 0.5 and it moves less than `max_motion_px`; unknown flow may be nan.

    Returns: the mean of each sample, 0 with a graph where none of its pixels counts, and whether one does.
    """
    counted = (valid >= 0.5) & (flow_gt.norm(dim=1) < max_motion_px)
    # Unknown ground truth may be nan, which no later product with 0 would take out of the gradient.
    known = torch.where(counted[:, None], flow_gt, 0.0)
    error = torch.where(counted, (flow.float() - known).abs().sum(dim=1), 0.0)
    number = counted.sum(dim=(1, 2))
    return error.sum(dim=(1, 2)) / number.clamp_min(1), number > 0
