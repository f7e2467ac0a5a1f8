"""Cosine-similarity attention with rotary embedding and a learned scale per head, in plain PyTorch.

Shapes: B batch, H heads, N rows (queries), M keys, D head size, R rotary angles, P pokes, n queries per poke.

Source: Baumann et al., "What If: Understanding Motion Through Sparse Interactions", arXiv:2510.12777, and its published
code. Ressler-Antal et al., "DisMo", arXiv:2511.23428, publishes the same with sqrt(s) where this has sqrt(|s| + 1e-6):
for the positive scales that it learns (10 at the start) the logits agree to 1e-7.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kinema.kernels.cosine_attention.patterns import AttentionPattern
from kinema.kernels.dispatch import without_autocast
from kinema.kernels.recompute import made_again

EPS = 1e-6
QUERY_CHUNKS = 4
"""Parts that the groups of query_causal are cut into, so that early groups do not multiply with late pokes."""


def cosine_attention_reference(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H M D"],
    v: Float[Tensor, "B H M D"],
    theta_q: Float[Tensor, "_ _ N R"] | None,
    theta_k: Float[Tensor, "_ _ M R"] | None,
    scale: Float[Tensor, "H"],
    pattern: AttentionPattern,
) -> Float[Tensor, "B H N D"]:
    """Softmax attention whose logits are scaled cosines between rotated queries and keys.

    logit(r, c) = (|s| + 1e-6) <rotate(unit(q_r), theta_q_r), rotate(unit(k_c), theta_k_c)>, with
    unit(x) = x / sqrt(sum x^2 + 1e-6), over the keys c that `pattern` shows to row r; no further scaling.
    `rotate` turns dims (i, i + R) by angle i, for i < R, and leaves dims 2 R and above alone.

    Computed in float32 (float64 for float64 input), also under autocast; the result has q's dtype. No [N, N] tensor is
    formed: queries meet the pokes only, and their own term joins them in one softmax.

    Args:
        theta_q, theta_k: angles in radians, of size 1 where they do not differ over batch or heads; None turns nothing.
        scale: s, as learned.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with without_autocast(q):
        strength = (scale.to(dtype).abs() + EPS).sqrt()[:, None, None]
        rotated_q, rotated_k = _prepared(q, strength, theta_q), _prepared(k, strength, theta_k)
        return _attend(rotated_q, rotated_k, v.to(dtype), pattern).to(q.dtype)


def _prepared(x: Tensor, strength: Float[Tensor, "H 1 1"], theta: Tensor | None) -> Tensor:
    """Queries or keys as they are multiplied. A backward pass makes the steps in between again, not kept meanwhile."""

    def work(x: Tensor, strength: Tensor) -> Tensor:
        return rotate(unit(x.to(strength.dtype)) * strength, theta)

    return made_again(work, x, strength)


def unit(x: Float[Tensor, "B H N D"]) -> Float[Tensor, "B H N D"]:
    """x / sqrt(sum x^2 + 1e-6), over the last dimension."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + EPS)


def rotate(x: Float[Tensor, "B H N D"], theta: Float[Tensor, "_ _ N R"] | None) -> Float[Tensor, "B H N D"]:
    """Dims (i, i + R) turned by angle i."""
    if theta is None:
        return x
    cos, sin = theta.to(x.dtype).cos(), theta.to(x.dtype).sin()
    R = theta.shape[-1]
    x1, x2, rest = x.split([R, R, x.shape[-1] - 2 * R], dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def _attend(
    q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H M D"], v: Float[Tensor, "B H M D"], pattern: AttentionPattern
) -> Float[Tensor, "B H N D"]:
    """Softmax attention with logits <q, k> under a pattern."""
    P, N = pattern.num_pokes, q.shape[2]
    if pattern.kind in ("full", "causal"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=pattern.kind == "causal", scale=1.0)
    parts = []
    if P > 0:
        poke_q, poke_k, poke_v = q[:, :, :P], k[:, :, :P], v[:, :, :P]
        parts.append(F.scaled_dot_product_attention(poke_q, poke_k, poke_v, is_causal=True, scale=1.0))
    if pattern.kind == "query_inference" and N > P:
        parts.append(_attend_pokes_and_self(q, k, v, slice(P, N), P, None))
    if pattern.kind == "query_causal" and N > P:
        n = pattern.queries_per_poke(N)
        num_groups = -(-P // QUERY_CHUNKS)
        for first in range(0, P, num_groups):
            last = min(first + num_groups, P)
            rows = slice(P + first * n, P + last * n)
            # Group g sees pokes below g, so the last group of this chunk, last - 1, sees those below last - 1.
            limits = torch.arange(first, last, device=q.device).repeat_interleave(n, output_size=(last - first) * n)
            hidden = torch.arange(last - 1, device=q.device) >= limits[:, None]
            parts.append(_attend_pokes_and_self(q, k, v, rows, last - 1, hidden))
    return torch.cat(parts, dim=2)


def _attend_pokes_and_self(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N D"],
    rows: slice,
    num_pokes: int,
    hidden: Bool[Tensor, "r p"] | None,
) -> Float[Tensor, "B H r D"]:
    """Rows against the first pokes, those marked hidden left out, and against themselves, in one softmax."""
    q, k_own, v_own = q[:, :, rows], k[:, :, rows], v[:, :, rows]
    logits = q @ k[:, :, :num_pokes].transpose(2, 3)  # [B, H, r, p]
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    own = (q * k_own).sum(dim=-1, keepdim=True)
    weights = torch.cat([logits, own], dim=-1).softmax(dim=-1)
    return torch.addcmul(weights[..., :-1] @ v[:, :, :num_pokes], weights[..., -1:], v_own)
