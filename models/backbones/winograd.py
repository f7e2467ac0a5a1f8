"""The weights' gradient of a 3x3 convolution with 16 products for four positions instead of 36.

Of 2 x 2 outputs' gradients and the 4 x 4 inputs that they saw, each is transformed along rows and along columns by
matrices of 0, 1 and -1; in between, the gradient is 16 products of matrices over all tiles. Maps have the channels last
and are worked on in strips of rows, so that a strip's tiles stay in the cache. Rounding errors are those of plain sums.

Source: Lavin and Gray, Fast algorithms for convolutional neural networks, arXiv:1509.09308: F(2 x 2, 3 x 3), of which
this is the transpose with respect to the weights.

Shape legend: B batch, C channels in, O channels out, R rows of tiles in a strip, T tiles in a row.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TILES_PER_STRIP = 112
_TO_WEIGHTS = torch.tensor([[1, 0.5, 0.5, 0], [0, 0.5, -0.5, 0], [0, 0.5, 0.5, 1]])


def weights_gradient(x: Float[Tensor, "B C H W"], gradient: Float[Tensor, "B O H W"]) -> Float[Tensor, "O C 3 3"]:
    """Of a convolution with a padding of 1 and a stride of 1, from its input and the gradient of its output."""
    total = x.new_zeros(16, gradient.shape[1], x.shape[1])
    for tiles, slopes in zip(_strips(x, 1, _of_tile), _strips(gradient, 0, _of_slope), strict=True):
        total.baddbmm_(slopes.transpose(1, 2), tiles)
    # Tiles come by column, then by row.
    by_tap = torch.kron(_TO_WEIGHTS, _TO_WEIGHTS).to(total) @ total.flatten(1)  # [3 3, O C]
    return by_tap.unflatten(0, (3, 3)).unflatten(2, total.shape[1:]).permute(2, 3, 1, 0)


def _of_tile(even: Tensor, odd: Tensor, dim: int, out: Tensor) -> None:
    """Of inputs a, b, c, d: a - c, b + c, c - b, b - d; a and c are neighbours in `even`, b and d in `odd`."""
    size = even.shape[dim] - 1
    a, c = even.narrow(dim, 0, size), even.narrow(dim, 1, size)
    b, d = odd.narrow(dim, 0, size), odd.narrow(dim, 1, size)
    torch.sub(a, c, out=out[0])
    torch.add(b, c, out=out[1])
    torch.sub(c, b, out=out[2])
    torch.sub(b, d, out=out[3])


def _of_slope(even: Tensor, odd: Tensor, dim: int, out: Tensor) -> None:
    """Of two outputs' gradients a, b: a, a + b, a - b, -b."""
    out[0].copy_(even)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
    torch.neg(odd, out=out[3])


def _strips(
    x: Float[Tensor, "B C H W"], border: int, transform: Callable[[Tensor, Tensor, int, Tensor], None]
) -> Iterator[Float[Tensor, "16 R*T C"]]:
    """The transformed map strip by strip, in memory that the next strip takes again.

    Args: border, positions before and behind two that the transform sees besides; they are 0 outside of the map.
    """
    channels, height, width = x.shape[1:]
    in_column, in_row = -(-height // 2), -(-width // 2)  # tiles
    rows = min(in_column, max(1, TILES_PER_STRIP * torch.get_num_threads() // in_row))
    lines = x.new_zeros(4, rows, 2 * (in_row + border), channels)
    tiles = x.new_empty(4, 4, rows, in_row, channels)
    for image in x.permute(0, 2, 3, 1):
        for first in range(0, in_column, rows):
            last = min(first + rows, in_column)
            top, bottom = 2 * first - border, 2 * last + border
            strip = image[max(0, top) : bottom]
            if top < 0 or bottom > height:
                strip = F.pad(strip, (0, 0, 0, 0, max(0, -top), max(0, bottom - height)))
            line, tile = lines[:, : last - first], tiles[:, :, : last - first]
            transform(strip[0::2], strip[1::2], 0, line[:, :, border : border + width])
            transform(line[:, :, 0::2], line[:, :, 1::2], 2, tile)
            yield tile.flatten(2, 3).flatten(0, 1)
