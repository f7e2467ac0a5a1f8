"""How WAFT was evaluated where images differ in size from those it was trained on: padded to that size, or in tiles.

Source: the published evaluation of Wang and Deng, arXiv:2506.21526. `WAFT(scale=)` is its third setting.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kinema.models.flow.sea_raft.network import Prediction
from kinema.models.flow.waft.network import WAFT


def predict_at_train_size(
    model: WAFT,
    image1: Float[Tensor, "B 3 H W"],
    image2: Float[Tensor, "B 3 H W"],
    train_size: tuple[int, int],
    tile: bool = False,
    iters: int | None = None,
) -> Prediction:
    """Flow and mixture of images that are padded with black to `train_size` (height, width) where they are smaller.

    Args: tile, cut larger images into overlapping tiles of that size, and blend what the network says of each.
    """
    height, width = image1.shape[-2:]
    rows, columns = (max(0, wanted - side) for wanted, side in zip(train_size, (height, width), strict=True))
    left, top = columns // 2, rows // 2
    first, second = (F.pad(image, (left, columns - left, top, rows - top)) for image in (image1, image2))
    predict = _predict_tiles if tile else _predict_whole
    maps = predict(model, first, second, train_size, iters)[..., top : top + height, left : left + width]
    flow, info = maps.split([2, 4], dim=1)
    return Prediction(flow.contiguous(), info.contiguous())


def _predict_whole(model: WAFT, first: Tensor, second: Tensor, _: tuple[int, int], iters: int | None) -> Tensor:
    return torch.cat(model.with_info(first, second, iters), dim=1)


def _predict_tiles(model: WAFT, first: Tensor, second: Tensor, size: tuple[int, int], iters: int | None) -> Tensor:
    """Tiles of `size`, each weighted by a Gaussian of one tile's side around its middle."""
    y, x = (torch.arange(side, device=first.device) / side - 0.5 for side in size)
    weight = torch.exp(-0.5 * (y[:, None] ** 2 + x**2))
    total = first.new_zeros(first.shape[0], 6, *first.shape[-2:], dtype=torch.float32)
    weights = total.new_zeros(first.shape[-2:])
    for top in _starts(first.shape[-2], size[0]):
        for left in _starts(first.shape[-1], size[1]):
            window = (..., slice(top, top + size[0]), slice(left, left + size[1]))
            maps = torch.cat(model.with_info(first[window], second[window], iters), dim=1)
            total[window] += weight * maps
            weights[window] += weight
    return total / weights


def _starts(length: int, side: int) -> list[int]:
    """Where tiles begin: three quarters of a tile apart, the last ones moved back inside; each place once."""
    step = max(1, side // 4 * 3)
    return sorted({min(start, length - side) for start in range(0, length, step)})
