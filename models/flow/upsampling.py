"""Learnt upsampling of coarse maps, as RAFT and its descendants do it.

Source: Teed and Deng, arXiv:2003.12039, section 3.3.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def convex_upsample(maps: Float[Tensor, "B C H W"], logits: Float[Tensor, "B K H W"]) -> Float[Tensor, "B C Hf Wf"]:
    """Maps at f times the size: convex combinations of 3x3 coarse neighbours, the same for every channel.

    Neighbours outside the map count as zero. Logits, K = 9 f^2, are over neighbours, then fine rows, then columns.
    """
    B, C, H, W = maps.shape
    factor = math.isqrt(logits.shape[1] // 9)
    weights = logits.float().reshape(B, 9, factor**2, H * W).softmax(dim=1)
    neighbours = F.unfold(maps.float(), 3, padding=1).view(B, C, 9, H * W)
    # One neighbour at a time: all at once would hold nine maps of the full size.
    fine = weights[:, None, 0] * neighbours[:, :, 0, None]  # [B, C, f^2, H W]
    for k in range(1, 9):
        fine = torch.addcmul(fine, weights[:, None, k], neighbours[:, :, k, None])
    fine = fine.view(B, C, factor, factor, H, W).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(B, C, factor * H, factor * W)
