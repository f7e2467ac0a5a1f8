"""`cosine_attention`: cosine similarities with a learned scale per head, rotary embedding and attention."""

import torch
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.cosine_attention.patterns import AttentionPattern, PatternLike, as_pattern
from kinema.kernels.cosine_attention.reference import cosine_attention_reference
from kinema.kernels.dispatch import check_impl, use_triton, why_no_triton

__all__ = ["AttentionPattern", "as_pattern", "cosine_attention", "why_not_triton"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_HEAD = 128
"""Of the kernel; a head is padded to a power of two."""


def cosine_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "_ _ _ _"],
    v: Float[Tensor, "_ _ _ _"],
    theta_q: Float[Tensor, "_ _ _ _"] | None,
    theta_k: Float[Tensor, "_ _ _ _"] | None,
    scale: Float[Tensor, "_"],
    pattern: PatternLike,
    impl: str = "auto",
) -> Float[Tensor, "B H N D"]:
    """Softmax attention with logits (|s| + 1e-6) <rotate(unit(q)), rotate(unit(k))>.

    `reference.cosine_attention_reference` is the specification.

    Args:
        q: [B, H, N, D], any strides.
        k, v: [B, H, M, D], any strides, q's dtype.
        theta_q: [B or 1, H or 1, N, R] rotary angles in radians, 2 R <= D: dims (i, i + R) turn by angle i, dims 2 R
            and above stay. None turns nothing.
        theta_k: [B or 1, H or 1, M, R], likewise.
        scale: [H], s as learned, one per head.
        pattern: "full", "causal", ("query-causal", P), ("query-inference", P), or an `AttentionPattern`.
        impl: "auto" takes the Triton kernel where it can run; "reference" and "triton" force one.

    Returns: [B, H, N, D] in q's dtype; computed in float32, or float64 for float64.
    Raises: ValueError for shapes or dtypes that disagree, an unknown pattern or `impl`, or a forced kernel that cannot
        run.
    """
    check_impl(impl)
    checked = as_pattern(pattern)
    _check_arguments(q, k, v, theta_q, theta_k, scale, checked)
    if use_triton(impl, why_not_triton(q, k, v, theta_q, theta_k, scale, checked)):
        # Imported where it runs: triton is not installed everywhere, and takes its time.
        from kinema.kernels.cosine_attention.op import cosine_attention_triton

        return cosine_attention_triton(q, k, v, theta_q, theta_k, scale, checked)
    return cosine_attention_reference(q, k, v, theta_q, theta_k, scale, checked)


def why_not_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta_q: Tensor | None,
    theta_k: Tensor | None,
    scale: Tensor,
    pattern: PatternLike,
) -> str | None:
    """A sentence that says why the kernel cannot run on these arguments, or None."""
    angles = [theta for theta in (theta_q, theta_k) if theta is not None]
    reason = why_no_triton(q, k, v, scale, *angles)
    if reason is not None:
        return reason
    if q.dtype == torch.float64:
        return "q is float64; the kernel computes in float32"
    D = q.shape[-1]
    if D % 2 != 0 or D > LARGEST_HEAD:
        return f"the head size is {D}; the kernel takes even sizes up to {LARGEST_HEAD}"
    if q.shape[0] * q.shape[1] == 0:
        return f"q has shape {list(q.shape)}; there is nothing to launch a kernel for"
    if any(theta.requires_grad for theta in angles) and torch.is_grad_enabled():
        return "the angles ask for a gradient, which the kernel does not compute; detach them"
    return None


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta_q: Tensor | None,
    theta_k: Tensor | None,
    scale: Tensor,
    pattern: AttentionPattern,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; it must be [batch, heads, length, head size]")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one of float16, bfloat16, float32, float64"
        )
    B, H, N, D = q.shape
    M = k.shape[2]
    if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (B, H, D):
        raise ValueError(
            f"q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; k and v must have the same shape, "
            "and agree with q in batch, heads and head size"
        )
    if min(N, M, D) < 1:
        raise ValueError(f"q has shape {list(q.shape)} and k {list(k.shape)}; length and head size must be at least 1")
    if scale.shape != (H,):
        raise ValueError(f"scale has shape {list(scale.shape)}; it must be [{H}], one number per head")
    if not scale.dtype.is_floating_point:
        raise ValueError(f"scale is {scale.dtype}; it must be a floating-point tensor")
    for name, theta, length in (("theta_q", theta_q, N), ("theta_k", theta_k, M)):
        if theta is not None:
            _check_angles(name, theta, (B, H, length), D)
    if theta_q is not None and theta_k is not None and theta_q.shape[-1] != theta_k.shape[-1]:
        raise ValueError(
            f"theta_q has {theta_q.shape[-1]} angles and theta_k {theta_k.shape[-1]}; queries and keys must turn alike"
        )
    pattern.check(N, M)


def _check_angles(name: str, theta: Tensor, sizes: tuple[int, int, int], D: int) -> None:
    B, H, length = sizes
    fits = theta.dim() == 4 and theta.shape[0] in (1, B) and theta.shape[1] in (1, H) and theta.shape[2] == length
    if not fits:
        raise ValueError(
            f"{name} has shape {list(theta.shape)}; it must be [{B} or 1, {H} or 1, {length}, angles], or None"
        )
    if not theta.dtype.is_floating_point:
        raise ValueError(f"{name} is {theta.dtype}; angles must be a floating-point tensor of radians")
    if 2 * theta.shape[-1] > D:
        raise ValueError(
            f"{name} has {theta.shape[-1]} angles, which turn {2 * theta.shape[-1]} dims of a head of size {D}; "
            f"give at most {D // 2}"
        )
