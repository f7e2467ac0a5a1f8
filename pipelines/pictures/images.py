"""Pictures of what models see and say: images, flow wheels, feature maps, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from kinema.models.flow.geometry import flow_to_colour
from kinema.pipelines.pictures.projection import Projection

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise_images(images: Tensor) -> Tensor:
    """Images [..., 3, H, W] in 0..1 to ImageNet's zero mean and unit deviation."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def size_for_model(size: tuple[int, int], short_side: int, encoder: Any) -> tuple[int, int]:
    """(height, width) at which an encoder sees images of `size`: about this shorter side, multiples of its patch.

    Args: encoder, with `patch_size`, and `only_size` (height, width) if it takes no other (MAE).
    """
    if only_size := getattr(encoder, "only_size", None):
        return only_size
    patch, scale = encoder.patch_size, short_side / min(size)
    height, width = (max(patch, round(side * scale / patch) * patch) for side in size)
    return height, width


def image_picture(normalised: Tensor) -> np.ndarray:
    """A normalised image [3, H, W] as uint8 [H, W, 3]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (normalised.detach().float().cpu() * std + mean).clamp(0, 1) * 255
    return rearrange(pixels.round().byte(), "c h w -> h w c").numpy()


def flow_picture(flow_px: Tensor, max_px: float | None = None) -> np.ndarray:
    """A flow field [2, H, W] as a colour wheel picture, uint8 [H, W, 3]."""
    return flow_to_colour(flow_px.detach().float().cpu(), max_px).numpy()


def feature_pca(features: Tensor) -> np.ndarray:
    """The three main components of a feature map [C, H, W] as red, green and blue, uint8 [H, W, 3].

    Equal features give equal pictures; `Projection` shows several maps on one basis.
    """
    return Projection.of([features]).picture(features)


def panel(pictures: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Pictures of one size in rows of `columns`, on white."""
    height, width = pictures[0].shape[:2]
    cells = np.full((-(-len(pictures) // columns) * columns, height + gap, width + gap, 3), 255, np.uint8)
    cells[: len(pictures), :height, :width] = np.stack(pictures)
    canvas = rearrange(cells, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)
    return canvas[: len(canvas) - gap, : canvas.shape[1] - gap]


def write_png(path: str | Path, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as PNG; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    Image.fromarray(picture).save(temporary, format="PNG")
    os.replace(temporary, path)
