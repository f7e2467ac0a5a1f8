"""Which keys rows see, inside kernels: limits of `AttentionPattern` for blocks of rows.

Rows r, P pokes, n queries per poke. A row sees the keys below its limit and, unless the pattern is full, itself.
"""

from typing import NamedTuple

import triton
import triton.language as tl

FULL = tl.constexpr(0)
CAUSAL = tl.constexpr(1)
QUERY_CAUSAL = tl.constexpr(2)
QUERY_INFERENCE = tl.constexpr(3)
KIND_CODES = {"full": 0, "causal": 1, "query_causal": 2, "query_inference": 3}


class Lengths(NamedTuple):
    """Sizes of a sequence, as kernels take them; what a pattern does not use is 1."""

    H: int
    """Heads."""
    N: int
    """Rows."""
    M: int
    """Keys."""
    P: int
    """Pokes."""
    n: int
    """Queries per poke."""
    num_shared: int
    """Keys from the front that other rows than their own may see."""
    padded: int
    """Rows of the scratch that holds the shared keys: `num_shared` up to a whole number of blocks."""


@triton.jit
def limits_of(rows, lengths, KIND: tl.constexpr):
    """Number of keys from the front that each row sees, itself not counted."""
    if KIND == FULL:
        limits = rows * 0 + lengths.M
    elif KIND == CAUSAL:
        limits = rows
    elif KIND == QUERY_CAUSAL:
        limits = tl.where(rows < lengths.P, rows, (rows - lengths.P) // lengths.n)
    else:
        limits = tl.where(rows < lengths.P, rows, lengths.P)
    return limits


@triton.jit
def seen_by_some(first, last, lengths, KIND: tl.constexpr):
    """The largest limit among rows first..last: limits rise over the pokes, and again over the queries."""
    if KIND == FULL:
        largest = lengths.M
    elif KIND == CAUSAL:
        largest = last
    else:
        of_pokes = tl.where(first < lengths.P, tl.minimum(last, lengths.P - 1), 0)
        largest = tl.maximum(of_pokes, limits_of(last, lengths, KIND))
    return largest


@triton.jit
def seen_by_all(first, last, lengths, KIND: tl.constexpr):
    """The smallest limit among rows first..last: that of the first poke or the first query among them."""
    smallest = limits_of(first, lengths, KIND)
    if KIND == QUERY_CAUSAL:
        smallest = tl.where((first < lengths.P) & (last >= lengths.P), 0, smallest)
    return smallest
