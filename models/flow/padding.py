"""Padding of images to a size that a network accepts, and cropping of its output back.

Source: the published RAFT padder: replicated borders, sides to multiples of 8. Its "sintel" mode splits
the padding over both sides (the odd pixel right and below), its "kitti" mode puts all rows below.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Pixels added on each side of an image."""

    left: int
    right: int
    top: int
    bottom: int

    def pad(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C Hp Wp"]:
        """Adds the margins by repeating the border pixels."""
        if self == Padding(0, 0, 0, 0):
            return images
        return F.pad(images, (self.left, self.right, self.top, self.bottom), mode="replicate")

    def unpad(self, maps: Float[Tensor, "B C Hp Wp"]) -> Float[Tensor, "B C H W"]:
        """Cuts the margins off a map of the padded size."""
        height, width = maps.shape[-2:]
        return maps[..., self.top : height - self.bottom, self.left : width - self.right]


def padding_for(height: int, width: int, multiple: int = 8, minimum: int = 128, mode: str = "sintel") -> Padding:
    """Margins that bring both sides to a multiple of `multiple` and to at least `minimum` pixels.

    The step to the minimum is made of whole multiples, so a map at 1/multiple of the rounded size is
    padded by whole cells (`grid_padding`).

    Raises: ValueError for an unknown mode, an empty image, or a minimum that is no multiple.
    """
    if mode not in ("sintel", "kitti"):
        raise ValueError(f"padding mode {mode!r} is not one of 'sintel', 'kitti'")
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} has no pixels")
    if minimum % multiple:
        raise ValueError(f"minimum={minimum} is not a multiple of {multiple}")
    cells = grid_padding(height, width, multiple, minimum)
    missing_rows, missing_columns = -height % multiple, -width % multiple
    top = 0 if mode == "kitti" else missing_rows // 2
    left = missing_columns // 2
    return Padding(
        left=left + multiple * cells.left,
        right=missing_columns - left + multiple * cells.right,
        top=top + multiple * cells.top,
        bottom=missing_rows - top + multiple * cells.bottom,
    )


def grid_padding(height: int, width: int, multiple: int = 8, minimum: int = 128) -> Padding:
    """The part of `padding_for` that reaches the minimum, in cells of `multiple` pixels."""
    rows = max(0, minimum // multiple - -(-height // multiple))
    columns = max(0, minimum // multiple - -(-width // multiple))
    return Padding(columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
