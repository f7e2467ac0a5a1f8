"""Products of query pixels with the lattice of their windows, and their gradients, in plain PyTorch.

Three ways to the same products, chosen per level:
- gathered: each query fetches its K^2 target pixels. Any motion, static shapes, bound by memory.
- boxed: the queries of a tile fetch one box of the target together and are multiplied with all of it, which is
  a matrix product; the few whose window leaves the box are gathered. Neighbours move alike, so that this
  is the usual case, and it is several times faster.
- whole: the map is hardly larger than a box (coarse levels); the box is the map.

Shapes: t tiles of n queries, C channels, h w target map, K lattice points per axis, S side of the box.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinema.kernels.correlation_lookup.window import clamped_index, positions

TILE = 8
"""Side of a tile of queries."""
BOX_SLACK = 6
"""Pixels of level 0 by which the motion within a tile may vary before queries leave the box."""
WHOLE_MAP_BOXES = 2
"""A map of at most so many boxes is multiplied as a whole."""


class Lattice(NamedTuple):
    """Where the windows of some tiles lie in one level of one target."""

    y: Int[Tensor, "t n"]
    """First lattice row of each query."""
    x: Int[Tensor, "t n"]
    side: int
    """K."""


@dataclass(frozen=True)
class Target:
    """One level of one target map."""

    rows: Float[Tensor, "hw C"]
    height: int
    width: int
    level: int
    boxed: bool
    """Whether boxes may be used: their outliers make shapes depend on the data."""

    def is_whole(self, side: int) -> bool:
        return self.boxed and self.height * self.width <= WHOLE_MAP_BOXES * box_side(side, self.level) ** 2


def box_side(side: int, level: int) -> int:
    """Side of the box of target pixels that a tile of queries fetches, given that of a lattice."""
    return side + -(-(TILE - 1 + BOX_SLACK) // 2**level)


def lattice_products(queries: Float[Tensor, "t n C"], target: Target, lattice: Lattice) -> Float[Tensor, "t n KK"]:
    """Dot products of each query with the K^2 target pixels of its lattice (row-major).

    Positions outside the map give the products of some pixel inside; the caller's weights are 0 there.
    """
    if not target.boxed:
        return _gathered(queries.flatten(0, 1), target, _index(target, lattice).flatten(0, 1)).unflatten(
            0, queries.shape[:2]
        )
    if target.is_whole(lattice.side):
        return torch.matmul(queries, target.rows.t()).gather(2, _index(target, lattice))
    box = _Box(target, lattice)
    products = torch.bmm(queries, box.features.transpose(1, 2)).gather(2, box.index)
    if box.outliers.numel():
        fetch = _index(target, lattice).flatten(0, 1)[box.outliers]
        products.flatten(0, 1)[box.outliers] = _gathered(queries.flatten(0, 1)[box.outliers], target, fetch)
    return products


def add_gradients(
    grad: Float[Tensor, "t n KK"],
    queries: Float[Tensor, "t n C"],
    target: Target,
    lattice: Lattice,
    query_grad: Float[Tensor, "t n C"] | None,
    target_grad: Float[Tensor, "hw C"] | None,
) -> None:
    """Adds the gradients of `lattice_products` to those given; `grad` must be 0 outside the map."""
    if not target.boxed:
        index = _index(target, lattice).flatten(0, 1)
        _add_gathered(grad.flatten(0, 1), queries.flatten(0, 1), target, index, _flat(query_grad), target_grad)
        return
    if target.is_whole(lattice.side):
        index = _index(target, lattice)
        # Positions outside share the index of a border pixel and add 0 to it.
        dense = grad.new_zeros(*grad.shape[:2], len(target.rows)).scatter_add_(2, index, grad).flatten(0, 1)
        if query_grad is not None:
            query_grad.flatten(0, 1).addmm_(dense, target.rows)
        if target_grad is not None:
            target_grad.addmm_(dense.t(), queries.flatten(0, 1))
        return
    box = _Box(target, lattice)
    if box.outliers.numel():
        rows, index = box.outliers, _index(target, lattice).flatten(0, 1)[box.outliers]
        part = None if query_grad is None else torch.zeros_like(queries.flatten(0, 1)[rows])
        _add_gathered(grad.flatten(0, 1)[rows], queries.flatten(0, 1)[rows], target, index, part, target_grad)
        if query_grad is not None and part is not None:
            query_grad.flatten(0, 1).index_add_(0, rows, part)
        grad = grad.flatten(0, 1).index_fill(0, rows, 0.0).view_as(grad)
    dense = grad.new_zeros(*grad.shape[:2], box.features.shape[1]).scatter_(2, box.index, grad)
    if query_grad is not None:
        query_grad.baddbmm_(dense, box.features)
    if target_grad is not None:
        parts = torch.bmm(dense.transpose(1, 2), queries)
        target_grad.index_add_(0, box.pixels.flatten(), parts.flatten(0, 1))


class _Box:
    """The box of each tile: its pixels, its features, and where in it the windows lie."""

    def __init__(self, target: Target, lattice: Lattice) -> None:
        side, extent = lattice.side, box_side(lattice.side, target.level)
        room = extent - side
        # Around the median motion: one stray query does not move the box away from the others.
        top = lattice.y.median(dim=1, keepdim=True).values - room // 2
        left = lattice.x.median(dim=1, keepdim=True).values - room // 2
        y, x = lattice.y - top, lattice.x - left
        self.outliers = ((y < 0) | (y > room) | (x < 0) | (x > room)).flatten().nonzero().squeeze(1)
        rows, columns = positions(y.clamp(0, room), side), positions(x.clamp(0, room), side)
        self.index = (rows.unsqueeze(3) * extent + columns.unsqueeze(2)).flatten(2)  # [t, n, KK]
        self.pixels = clamped_index(
            positions(top.squeeze(1), extent), positions(left.squeeze(1), extent), target.height, target.width
        )  # [t, SS]
        self.features = target.rows.index_select(0, self.pixels.flatten()).view(*self.pixels.shape, -1)


def _index(target: Target, lattice: Lattice) -> Int[Tensor, "t n KK"]:
    y, x = positions(lattice.y, lattice.side), positions(lattice.x, lattice.side)
    return clamped_index(y, x, target.height, target.width)


def _gathered(queries: Float[Tensor, "m C"], target: Target, index: Int[Tensor, "m KK"]) -> Float[Tensor, "m KK"]:
    features = target.rows.index_select(0, index.flatten()).view(*index.shape, -1)
    return torch.bmm(features, queries.unsqueeze(2)).squeeze(2)


def _add_gathered(
    grad: Float[Tensor, "m KK"],
    queries: Float[Tensor, "m C"],
    target: Target,
    index: Int[Tensor, "m KK"],
    query_grad: Float[Tensor, "m C"] | None,
    target_grad: Float[Tensor, "hw C"] | None,
) -> None:
    if query_grad is not None:
        features = target.rows.index_select(0, index.flatten()).view(*index.shape, -1)
        query_grad.add_(torch.bmm(grad.unsqueeze(1), features).squeeze(1))
    if target_grad is not None:
        parts = grad.unsqueeze(2) * queries.unsqueeze(1)
        target_grad.index_add_(0, index.flatten(), parts.flatten(0, 1))


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.flatten(0, 1)
