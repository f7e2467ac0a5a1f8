"""Windowed bilinear lookup of correlations formed on demand, in plain PyTorch: the specification.

The products are formed for the windows alone, from average-pooled feature maps: pooling commutes with the
dot product, so the result is that of the all-pairs volume up to rounding.

Shapes: B batch, C channels, H W query map, N = H W query pixels, t tiles of n queries,
K = 2 radius + 2 lattice points per axis, L levels, P = L (2 radius + 1)^2.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.correlation_lookup.products import (
    TILE,
    Lattice,
    Target,
    add_gradients,
    lattice_products,
)
from kinema.kernels.correlation_lookup.window import (
    Axis,
    WindowOrder,
    accumulation_dtype,
    blend,
    check_lookup,
    mark_not_finite,
    pixel_rows,
    unblend,
    window_axis,
)
from kinema.kernels.dispatch import without_autocast

TILES_AT_ONCE = 8
"""Tiles that share the cost of starting an operation; their boxes should stay in the cache."""
GATHER_BYTES = 64 * 2**20
"""Features that are gathered at once where tiles have no boxes."""


def correlation_lookup_reference(
    fmap1: Float[Tensor, "B C H W"],
    fmap2_pyramid: list[Float[Tensor, "_ _ _ _"]],
    coords: Float[Tensor, "_ 2 _ _"],
    radius: int,
    window_order: WindowOrder = "x_major",
    boxed: bool | None = None,
) -> Float[Tensor, "B P H W"]:
    """Correlation of each pixel with a window around its target, at every pyramid level.

    Args:
        fmap1: query features.
        fmap2_pyramid: target features, level k average-pooled k times (`feature_pyramid`).
        coords: (x, y) in pixels of fmap2_pyramid[0], centres at integers; level k is read at
            coords / 2^k.
        radius: the window is 2 radius + 1 wide at each level.
        window_order: which axis of the window is the outer one.
        boxed: multiply tiles of queries with boxes of the target (`products`), the fast way where neighbours
            move alike; by default, except under a compiler, which needs shapes independent of the data.

    Returns: [B, L (2 radius + 1)^2, H, W], float32 (float64 for float64 maps), laid out channels-last:
        dot products divided by sqrt(C), bilinear between pixels, 0 outside the target map. Channels run over
        levels, then the outer axis, then the inner one; nan where coords are not finite.
    Gradients: to both maps, once; coords get none, as the published network detaches them. The backward
        pass forms what it needs again, so that memory is linear in H W in both directions.
    Raises: ValueError for arguments that do not fit together.
    Source: Teed and Deng, arXiv:2003.12039, section 3.2. Deviations: none.

    Maps that are channels-last in memory are read in place; others are copied.
    """
    check_lookup(fmap1, fmap2_pyramid, coords, radius, window_order)
    if boxed is None:
        boxed = not torch.compiler.is_compiling()
    # Autocast would round the products to 16 bits.
    with without_autocast(fmap1):
        return _Lookup.apply(coords, radius, window_order, boxed, fmap1, *fmap2_pyramid)


class _Group(NamedTuple):
    """Query pixels of one image that are handled together."""

    image: int
    pixels: Tensor
    """[t, n], pixel of the query map; at the margin of a map tiles repeat pixels."""
    kept: Tensor | None
    """Which of the t n queries count; None for all."""

    def rows(self, maps: Tensor) -> Tensor:
        """[t, n, D] of [B, N, D]."""
        return maps[self.image].index_select(0, self.pixels.flatten()).view(*self.pixels.shape, -1)

    def write(self, maps: Tensor, values: Tensor) -> None:
        """Writes [t, n, D] into [B, N, D], each pixel once."""
        index, values = self.pixels.flatten(), values.flatten(0, 1)
        if self.kept is not None:
            index, values = index[self.kept], values[self.kept]
        maps[self.image].index_copy_(0, index, values)


class _Lookup(torch.autograd.Function):
    """The lookup, group by group; the backward pass forms each group's boxes again."""

    @staticmethod
    def forward(ctx: Any, coords, radius, window_order, boxed, fmap1, *pyramid):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(coords, fmap1, *pyramid)
        ctx.options = radius, window_order, boxed
        B, C, H, W = fmap1.shape
        dtype = accumulation_dtype(fmap1)
        queries, points = pixel_rows(fmap1, dtype), pixel_rows(coords, dtype)
        maps = [pixel_rows(fmap2, dtype) for fmap2 in pyramid]
        out = queries.new_empty(B, H * W, len(pyramid) * (2 * radius + 1) ** 2)
        for group in _groups(fmap1, radius, boxed):
            features, centres = group.rows(queries), group.rows(points)
            windows = []
            for level, rows in enumerate(maps):
                target = _target(rows[group.image], pyramid[level], level, boxed)
                x, y = _axes(centres, target, radius, C)
                products = lattice_products(features, target, _lattice(x, y, features, radius))
                windows.append(blend(_square(products, radius), y, x, window_order))
            group.write(out, torch.cat(windows, dim=1).view(*group.pixels.shape, -1))
        return mark_not_finite(out, points).view(B, H, W, -1).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        coords, fmap1, *pyramid = ctx.saved_tensors
        radius, window_order, boxed = ctx.options
        dtype = accumulation_dtype(fmap1)
        queries, points, grads = (pixel_rows(t, dtype) for t in (fmap1, coords, grad))
        grads = grads.masked_fill(~points.isfinite().all(dim=2, keepdim=True), 0.0)
        maps = [pixel_rows(fmap2, dtype) for fmap2 in pyramid]
        query_grad = torch.zeros_like(queries) if ctx.needs_input_grad[4] else None
        needed = ctx.needs_input_grad[5:]
        map_grads = [torch.zeros_like(rows) if need else None for rows, need in zip(maps, needed, strict=True)]
        for group in _groups(fmap1, radius, boxed):
            features, centres, parts = group.rows(queries), group.rows(points), group.rows(grads).flatten(0, 1)
            if group.kept is not None:
                parts = torch.zeros_like(parts).index_copy_(0, group.kept, parts[group.kept])
            part_of_query = None if query_grad is None else torch.zeros_like(features)
            for level, part in enumerate(parts.chunk(len(maps), dim=1)):
                target = _target(maps[level][group.image], pyramid[level], level, boxed)
                total = map_grads[level]
                x, y = _axes(centres, target, radius, fmap1.shape[1])
                products_grad = unblend(part, y, x, window_order).view(*group.pixels.shape, -1)
                lattice = _lattice(x, y, features, radius)
                into = None if total is None else total[group.image]
                add_gradients(products_grad, features, target, lattice, part_of_query, into)
            if query_grad is not None and part_of_query is not None:
                group.write(query_grad, part_of_query)
        fmap_grads = [
            _as_map(rows, fmap) for rows, fmap in zip((query_grad, *map_grads), (fmap1, *pyramid), strict=True)
        ]
        return (None, None, None, None, *fmap_grads)


def _groups(fmap1: Tensor, radius: int, boxed: bool) -> Iterator[_Group]:
    """Tiles of TILE x TILE queries, a few at a time; without boxes, runs of queries."""
    B, C, H, W = fmap1.shape
    device = fmap1.device
    if not boxed:
        run = max(1, GATHER_BYTES // (4 * C * (2 * radius + 2) ** 2))
        runs = [torch.arange(start, min(start + run, H * W), device=device)[None] for start in range(0, H * W, run)]
        for b in range(B):
            yield from (_Group(b, index, None) for index in runs)
        return
    down, across = -(-H // TILE), -(-W // TILE)
    steps = torch.arange(TILE, device=device)
    y = (torch.arange(down, device=device)[:, None] * TILE + steps).view(down, 1, TILE, 1)
    x = (torch.arange(across, device=device)[:, None] * TILE + steps).view(1, across, 1, TILE)
    index = (y.clamp(max=H - 1) * W + x.clamp(max=W - 1)).view(-1, TILE**2)
    real = ((y < H) & (x < W)).view(-1, TILE**2)
    parts = []
    for tiles, flags in zip(index.split(TILES_AT_ONCE), real.split(TILES_AT_ONCE), strict=True):
        parts.append((tiles, None if bool(flags.all()) else flags.flatten().nonzero().squeeze(1)))
    for b in range(B):
        yield from (_Group(b, tiles, kept) for tiles, kept in parts)


def _target(rows: Tensor, fmap2: Tensor, level: int, boxed: bool) -> Target:
    return Target(rows, fmap2.shape[2], fmap2.shape[3], level, boxed)


def _axes(centres: Tensor, target: Target, radius: int, channels: int) -> tuple[Axis, Axis]:
    """Axes of the windows (x, y); the weights of x carry the division by sqrt(C)."""
    points = centres.flatten(0, 1) / 2**target.level
    x, y = window_axis(points[:, 0], target.width, radius), window_axis(points[:, 1], target.height, radius)
    scale = 1.0 / math.sqrt(channels)
    return Axis(x.first, x.left * scale, x.right * scale), y


def _lattice(x: Axis, y: Axis, features: Tensor, radius: int) -> Lattice:
    shape = features.shape[:2]
    return Lattice(y.first.view(shape), x.first.view(shape), 2 * radius + 2)


def _square(products: Tensor, radius: int) -> Tensor:
    return products.view(-1, 2 * radius + 2, 2 * radius + 2)


def _as_map(rows: Tensor | None, fmap: Tensor) -> Tensor | None:
    """Gradient rows [B, N, C] in the shape and type of the map."""
    if rows is None:
        return None
    B, C, H, W = fmap.shape
    return rows.view(B, H, W, C).permute(0, 3, 1, 2).to(fmap.dtype)
