"""Learnt upsampling in plain PyTorch: coarse maps at f times the size, as RAFT and its descendants do it."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def convex_upsample_reference(
    maps: Float[Tensor, "B C H W"], logits: Float[Tensor, "B K H W"], scale: float = 1.0
) -> Float[Tensor, "B C Hf Wf"]:
    """Maps at f times the size: convex combinations of 3x3 coarse neighbours, the same for every channel.

    out[b, c, f y + j, f x + i] = sum over k of w[k] maps[b, c, y + k // 3 - 1, x + k % 3 - 1], 0 outside the map, where
    w is the softmax over k of scale logits[b, (k f + j) f + i, y, x]: K = 9 f^2.

    Returns: float32 (float64 if one of the two is), computed in that.
    Source: Teed and Deng, arXiv:2003.12039, section 3.3, whose logits are scaled by 0.25.
    """
    B, C, H, W = maps.shape
    factor = math.isqrt(logits.shape[1] // 9)
    dtype = torch.promote_types(torch.float32, torch.promote_types(maps.dtype, logits.dtype))
    scaled = logits.to(dtype) if scale == 1.0 else scale * logits.to(dtype)
    weights = scaled.reshape(B, 9, factor**2, H * W).softmax(dim=1)
    neighbours = F.unfold(maps.to(dtype), 3, padding=1).view(B, C, 9, H * W)
    # One neighbour at a time: all at once would hold nine maps of the full size.
    fine = weights[:, None, 0] * neighbours[:, :, 0, None]  # [B, C, f^2, H W]
    for k in range(1, 9):
        fine = torch.addcmul(fine, weights[:, None, k], neighbours[:, :, k, None])
    fine = fine.view(B, C, factor, factor, H, W).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(B, C, factor * H, factor * W)
