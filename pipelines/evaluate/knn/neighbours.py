"""Leave-one-out classification by nearest neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ROWS_PER_CHUNK = 1024


def knn_accuracy(embeddings: Float[Tensor, "N d"], labels: list[str], k: int) -> float:
    """Share of items whose label most of their k nearest others have, by cosine after the mean is taken off.

    Ties go to the label of the nearest neighbour among those tied. Memory grows with N times a chunk.
    Raises: ValueError for fewer than two items, or k that is not below their number.
    """
    if not 0 < k < len(labels):
        raise ValueError(f"knn.k={k} neighbours of {len(labels)} items; use 1 to {max(1, len(labels) - 1)}")
    names = sorted(set(labels))
    truth = torch.tensor([names.index(label) for label in labels])
    unit = F.normalize((embeddings - embeddings.mean(dim=0)).double(), dim=1)
    # A vote falls off by too little to outweigh another vote, so that it only decides ties.
    votes = 1 + 0.5 / k * torch.linspace(1, 0, k, dtype=torch.float64)
    right = 0
    for start in range(0, len(unit), ROWS_PER_CHUNK):
        rows = torch.arange(start, min(start + ROWS_PER_CHUNK, len(unit)))
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -2.0
        nearest = truth[similarity.topk(k, dim=1).indices]
        counts = torch.zeros(len(rows), len(names), dtype=torch.float64)
        counts.scatter_add_(1, nearest, votes.expand(len(rows), -1))
        right += int((counts.argmax(dim=1) == truth[rows]).sum())
    return right / len(labels)
