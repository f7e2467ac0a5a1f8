"""The call that every network from two images to flow has in common."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class PairNetwork(nn.Module):
    """`model(image1, image2, iters=None, flow_init=None)`, from `encode` and `flow_from_features` of a subclass."""

    title = ""
    """Name in messages."""

    def forward(
        self,
        image1: Float[Tensor, "_ _ _ _"],
        image2: Float[Tensor, "_ _ _ _"],
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Float[Tensor, "B 2 H W"]:
        """Flow from image1 to image2.

        Args:
            image1, image2: [B, 3, H, W] float in 0..1, of any size.
            iters: refinements; the network says what None and 0 mean.
            flow_init: a first guess at 1/8 size in 1/8 pixels, for networks that start from one.

        Returns: [B, 2, H, W] float32, (x, y) in pixels.
        Raises: ValueError for images or flow_init of the wrong shape, or too few iters.
        """
        return self.flow_from_features(*self.encode_pair(image1, image2), iters, flow_init)

    def encode_pair(self, image1: Tensor, image2: Tensor) -> tuple[Any, Any]:
        """Features of both images, for `flow_from_features`. Raises: ValueError for images of the wrong shape."""
        check_image_pair(image1, image2, self.title)
        return self.encode(image1), self.encode(image2)

    def encode(self, images: Float[Tensor, "_ _ _ _"]) -> Any:
        """Features of frames [B, 3, H, W] in 0..1."""
        raise NotImplementedError

    def flow_from_features(
        self, features1: Any, features2: Any, iters: int | None = None, flow_init: Tensor | None = None
    ) -> Float[Tensor, "B 2 H W"]:
        """Flow from the frames of features1 to those of features2, row by row; equals `forward`."""
        raise NotImplementedError


def check_images(images: Tensor, network: str) -> None:
    """Raises: ValueError unless images are float [B, 3, H, W]."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {list(images.shape)}; {network} takes [B, 3, H, W] with values in 0..1")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; {network} takes floats in 0..1: divide bytes by 255")


def check_image_pair(image1: Tensor, image2: Tensor, network: str) -> None:
    """Raises: ValueError unless both are float [B, 3, H, W] of one shape."""
    check_images(image1, network)
    if image1.shape != image2.shape:
        raise ValueError(f"image1 is {list(image1.shape)} and image2 is {list(image2.shape)}: shapes must agree")
    check_images(image2, network)
