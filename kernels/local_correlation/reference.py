"""Local correlation in plain PyTorch: the definition, and the same numbers as banded matrix products.

Products of a pixel with a window are a band of a product of matrices: M neighbouring pixels of frame 1
against the M + 2r pixels that their windows cover in one row of frame 2. Every diagonal of the [M, M + 2r]
result is one displacement. With both maps laid out pixel by pixel, r empty columns behind every row and
r empty rows between images, all windows are views of that one copy: nothing is unfolded.

The operation is bilinear, so two functions that name each other as their gradients are enough, to any order:
`correlate` and `window_sum`, the sum over a window of features weighted per displacement.

Shapes: B batch, C channels, H W image, r radius, K = 2r + 1, P = K^2, N pixels with the empty ones, M tile.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK_TILES = 512
"""Tiles multiplied at once: enough to fill the cores, few enough that products stay in the cache."""


def local_correlation_plain(
    fmap1: Float[Tensor, "B C H W"], fmap2: Float[Tensor, "B C H W"], radius: int
) -> Float[Tensor, "B P H W"]:
    """Products of each pixel of fmap1 with the window around the same place in fmap2, divided by sqrt(C).

    out[b, (dy + r) K + dx + r, y, x] = sum over c of fmap1[b, c, y, x] fmap2[b, c, y + dy, x + dx] / sqrt(C),
    and 0 where (y + dy, x + dx) lies outside: dy is the outer window axis, dx the inner one, both from -r to r.

    Returns: [B, (2r+1)^2, H, W], accumulated in float32 and returned as that (float64 for float64 maps).
    Source: the cost volume of PWC-Net (Sun et al., arXiv:1709.02371, section 3), whose mean over channels is
        replaced by RAFT's division by sqrt(C) (Teed and Deng, arXiv:2003.12039), as in `correlation_lookup`:
        unit variance for independent features of unit variance, at any C.
    """
    H, W = fmap1.shape[-2:]
    window = 2 * radius + 1
    dtype = _accumulator(fmap1)
    query = fmap1.to(dtype) / math.sqrt(fmap1.shape[1])
    padded = F.pad(fmap2.to(dtype), (radius, radius, radius, radius))
    shifts = [padded[..., dy : dy + H, dx : dx + W] for dy in range(window) for dx in range(window)]
    return torch.stack([(query * shifted).sum(1) for shifted in shifts], 1)


def local_correlation_reference(
    fmap1: Float[Tensor, "B C H W"], fmap2: Float[Tensor, "B C H W"], radius: int
) -> Float[Tensor, "B P H W"]:
    """`local_correlation_plain`, faster, and with gradients that hold nothing but the two maps.

    While torch.compile or torch.export trace, the plain form is given to them: they fuse it, and its shapes may
    be symbolic.
    """
    if torch.compiler.is_compiling():
        return local_correlation_plain(fmap1, fmap2, radius)
    return _Correlate.apply(fmap1, fmap2, radius)


def _accumulator(fmap: Tensor) -> torch.dtype:
    return torch.float64 if fmap.dtype == torch.float64 else torch.float32


class _Correlate(torch.autograd.Function):
    @staticmethod
    def forward(fmap1: Tensor, fmap2: Tensor, radius: int) -> Tensor:
        return correlate(fmap1, fmap2, radius)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        fmap1, fmap2, ctx.radius = inputs
        ctx.save_for_backward(fmap1, fmap2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        fmap1, fmap2 = ctx.saved_tensors
        grad1 = _WindowSum.apply(grad, fmap2, ctx.radius, False) if ctx.needs_input_grad[0] else None
        grad2 = _WindowSum.apply(grad, fmap1, ctx.radius, True) if ctx.needs_input_grad[1] else None
        return grad1, grad2, None


class _WindowSum(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, fmap: Tensor, radius: int, mirrored: bool) -> Tensor:
        return window_sum(weight, fmap, radius, mirrored)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
        weight, fmap, ctx.radius, ctx.mirrored = inputs
        ctx.save_for_backward(weight, fmap)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, fmap = ctx.saved_tensors
        grad_weight = grad_fmap = None
        if ctx.needs_input_grad[0]:
            pair = (fmap, grad) if ctx.mirrored else (grad, fmap)
            grad_weight = _Correlate.apply(*pair, ctx.radius)
        if ctx.needs_input_grad[1]:
            grad_fmap = _WindowSum.apply(weight, grad, ctx.radius, not ctx.mirrored)
        return grad_weight, grad_fmap, None, None


class _Layout:
    """Where pixels lie when all images are one row of tiles, each image row with r empty pixels behind it."""

    def __init__(self, shape: torch.Size, radius: int):
        self.batch, self.height, self.width = shape[0], *shape[-2:]
        self.radius, self.window = radius, 2 * radius + 1
        # As wide as the window's overhang: wider tiles compute more that is thrown away, narrower ones multiply badly.
        self.tile = max(8, 2 * radius)
        self.reach = self.tile + 2 * radius
        self.row = self.width + radius
        self.pixels = self.batch * (self.height + radius) * self.row
        self.num_tiles = -(-self.pixels // self.tile)
        # Windows of the first and last pixels reach this far outside.
        self.margin = radius * self.row + radius

    def flatten(self, maps: Tensor, dtype: torch.dtype, margin: int, scale: float = 1.0) -> Tensor:
        """[B, X, H, W] -> [margin + num_tiles M + margin, X], 0 where there is no pixel."""
        flat = torch.zeros(2 * margin + self.num_tiles * self.tile, maps.shape[1], dtype=dtype, device=maps.device)
        pixels = self._pixels(flat[margin : margin + self.pixels])
        pixels.copy_(maps.permute(0, 2, 3, 1))
        return flat if scale == 1.0 else flat.mul_(scale)

    def unflatten(self, flat: Tensor) -> Tensor:
        """[num_tiles M, X] -> [B, X, H, W], a view."""
        return self._pixels(flat[: self.pixels]).permute(0, 3, 1, 2)

    def _pixels(self, flat: Tensor) -> Tensor:
        grid = flat.view(self.batch, self.height + self.radius, self.row, flat.shape[1])
        return grid[:, : self.height, : self.width]

    def reaches(self, flat: Tensor, start: int, count: int, row: int) -> Tensor:
        """Pixels that the windows of `count` tiles cover in their row `row`: a view [count, M + 2r, C] of a map."""
        C = flat.shape[1]
        return flat.as_strided((count, self.reach, C), (self.tile * C, C, 1), (start * self.tile + row * self.row) * C)

    def band(self, products: Tensor) -> Tensor:
        """The diagonals of [count, M, M + 2r] that are displacements: a view [count, M, K]."""
        size, stride = (products.shape[0], self.tile, self.window), (self.tile * self.reach, self.reach + 1, 1)
        return products.as_strided(size, stride)

    def chunks(self) -> list[tuple[int, int]]:
        """(first, number) of the tiles to work on together."""
        return [(start, min(CHUNK_TILES, self.num_tiles - start)) for start in range(0, self.num_tiles, CHUNK_TILES)]


def correlate(
    fmap1: Float[Tensor, "B C H W"], fmap2: Float[Tensor, "B C H W"], radius: int
) -> Float[Tensor, "B P H W"]:
    """Values of `local_correlation_plain`, in the memory format of fmap1; no gradient is recorded."""
    layout, dtype = _Layout(fmap1.shape, radius), _accumulator(fmap1)
    K, M, C = layout.window, layout.tile, fmap1.shape[1]
    query = layout.flatten(fmap1, dtype, margin=0, scale=1.0 / math.sqrt(C)).view(-1, M, C)
    target = layout.flatten(fmap2, dtype, layout.margin)
    windows = query.new_empty(layout.num_tiles, M, K, K)
    for start, count in layout.chunks():
        products = query.new_empty(count, M, layout.reach)
        for row in range(K):
            torch.bmm(query[start : start + count], layout.reaches(target, start, count, row).mT, out=products)
            windows[start : start + count, :, row].copy_(layout.band(products))
    return layout.unflatten(windows.view(-1, K * K)).contiguous(memory_format=memory_format_of(fmap1))


def window_sum(
    weight: Float[Tensor, "B P H W"], fmap: Float[Tensor, "B C H W"], radius: int, mirrored: bool
) -> Float[Tensor, "B C H W"]:
    """Features summed over each pixel's window with a weight per displacement, divided by sqrt(C).

    out[b, :, p] = sum over d of weight[b, d, p] fmap[b, :, p + d] / sqrt(C), the gradient of `correlate` towards
    its first map; `mirrored`: sum over d of weight[b, d, p - d] fmap[b, :, p - d] / sqrt(C), towards its second.

    Returns: dtype and memory format of fmap; accumulated in float32 (float64 for float64). No gradient is recorded.
    """
    layout, dtype = _Layout(fmap.shape, radius), _accumulator(fmap)
    K, M, C = layout.window, layout.tile, fmap.shape[1]
    features = layout.flatten(fmap, dtype, layout.margin, scale=1.0 / math.sqrt(C))
    weights = layout.flatten(weight, dtype, layout.margin)
    out = features.new_empty(layout.num_tiles, M, C)
    for start, count in layout.chunks():
        # 0 off the band, which is all that is ever written below.
        products = features.new_zeros(count, M, layout.reach)
        for row in range(K):
            layout.band(products).copy_(_weights_of(layout, weights, start, count, row, mirrored))
            reached = layout.reaches(features, start, count, row)
            if row == 0:
                torch.bmm(products, reached, out=out[start : start + count])
            else:
                out[start : start + count].baddbmm_(products, reached)
    summed = layout.unflatten(out.view(-1, C)).to(fmap.dtype)
    return summed.contiguous(memory_format=memory_format_of(fmap))


def _weights_of(layout: _Layout, weights: Tensor, start: int, count: int, row: int, mirrored: bool) -> Tensor:
    """Weights of one window row of some tiles: a view [count, M, K] of the margined weights [pixels, K K].

    Mirrored, the weight comes from the pixel p + d that is reached, for the opposite displacement -d: one step in
    d is one pixel forwards and one channel backwards.
    """
    K, P, r = layout.window, layout.window**2, layout.radius
    first = start * layout.tile
    if not mirrored:
        return weights.as_strided(
            (count, layout.tile, K), (layout.tile * P, P, 1), (first + layout.margin) * P + row * K
        )
    offset = (first + row * layout.row) * P + (2 * r - row) * K + 2 * r
    return weights.as_strided((count, layout.tile, K), (layout.tile * P, P, P - 1), offset)


def memory_format_of(fmap: Tensor) -> torch.memory_format:
    """Channels-last if the map is, else contiguous."""
    last = fmap.is_contiguous(memory_format=torch.channels_last) and not fmap.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
