"""The clips most like a query, by comparing with every window of a corpus in blocks.

A clip's score is the mean, over the query's windows, of the cosine of the clip's best window: 1 if everything that
happens in the query happens somewhere in the clip, whatever else does. Memory: a block, and k clips a query.

Shape legend: W windows of a block, C its clips, M windows of all queries, Q queries, d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kinema.pipelines.search.windows import Block


@dataclass(frozen=True, order=True)
class Match:
    """A clip that was found; the best sorts first."""

    distance: float
    """1 - score."""
    key: str

    @property
    def score(self) -> float:
        """Mean cosine, at most 1."""
        return 1 - self.distance


class Nearest:
    """The k best clips seen so far, one of each group of copies.

    Args: copies, {key: what stands for its group}, of clips that have copies; without, the groups that are left out.
    """

    def __init__(self, k: int, copies: Mapping[str, str], without: Iterable[str] = ()):
        self.k, self.copies, self.without = k, copies, frozenset(without)
        self._best: dict[str, Match] = {}

    def offer(self, keys: Sequence[str], scores: Float[np.ndarray, "C"]) -> None:
        """Keep what is better than the worst kept."""
        limit = self._worst()
        for number in np.argsort(-scores, kind="stable"):
            match = Match(1 - float(scores[number]), keys[number])
            if len(self._best) >= self.k and match > limit:
                break
            group = self.copies.get(match.key, match.key)
            if group in self.without or self._best.get(group, match) < match:
                continue
            self._best[group] = match
            if len(self._best) > self.k:
                del self._best[max(self._best, key=self._best.__getitem__)]
            limit = self._worst()

    def matches(self) -> list[Match]:
        """Best first; equal scores by key."""
        return sorted(self._best.values())

    def _worst(self) -> Match:
        return max(self._best.values(), default=Match(np.inf, ""))


def search(
    blocks: Iterable[Block], queries: Sequence[Float[np.ndarray, "m d"]], nearest: Sequence[Nearest]
) -> list[list[Match]]:
    """The best clips for each query, best first; the corpus is read once for all of them.

    Args: queries, windows of length 1 of each, at least one; nearest, where each one's clips are gathered.
    """
    windows = np.concatenate(queries)
    starts = np.cumsum([0, *(len(query) for query in queries[:-1])])
    counts = np.array([len(query) for query in queries], np.float32)
    for block in blocks:
        scores = clip_scores(block, windows, starts, counts)
        for number, found in enumerate(nearest):
            found.offer(block.keys, scores[:, number])
    return [found.matches() for found in nearest]


def clip_scores(
    block: Block, windows: Float[np.ndarray, "M d"], starts: np.ndarray, counts: np.ndarray
) -> Float[np.ndarray, "C Q"]:
    """Score of every clip of a block for every query; starts and counts say which windows are whose."""
    cosines = block.values @ windows.T  # [W, M]
    best = np.maximum.reduceat(cosines, block.starts, axis=0)  # [C, M]
    return np.add.reduceat(best, starts, axis=1) / counts
