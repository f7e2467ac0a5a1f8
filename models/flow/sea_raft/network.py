"""SEA-RAFT: a regressed first flow, a few refinements, and a mixture of Laplace distributions per pixel.

Images are float in 0..1, any size; flow is (x, y) in pixels of those images. Inside, maps live at 1/8
of the padded image and flow in pixels of that map.

For a video, `encode` once per frame and `flow_from_features` per pair; the numbers equal those of a
direct call. Only the correlation features are kept: the context network sees both frames of a pair, so
it runs for every pair.

Source: Wang, Lipson and Deng, ECCV 2024, arXiv:2405.14793. Deviations: sides below 128 pixels are padded
up to 128, where the published code divides by zero at the coarsest level; with `scale` below 0 sides that
do not divide are padded first, where the published code returns a smaller flow.
"""

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinema.kernels.convex_upsampling import convex_upsample
from kinema.kernels.correlation_lookup.padded_volume import PADDED
from kinema.models.backbones.inference_conv import InferenceConv, has_hooks, inference_dtype
from kinema.models.flow.geometry import pixel_grid, resize_flow
from kinema.models.flow.padding import Padding, padding_for
from kinema.models.flow.pair_network import PairNetwork, check_images
from kinema.models.flow.raft.family import (
    Lookup,
    check_feature_pair,
    check_lookup,
    choose_lookup,
    lookup_between,
    matched_features,
    padded_flow_init,
)
from kinema.models.flow.raft.inference import PairWindows
from kinema.models.flow.sea_raft.inference import InferenceEncoder, PairRefiner, head_of
from kinema.models.flow.sea_raft.layers import HIDDEN_CHANNELS, ResNetEncoder, SeaRaftUpdateBlock
from kinema.models.flow.sea_raft.loss import expected_error_px
from kinema.models.weights import download, load_weights, read_state_dict, resolve_weights

RESNET18, RESNET34 = (2, 2, 2), (3, 4, 6)


class Prediction(NamedTuple):
    """A flow field and the mixture parameters that belong to it."""

    flow: Float[Tensor, "B 2 H W"]
    """(x, y) in pixels."""
    info: Float[Tensor, "B 4 H W"]
    """Two mixture weights (logits), two log-scales; see kinema.models.flow.sea_raft.loss."""


@dataclass(frozen=True)
class SeaRaftFeatures:
    """What SEA-RAFT needs to know of frames; one row per frame. Indexing by rows cuts pairs out of one batch."""

    fmap: Float[Tensor, "B C h w"]
    """Features that are correlated, at 1/8 of the padded size."""
    image: Float[Tensor, "B 3 H W"]
    """The scaled and padded frame in -1..1, for the context network, which sees both frames of a pair."""
    size: tuple[int, int]
    """Height and width of the images as given."""
    padding: Padding
    """Margins that were added to the scaled images."""

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "SeaRaftFeatures":
        return replace(self, fmap=self.fmap[rows], image=self.image[rows])

    def __len__(self) -> int:
        return self.fmap.shape[0]

    @staticmethod
    def stack(frames: Sequence["SeaRaftFeatures"]) -> "SeaRaftFeatures":
        """The rows of several frames of one size as one batch."""
        fmap, image = torch.cat([f.fmap for f in frames]), torch.cat([f.image for f in frames])
        return replace(frames[0], fmap=fmap, image=image)


class _Step(NamedTuple):
    """State after a refinement, at 1/8 of the padded image."""

    flow: Float[Tensor, "B 2 h w"]
    info: Float[Tensor, "B 4 h w"]
    hidden: Float[Tensor, "B C h w"]


class SEARAFT(PairNetwork):
    """`model(image1, image2)` gives the flow from image1 to image2; see `PairNetwork`.

    0 iters give the regressed flow. `flow_init`, at 1/8 of the size after `scale`, takes that flow's place.

    Args:
        depths: residual blocks per stage of both encoders; S has those of ResNet-18, M and L of ResNet-34.
        iters: refinements when a call does not say; 4 for S and M, 12 for L.
        num_blocks: ConvNeXt blocks per refinement.
        radius: of the lookup window.
        scale: the network sees the images at 2^scale times their size; the published Spring models were
            evaluated with -1 on 1080p.
        lookup: "volume" keeps all correlations in memory, "on_demand" forms the windows at each step;
            "auto" takes what `plan_lookup` expects to be faster and to fit (a volume of at most 4 GiB on a
            CPU, of half of the free memory on a GPU).
    """

    title = "SEA-RAFT"

    def __init__(
        self,
        depths: tuple[int, int, int] = RESNET34,
        iters: int = 4,
        num_blocks: int = 2,
        radius: int = 4,
        scale: int = 0,
        lookup: str = "auto",
    ) -> None:
        super().__init__()
        check_lookup(lookup)
        if scale != int(scale) or not -4 <= scale <= 2:
            raise ValueError(f"scale={scale} is not a whole number in -4..2: images are resized by 2^scale")
        self.depths, self.iters, self.radius, self.lookup, self.scale = depths, iters, radius, lookup, int(scale)
        channels = HIDDEN_CHANNELS
        self.cnet = ResNetEncoder(6, depths, 2 * channels)
        self.init_conv = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.upsample_weight = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * channels, 64 * 9, 1)
        )
        self.flow_head = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * channels, 6, 3, padding=1)
        )
        self.fnet = ResNetEncoder(3, depths, 2 * channels)
        self.update_block = SeaRaftUpdateBlock(4 * (2 * radius + 1) ** 2, num_blocks)
        self.arguments: dict[str, Any] = {
            "depths": depths,
            "iters": iters,
            "num_blocks": num_blocks,
            "radius": radius,
            "scale": int(scale),
        }
        """What the constructor is called with to make this network again."""

    def with_info(
        self,
        image1: Float[Tensor, "_ _ _ _"],
        image2: Float[Tensor, "_ _ _ _"],
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Prediction:
        """As `forward`, with the mixture parameters beside the flow."""
        return self.prediction_from_features(*self.encode_pair(image1, image2), iters, flow_init)

    def predictions(
        self,
        image1: Float[Tensor, "_ _ _ _"],
        image2: Float[Tensor, "_ _ _ _"],
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> list[Prediction]:
        """The first flow and the flow after every refinement, iters + 1 in all, for the sequence loss."""
        features1, features2 = self.encode_pair(image1, image2)
        dtype = self._inference_dtype(features1.fmap)
        steps: Iterable[_Step]
        if dtype is None:
            steps = self._steps(features1, features2, iters, flow_init)
        else:
            steps = self._steps_in_place(features1, features2, iters, flow_init, dtype, all_steps=True)
        return [self._full_size(step, features1) for step in steps]

    def uncertainty(self, info: Float[Tensor, "B 4 H W"]) -> Float[Tensor, "B 1 H W"]:
        """The end-point error that the mixture expects, in pixels of the given images (not the scaled ones)."""
        return expected_error_px(info) * 2.0**-self.scale

    def encode(self, images: Float[Tensor, "_ _ _ _"]) -> SeaRaftFeatures:
        """Features of frames [B, 3, H, W] in 0..1, for `flow_from_features`."""
        check_images(images, "SEA-RAFT")
        height, width = images.shape[-2:]
        scaled = self._scaled(2.0 * images.float() - 1.0)
        padding = padding_for(*scaled.shape[-2:])
        x = padding.pad(scaled).contiguous(memory_format=torch.channels_last)
        return SeaRaftFeatures(matched_features(self._encoded(self.fnet, x)), x, (height, width), padding)

    def flow_from_features(
        self,
        features1: SeaRaftFeatures,
        features2: SeaRaftFeatures,
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Float[Tensor, "B 2 H W"]:
        """Flow from the frames of features1 to those of features2, row by row; equals `forward`.

        Raises: ValueError if they differ in number or image size.
        """
        return self._full_size_flow(self._last(features1, features2, iters, flow_init), features1)

    def prediction_from_features(
        self,
        features1: SeaRaftFeatures,
        features2: SeaRaftFeatures,
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Prediction:
        """As `flow_from_features`, with the mixture parameters beside the flow; equals `with_info`."""
        return self._full_size(self._last(features1, features2, iters, flow_init), features1)

    def _last(
        self, features1: SeaRaftFeatures, features2: SeaRaftFeatures, iters: int | None, flow_init: Tensor | None
    ) -> _Step:
        dtype = self._inference_dtype(features1.fmap)
        if dtype is None:
            return deque(self._steps(features1, features2, iters, flow_init), maxlen=1)[0]
        return self._steps_in_place(features1, features2, iters, flow_init, dtype, all_steps=False)[0]

    def _steps(
        self, features1: SeaRaftFeatures, features2: SeaRaftFeatures, iters: int | None, flow_init: Tensor | None
    ) -> Iterator[_Step]:
        """The regressed flow, then the state after each refinement."""
        iters = self._checked(features1, features2, iters)
        images = torch.cat([features1.image, features2.image], dim=1)
        context = self.init_conv(self._encoded(self.cnet, images))
        hidden, context = context.chunk(2, dim=1)  # as published: neither tanh nor relu
        flow, info = self.flow_head(hidden).float().split([2, 4], dim=1)
        flow = flow if flow_init is None else self._first_flow(flow_init, features1)
        yield _Step(flow, info, hidden)
        if not iters:
            return
        look_up = self._lookup(features1.fmap, features2.fmap, iters)
        start = pixel_grid(flow.shape[-2], flow.shape[-1], like=flow)
        for _ in range(iters):
            flow = flow.detach()  # as published: no gradient through the positions of the lookup
            hidden = self.update_block(hidden, context, look_up(start + flow), flow)
            increment, info = self.flow_head(hidden).float().split([2, 4], dim=1)
            flow = flow + increment
            yield _Step(flow, info, hidden)

    def _steps_in_place(
        self,
        features1: SeaRaftFeatures,
        features2: SeaRaftFeatures,
        iters: int | None,
        flow_init: Tensor | None,
        dtype: torch.dtype,
        all_steps: bool,
    ) -> list[_Step]:
        """`_steps`, or their last, without gradient on a CPU, pair by pair, with convolutions in this type."""
        iters = self._checked(features1, features2, iters)
        B, _, H, W = features1.fmap.shape
        of_pair = (1, *features1.fmap.shape[1:])
        plan = choose_lookup(self.lookup, of_pair, max(1, iters), features1.fmap.device, self.radius, PADDED)
        with torch.autocast("cpu", enabled=False):
            encode, first = InferenceEncoder(self.cnet, dtype), InferenceConv.of(self.init_conv, dtype=dtype)
            head, start = head_of(self.flow_head, dtype), pixel_grid(H, W, like=features1.fmap)
            refiner = None
            if iters:
                windows = PairWindows(H, W, self.radius, "x_major", plan.kind == "volume")
                refiner = PairRefiner(self.update_block, self.flow_head, windows, H, W, dtype)
            of_pairs = []
            for b in range(B):
                pair = slice(b, b + 1)
                context = first(encode(torch.cat([features1.image[pair], features2.image[pair]], dim=1)))
                hidden = context[:, :HIDDEN_CHANNELS]
                flow, info = head[1](head[0].relu(hidden)).float().split([2, 4], dim=1)
                flow = flow if flow_init is None else self._first_flow(flow_init, features1)[pair]
                steps = [_Step(flow, info, hidden.clone())] if all_steps or not iters else []
                if refiner is not None:
                    maps = features1.fmap[pair], features2.fmap[pair], context, start, flow
                    for number, (flow, info, hidden) in enumerate(refiner.refine(*maps, iters), start=1):
                        if all_steps or number == iters:
                            steps.append(_Step(flow, info, hidden.clone()))
                of_pairs.append(steps)
        of_steps = zip(*of_pairs, strict=True)
        return [_Step(*(torch.cat(parts) for parts in zip(*step, strict=True))) for step in of_steps]

    def _encoded(self, encoder: ResNetEncoder, images: Tensor) -> Tensor:
        """`encoder(images)`, by `InferenceEncoder` where that is allowed."""
        dtype = self._inference_dtype(images)
        if dtype is None:
            return encoder(images)
        with torch.autocast("cpu", enabled=False):
            return InferenceEncoder(encoder, dtype)(images)

    def _inference_dtype(self, x: Tensor) -> torch.dtype | None:
        """See `inference_dtype`; layers in training, and those that somebody looks at, are called as they are."""
        return None if self.training or has_hooks(self) else inference_dtype(x)

    def _checked(self, features1: SeaRaftFeatures, features2: SeaRaftFeatures, iters: int | None) -> int:
        """The number of refinements. Raises: ValueError for one below 0, or features that do not fit each other."""
        iters = self.iters if iters is None else iters
        if iters < 0:
            raise ValueError(f"iters={iters} must be at least 0 (0 is the regressed flow)")
        check_feature_pair(features1, features2)
        return iters

    def _first_flow(self, flow_init: Tensor, features: SeaRaftFeatures) -> Tensor:
        """A given first flow at the size of the maps."""
        height, width = (_scaled_side(side, self.scale) for side in features.size)
        return padded_flow_init(flow_init, len(features), height, width)

    def _full_size_flow(self, step: _Step, features: SeaRaftFeatures) -> Float[Tensor, "B 2 H W"]:
        return self._unscaled_flow(self._upsampled(8.0 * step.flow, step, features), features)

    def _full_size(self, step: _Step, features: SeaRaftFeatures) -> Prediction:
        maps = self._upsampled(torch.cat([8.0 * step.flow, step.info], dim=1), step, features)
        height, width = features.size
        info = maps[:, 2:]
        if self.scale:
            size = _unscaled_size(maps, self.scale)
            info = F.interpolate(info, size=size, mode="area")[..., :height, :width]
        return Prediction(self._unscaled_flow(maps[:, :2], features), info.contiguous())

    def _upsampled(self, maps: Tensor, step: _Step, features: SeaRaftFeatures) -> Tensor:
        logits = 0.25 * self.upsample_weight(step.hidden)
        return features.padding.unpad(convex_upsample(maps, logits))

    def _unscaled_flow(self, flow: Tensor, features: SeaRaftFeatures) -> Tensor:
        height, width = features.size
        if self.scale:
            full_height, full_width = _unscaled_size(flow, self.scale)
            flow = resize_flow(flow, full_height, full_width, antialias=False)[..., :height, :width]
        return flow.contiguous()

    def _scaled(self, images: Tensor) -> Tensor:
        """Images at 2^scale times their size; sides that do not divide are padded right and below first."""
        if not self.scale:
            return images
        height, width = images.shape[-2:]
        multiple = 2 ** max(0, -self.scale)
        images = Padding(0, -width % multiple, 0, -height % multiple).pad(images)
        # Without antialiasing, as the published evaluation.
        return F.interpolate(images, scale_factor=2.0**self.scale, mode="bilinear", align_corners=False)

    def _lookup(self, fmap1: Tensor, fmap2: Tensor, iters: int) -> Lookup:
        """Correlation windows; halving by bilinear interpolation, as published, is 2x2 averaging, so RAFT's pyramid."""
        plan = choose_lookup(self.lookup, fmap1.shape, iters, fmap1.device, self.radius)
        return lookup_between(fmap1, fmap2, plan.kind, self.radius)


def sea_raft_s(pretrained: bool = False, weights: str | Path | None = None, scale: int = 0) -> SEARAFT:
    """SEA-RAFT S; `weights` is a file or URL, `pretrained=True` takes the published Spring weights."""
    return _build("sea_raft_s", pretrained, weights, depths=RESNET18, iters=4, scale=scale)


def sea_raft_m(pretrained: bool = False, weights: str | Path | None = None, scale: int = 0) -> SEARAFT:
    """SEA-RAFT M; `weights` is a file or URL, `pretrained=True` takes the published Spring weights."""
    return _build("sea_raft_m", pretrained, weights, depths=RESNET34, iters=4, scale=scale)


def sea_raft_l(pretrained: bool = False, weights: str | Path | None = None, scale: int = 0) -> SEARAFT:
    """SEA-RAFT L: the network and the weights of M, refined 12 times."""
    return _build("sea_raft_l", pretrained, weights, depths=RESNET34, iters=12, scale=scale)


def sea_raft(weights: str | Path, iters: int = 4, scale: int = 0) -> SEARAFT:
    """SEA-RAFT in the configuration that a checkpoint's shapes tell; `iters` and `scale` are not in it.

    Raises: ValueError, as `load_weights` does, for a file that is no SEA-RAFT checkpoint.
    """
    path = download(str(weights)) if "://" in str(weights) else weights
    model = SEARAFT(**configuration_of(read_state_dict(path), str(weights)), iters=iters, scale=scale)
    return load_weights(model, path, "sea_raft").eval()


def configuration_of(state: dict[str, Tensor], source: str = "the checkpoint") -> dict[str, Any]:
    """The arguments depths, num_blocks and radius of `SEARAFT` for which a published state dict was made.

    Raises: ValueError if `state` is not of a SEA-RAFT.
    """
    depths = tuple(_count(state, rf"cnet\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3))
    num_blocks = _count(state, r"update_block\.refine\.(\d+)\.")
    first = state.get("update_block.encoder.convc1.weight")
    lookup_channels = 0 if first is None else first.shape[1]
    radius = (math.isqrt(lookup_channels // 4) - 1) // 2
    if not all(depths) or not num_blocks or lookup_channels != 4 * (2 * radius + 1) ** 2:
        raise ValueError(f"weights={source} do not fit sea_raft: no SEA-RAFT encoders and update block in the file")
    return {"depths": depths, "num_blocks": num_blocks, "radius": radius}


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _build(name: str, pretrained: bool, weights: str | Path | None, **options: Any) -> SEARAFT:
    model = SEARAFT(**options)
    resolve_weights(model, name, pretrained, weights)
    return model.eval()


def _scaled_side(side: int, scale: int) -> int:
    return side << scale if scale >= 0 else -(-side >> -scale)


def _unscaled_size(maps: Tensor, scale: int) -> tuple[int, int]:
    """Size that maps at the scaled (and padded) size have before scaling."""
    height, width = maps.shape[-2:]
    return (height >> scale, width >> scale) if scale >= 0 else (height << -scale, width << -scale)
