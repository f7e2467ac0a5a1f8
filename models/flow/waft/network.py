"""WAFT: warps features by the current flow and lets a small vision transformer correct it; no cost volume.

Images are float in 0..1, any size; flow is (x, y) in pixels of those images. Inside, maps live at 1/2 of the padded
image. Memory grows with the image's area, not with its square.

For a video, `encode` once per frame and `flow_from_features` per pair; the numbers equal those of a direct call:
all that looks at one frame alone, the depth network among it, is run once per frame.

Source: Wang and Deng, "WAFT: Warping-Alone Field Transforms for Optical Flow", arXiv:2506.21526; the first version,
whose released networks have a frozen Depth Anything V2 inside. Deviation: with `scale` other than 0, flow has the
size of the given images even where their sides do not divide.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinema.kernels.convex_upsampling import convex_upsample
from kinema.models.flow.geometry import filled, warp
from kinema.models.flow.padding import Padding
from kinema.models.flow.pair_network import check_image_pair, check_images
from kinema.models.flow.raft.family import check_feature_pair
from kinema.models.flow.sea_raft.loss import expected_error_px
from kinema.models.flow.sea_raft.network import Prediction
from kinema.models.flow.waft.layers import (
    DEPTH_PATCH,
    REFINE_PATCH,
    SIZES,
    DepthFeatures,
    FeatureNetwork,
    RefinementNetwork,
)
from kinema.models.weights import download, load_weights, published_file, read_state_dict

MULTIPLE = DEPTH_PATCH * REFINE_PATCH
"""Sides of the padded image: whole patches of the depth network, and of the refinement network at half the size."""
MARGIN_PX = 8
"""Fewest pixels of padding of a side, so that flow near the border is seen in full."""
MAX_MOTION_PX = 40000.0
"""Longer true motion is left out of the loss; RAFT and SEA-RAFT draw that line at 400 pixels."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class WaftFeatures:
    """What WAFT needs to know of frames; one row per frame. Indexing by rows cuts pairs out of one batch."""

    fmap: Float[Tensor, "B C h w"]
    """Features at half of the padded size."""
    size: tuple[int, int]
    """Height and width of the images as given."""
    padding: Padding
    """Margins that were added to the scaled images."""

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "WaftFeatures":
        return replace(self, fmap=self.fmap[rows])

    def __len__(self) -> int:
        return self.fmap.shape[0]

    @staticmethod
    def stack(frames: Sequence["WaftFeatures"]) -> "WaftFeatures":
        """The rows of several frames of one size as one batch."""
        return replace(frames[0], fmap=torch.cat([frame.fmap for frame in frames]))


class _Step(NamedTuple):
    """State after a refinement, at half of the padded image."""

    flow: Float[Tensor, "B 2 h w"]
    info: Float[Tensor, "B 4 h w"]
    hidden: Float[Tensor, "B C h w"]


class WAFT(nn.Module):
    """`model(image1, image2)` gives the flow from image1 to image2; see `forward`.

    Args:
        depth: size of the frozen depth network, a key of `layers.SIZES`.
        refine: size of the refinement transformer, likewise.
        iters: refinements when a call does not say.
        scale: the network sees the images at 2^scale times their size; the published configuration for Spring at
            540 rows uses -1, all others 0.
    """

    def __init__(self, depth: str = "vits", refine: str = "vits", iters: int = 5, scale: int = 0) -> None:
        super().__init__()
        for name, value in (("depth", depth), ("refine", refine)):
            if value not in SIZES:
                raise ValueError(f"{name}={value!r} is no size of WAFT's; use one of {', '.join(SIZES)}")
        if scale != int(scale) or not -4 <= scale <= 2:
            raise ValueError(f"scale={scale} is not a whole number in -4..2: images are resized by 2^scale")
        self.iters, self.scale = iters, int(scale)
        depth_channels, channels = SIZES[depth].decoder // 2, SIZES[refine].decoder
        self.da_feature = DepthFeatures(SIZES[depth])
        self.refine_net = RefinementNetwork(SIZES[refine])
        self.fnet = FeatureNetwork(depth_channels + 3)
        self.fmap_conv = nn.Conv2d(FeatureNetwork.channels + depth_channels, channels, 1)
        self.hidden_conv = nn.Conv2d(2 * channels, channels, 1)
        self.warp_linear = nn.Conv2d(3 * channels + 2, channels, 1)
        self.refine_transform = nn.Conv2d(channels // 2 + channels, channels, 1)
        self.upsample_weight = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * channels, 4 * 9, 1)
        )
        self.flow_head = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * channels, 6, 1)
        )

    def forward(
        self, image1: Float[Tensor, "_ _ _ _"], image2: Float[Tensor, "_ _ _ _"], iters: int | None = None
    ) -> Float[Tensor, "B 2 H W"]:
        """Flow from image1 to image2 after `iters` refinements (default: `self.iters`).

        Args: image1, image2: [B, 3, H, W] float in 0..1.
        Returns: [B, 2, H, W] float32, (x, y) in pixels.
        Raises: ValueError for images of the wrong shape, or iters < 1.
        """
        return self.with_info(image1, image2, iters).flow

    def with_info(
        self, image1: Float[Tensor, "_ _ _ _"], image2: Float[Tensor, "_ _ _ _"], iters: int | None = None
    ) -> Prediction:
        """As `forward`, with the mixture parameters beside the flow."""
        return self.prediction_from_features(*self._encode_pair(image1, image2), iters)

    def predictions(
        self, image1: Float[Tensor, "_ _ _ _"], image2: Float[Tensor, "_ _ _ _"], iters: int | None = None
    ) -> list[Prediction]:
        """Flow and mixture after every refinement, for the sequence loss."""
        features1, features2 = self._encode_pair(image1, image2)
        return [self._full_size(step, features1) for step in self._steps(features1, features2, iters)]

    def uncertainty(self, info: Float[Tensor, "B 4 H W"]) -> Float[Tensor, "B 1 H W"]:
        """The end-point error that the mixture expects, in pixels of the given images (not the scaled ones)."""
        return expected_error_px(info) * 2.0**-self.scale

    def encode(self, images: Float[Tensor, "_ _ _ _"]) -> WaftFeatures:
        """Features of frames [B, 3, H, W] in 0..1, for `flow_from_features`."""
        check_images(images, "WAFT")
        images = images.float()
        mean, std = (filled(images, *values).view(3, 1, 1) for values in (_MEAN, _STD))
        scaled = (self._scaled(images) - mean) / std
        padding = padding_to_patches(*scaled.shape[-2:])
        # The margins are of the mean colour, unlike RAFT's, which repeat the border.
        margins = (padding.left, padding.right, padding.top, padding.bottom)
        x = F.pad(scaled, margins).contiguous(memory_format=torch.channels_last)
        depth = self.da_feature(x)
        features = self.fnet(torch.cat([depth, x], dim=1))
        depth = F.interpolate(depth, scale_factor=0.5, mode="bilinear", align_corners=True)
        fmap = self.fmap_conv(torch.cat([features, depth], dim=1)).float()
        return WaftFeatures(fmap, (images.shape[-2], images.shape[-1]), padding)

    def flow_from_features(
        self, features1: WaftFeatures, features2: WaftFeatures, iters: int | None = None
    ) -> Float[Tensor, "B 2 H W"]:
        """Flow from the frames of features1 to those of features2, row by row; equals `forward`.

        Raises: ValueError if they differ in number or image size.
        """
        return self.prediction_from_features(features1, features2, iters).flow

    def prediction_from_features(
        self, features1: WaftFeatures, features2: WaftFeatures, iters: int | None = None
    ) -> Prediction:
        """As `flow_from_features`, with the mixture parameters beside the flow; equals `with_info`."""
        last = deque(self._steps(features1, features2, iters), maxlen=1)[0]
        return self._full_size(last, features1)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters of the checkpoints that no output depends on, outside the frozen depth network."""
        scratch = self.refine_net.dpt_head.scratch
        return [*scratch.output_conv2.parameters(), *scratch.refinenet4.resConfUnit1.parameters()]

    def _encode_pair(self, image1: Tensor, image2: Tensor) -> tuple[WaftFeatures, WaftFeatures]:
        check_image_pair(image1, image2, "WAFT")
        # One after the other: in training each has batch statistics of its own, as published.
        return self.encode(image1), self.encode(image2)

    def _steps(self, features1: WaftFeatures, features2: WaftFeatures, iters: int | None) -> Iterator[_Step]:
        """The state after each refinement."""
        iters = self.iters if iters is None else iters
        if iters < 1:
            raise ValueError(f"iters={iters} must be at least 1")
        check_feature_pair(features1, features2)
        fmap1, fmap2 = features1.fmap, features2.fmap
        hidden = self.hidden_conv(torch.cat([fmap1, fmap2], dim=1))
        flow = fmap1.new_zeros(len(features1), 2, *fmap1.shape[-2:])
        for _ in range(iters):
            flow = flow.detach()  # as published: no gradient through the positions that features are read at
            warped, _ = warp(fmap2, flow, outside="zeros")
            inputs = torch.cat([fmap1, warped, hidden, flow], dim=1)
            refined = self.refine_net(self.warp_linear(inputs))
            hidden = self.refine_transform(torch.cat([refined, hidden], dim=1))
            increment, info = self.flow_head(hidden).float().split([2, 4], dim=1)
            flow = flow + increment
            yield _Step(flow, info, hidden)

    def _full_size(self, step: _Step, features: WaftFeatures) -> Prediction:
        logits = 0.25 * self.upsample_weight(step.hidden)
        maps = convex_upsample(torch.cat([2.0 * step.flow, step.info], dim=1), logits)
        maps = features.padding.unpad(maps)
        if self.scale:
            maps = F.interpolate(maps, size=features.size, mode="bilinear", align_corners=True)
        flow, info = maps.split([2, 4], dim=1)
        return Prediction((flow * 2.0**-self.scale).contiguous(), info.contiguous())

    def _scaled(self, images: Tensor) -> Tensor:
        if not self.scale:
            return images
        size = [max(1, int(side * 2.0**self.scale)) for side in images.shape[-2:]]
        return F.interpolate(images, size=size, mode="bilinear", align_corners=True)


def padding_to_patches(height: int, width: int) -> Padding:
    """Margins of WAFT: more than `MARGIN_PX` in all on each axis, the smaller half left and above."""
    rows, columns = (((side + MARGIN_PX) // MULTIPLE + 1) * MULTIPLE - side for side in (height, width))
    return Padding(columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)


def waft(
    name: str = "vits", pretrained: bool = False, weights: str | Path | None = None, iters: int = 5, scale: int = 0
) -> WAFT:
    """WAFT in eval mode.

    Args:
        name: size of the refinement transformer; a checkpoint's shapes go before it, and choose the depth network too.
        pretrained: take the published weights (name "vits").
        weights: file or URL of a checkpoint to load instead.
        iters, scale: as of `WAFT`; a checkpoint does not hold them.
    Raises: ValueError for an unknown name or weights that do not fit.
    """
    if name not in SIZES:
        raise ValueError(f"name={name!r} is no size of WAFT's; use one of {', '.join(SIZES)}")
    if weights is None and pretrained:
        weights = published_file("waft" if name == "vits" else f"waft {name}")
    depth, refine = ("vits" if name == "vitt" else name), name
    if weights is not None:
        weights = download(str(weights)) if "://" in str(weights) else weights
        depth, refine = configuration_of(read_state_dict(weights), depth, refine)
    return load_weights(WAFT(depth, refine, iters, scale), weights, "waft").eval()


def configuration_of(state: dict[str, Tensor], depth: str = "vits", refine: str = "vits") -> tuple[str, str]:
    """Sizes of depth and refinement network for which a state dict was made; where it does not tell, the given."""
    widths = {size.width: name for name, size in SIZES.items()}

    def size_of(key: str, otherwise: str) -> str:
        tensor = state.get(key)
        return otherwise if tensor is None else widths.get(tensor.shape[-1], otherwise)

    return (
        size_of("da_feature.depth_anything.pretrained.cls_token", depth),
        size_of("refine_net.pos_embed", refine),
    )
