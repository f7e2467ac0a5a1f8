"""Calls of cosine attention that are compiled ahead of time: tensors as the models hold them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kinema.kernels.ahead_of_time import Case
from kinema.kernels.cosine_attention.op import run_backward, run_forward
from kinema.kernels.cosine_attention.patterns import AttentionPattern

HEADS = 12
# Head size and angles: Flow Poke Transformer, DisMo's generator, a large head.
SIZES = ((64, 32), (72, 18), (128, 64))
PATTERNS = (
    AttentionPattern("query_causal", 128),
    AttentionPattern("full"),
    AttentionPattern("causal"),
    AttentionPattern("query_inference", 100),
)
QUICK = (
    "bfloat16 D64 R32 query_causal",
    "bfloat16 D64 R32 full",
    "bfloat16 D72 R18 full",
    "bfloat16 D128 R64 causal",
    "float32 D64 R32 query_causal",
)


def cases() -> list[Case]:
    """Every head size, pattern and dtype, heads behind positions as linear layers leave them."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D, R in SIZES:
            for pattern in PATTERNS:
                name = f"{str(dtype).removeprefix('torch.')} D{D} R{R} {pattern.kind}"
                quick = name in QUICK
                found.append(Case(name, functools.partial(_call, dtype, D, R, pattern), quick))
    return found


def _call(dtype: torch.dtype, D: int, R: int, pattern: AttentionPattern, length: int = 2048) -> None:
    def heads_last(columns: int, kind: torch.dtype) -> Tensor:
        return torch.empty(2, length, HEADS, columns, dtype=kind, device="meta").transpose(1, 2)

    q, k, v, dout = (heads_last(D, dtype) for _ in range(4))
    theta = torch.empty(2, HEADS, length, R, device="meta")
    scale = torch.empty(HEADS, device="meta")
    out, lse = run_forward(q, k, v, theta, theta, scale, pattern.kind, pattern.num_pokes)
    run_backward(dout, q, k, v, theta, theta, scale, out, lse, pattern.kind, pattern.num_pokes)
