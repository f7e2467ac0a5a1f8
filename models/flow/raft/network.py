"""RAFT and RAFT-small: optical flow by recurrent refinement over an all-pairs correlation volume.

Images are float in 0..1, any size; flow is (x, y) in pixels of those images. Inside, maps live at 1/8
of the padded image and flow in pixels of that map.

For a video, `encode` once per frame and `flow_from_features` per pair: each frame is in two pairs or
more, and the encoders need not see it again. The numbers equal those of a direct call.

Source: Teed and Deng, ECCV 2020, arXiv:2003.12039. Deviation: sides below 128 pixels are padded up to
128, where the published code divides by zero at the coarsest level.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.correlation_lookup import LookupPlan
from kinema.kernels.correlation_lookup.padded_volume import PADDED
from kinema.kernels.correlation_lookup.planner import GATHERED
from kinema.kernels.correlation_lookup.window import WindowOrder
from kinema.models.backbones.inference_conv import has_hooks, inference_dtype
from kinema.models.flow.geometry import pixel_grid
from kinema.models.flow.padding import Padding, padding_for
from kinema.models.flow.pair_network import PairNetwork, check_image_pair, check_images
from kinema.models.flow.raft.family import (
    check_feature_pair,
    check_lookup,
    choose_lookup,
    lookup_between,
    matched_features,
    padded_flow_init,
)
from kinema.models.flow.raft.inference import PairRefiner
from kinema.models.flow.raft.layers import (
    BottleneckBlock,
    Encoder,
    ResidualBlock,
    SmallUpdateBlock,
    UpdateBlock,
)
from kinema.models.weights import resolve_weights

DEFAULT_ITERS = 12


@dataclass(frozen=True)
class FrameFeatures:
    """What RAFT needs to know of frames, at 1/8 of the padded size; one row per frame.

    Indexing by a slice, a list or an index tensor takes rows, so pairs are cut out of one batch.
    """

    fmap: Float[Tensor, "B C H W"]
    """Features that are correlated."""
    context: Float[Tensor, "B D H W"] | None
    """Raw context output (state and context before tanh and relu); None for a frame that is only a target."""
    size: tuple[int, int]
    """Height and width of the images before padding."""
    padding: Padding
    """Margins that were added."""

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> "FrameFeatures":
        if isinstance(rows, int):
            rows = [range(len(self))[rows]]  # an IndexError past the end, so that iteration stops
        context = None if self.context is None else self.context[rows]
        return FrameFeatures(self.fmap[rows], context, self.size, self.padding)

    def __len__(self) -> int:
        return self.fmap.shape[0]

    @staticmethod
    def stack(frames: Sequence["FrameFeatures"]) -> "FrameFeatures":
        """The rows of several frames of one size as one batch; without context where one of them has none."""
        contexts = [frame.context for frame in frames if frame.context is not None]
        context = torch.cat(contexts) if len(contexts) == len(frames) else None
        return replace(frames[0], fmap=torch.cat([frame.fmap for frame in frames]), context=context)


class RAFT(PairNetwork):
    """`model(image1, image2)` gives the flow from image1 to image2 after 12 refinements; see `PairNetwork`.

    Args:
        variant: "large" (5.3 M parameters) or "small" (1.0 M).
        padding: "sintel" splits the padding over both sides, "kitti" puts all rows below; each network
            of the paper was evaluated with the mode of that benchmark.
        lookup: "volume" keeps all correlations in memory, "on_demand" forms the windows at each step;
            "auto" takes what `lookup_plan` says.
    """

    title = "RAFT"
    benchmark_iters = {"sintel": 32, "kitti": 24, "middlebury": 32}
    """Refinements of the published figures; Middlebury is not among them and follows Sintel."""
    window_order: WindowOrder = "x_major"
    """Which axis of a lookup window is the outer one in the weights."""

    def __init__(
        self,
        variant: str = "large",
        padding: str = "sintel",
        lookup: str = "auto",
    ) -> None:
        super().__init__()
        if variant not in ("large", "small"):
            raise ValueError(f"variant={variant!r} is not one of 'large', 'small'")
        check_lookup(lookup)
        padding_for(128, 128, mode=padding)
        self.variant, self.padding, self.lookup = variant, padding, lookup
        if variant == "large":
            self.radius = 4
            self.update_block: UpdateBlock | SmallUpdateBlock = UpdateBlock(4 * (2 * self.radius + 1) ** 2)
            self.fnet = Encoder(ResidualBlock, (64, 96, 128), 256, "instance")
            self.cnet = Encoder(ResidualBlock, (64, 96, 128), 256, "batch")
        else:
            self.radius = 3
            self.update_block = SmallUpdateBlock(4 * (2 * self.radius + 1) ** 2)
            self.fnet = Encoder(BottleneckBlock, (32, 64, 96), 128, "instance")
            self.cnet = Encoder(BottleneckBlock, (32, 64, 96), 160, "none")

    @property
    def arguments(self) -> dict[str, str]:
        """What the constructor is called with to make this network again."""
        return {"variant": self.variant, "padding": self.padding}

    def predictions(
        self,
        image1: Float[Tensor, "_ _ _ _"],
        image2: Float[Tensor, "_ _ _ _"],
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> list[Float[Tensor, "B 2 H W"]]:
        """As `forward`, but the flow after every refinement, for the sequence loss."""
        return self._refine(*self.encode_pair(image1, image2), iters, flow_init, all_steps=True)

    def encode(self, images: Float[Tensor, "_ _ _ _"], context: bool = True) -> FrameFeatures:
        """Features of frames [B, 3, H, W] in 0..1; without `context` they can only be targets."""
        check_images(images, "RAFT")
        height, width = images.shape[-2:]
        padding = padding_for(height, width, mode=self.padding)
        x = padding.pad(2.0 * images.float() - 1.0).contiguous()
        fmap, raw_context = matched_features(self.fnet(x)), None
        if context:
            # Faster in this memory order, here and in the GRU; the instance norms of fnet want the planar one.
            raw_context = self.cnet(x.contiguous(memory_format=torch.channels_last)).float()
        return FrameFeatures(fmap, raw_context, (height, width), padding)

    def flow_from_features(
        self,
        features1: FrameFeatures,
        features2: FrameFeatures,
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Float[Tensor, "B 2 H W"]:
        """Flow from the frames of features1 to those of features2, row by row; equals `forward`.

        Raises: ValueError if they differ in number or image size, or features1 lack the context.
        """
        return self._refine(features1, features2, iters, flow_init, all_steps=False)[-1]

    def encode_pair(self, image1: Tensor, image2: Tensor) -> tuple[FrameFeatures, FrameFeatures]:
        """Features of both images, the second without context. Raises: ValueError for images of the wrong shape."""
        check_image_pair(image1, image2, self.title)
        features1 = self.encode(image1)
        return features1, self.encode(image2, context=False)

    def _refine(
        self,
        features1: FrameFeatures,
        features2: FrameFeatures,
        iters: int | None,
        flow_init: Tensor | None,
        all_steps: bool,
    ) -> list[Tensor]:
        """The refinement loop; upsamples after every step, or only after the last."""
        iters = DEFAULT_ITERS if iters is None else iters
        _check_pair(features1, features2, iters)
        B, _, H, W = features1.fmap.shape
        start = pixel_grid(H, W, like=features1.fmap.new_empty(0, dtype=torch.float32)).expand(B, 2, H, W)
        target = start if flow_init is None else start + padded_flow_init(flow_init, B, *features1.size)
        in_place = inference_dtype(features1.fmap) is not None and not has_hooks(self.update_block)
        refine = self._refine_in_place if in_place else self._refine_maps
        flows = refine(features1, features2, start, target, iters, all_steps)
        return [features1.padding.unpad(flow).contiguous() for flow in flows]

    def _refine_maps(
        self,
        features1: FrameFeatures,
        features2: FrameFeatures,
        start: Tensor,
        target: Tensor,
        iters: int,
        all_steps: bool,
    ) -> list[Tensor]:
        """Flows of padded size, all pairs together; any device, with gradients."""
        fmap1, context = features1.fmap, features1.context
        assert context is not None  # checked with a message above
        kind = self._plan(fmap1.shape, iters, fmap1.device, in_place=False).kind
        look_up = lookup_between(fmap1, features2.fmap, kind, self.radius, self.window_order)
        block = self.update_block
        hidden, context = context.split([block.hidden_channels, block.context_channels], dim=1)
        hidden, passes = torch.tanh(hidden), block.gru.prepare(torch.relu(context))
        flows = []
        for step in range(iters):
            target = target.detach()  # as published: no gradient through the positions of the lookup
            motion = block.encoder(target - start, look_up(target))
            for gru_pass in passes:
                hidden = gru_pass.step(hidden, motion)
            target = target + block.flow_head(hidden).float()
            if all_steps or step == iters - 1:
                flows.append(block.upsample((target - start).contiguous(), hidden))
        return flows

    def _refine_in_place(
        self,
        features1: FrameFeatures,
        features2: FrameFeatures,
        start: Tensor,
        target: Tensor,
        iters: int,
        all_steps: bool,
    ) -> list[Tensor]:
        """The same without gradient on a CPU, pair by pair."""
        fmap1, context, dtype = features1.fmap, features1.context, inference_dtype(features1.fmap)
        assert context is not None and dtype is not None
        keep_volume = self._plan(fmap1.shape, iters, fmap1.device, in_place=True).kind == "volume"
        H, W = fmap1.shape[2:]
        flows: list[list[Tensor]] = []
        with torch.autocast("cpu", enabled=False):
            refiner = PairRefiner(self.update_block, H, W, self.radius, self.window_order, keep_volume, dtype)
            for b in range(len(features1)):
                pair = slice(b, b + 1)
                maps = fmap1[pair], features2.fmap[pair], context[pair], start[pair], target[pair]
                of_pair = []
                for step, (flow, hidden) in enumerate(refiner.refine(*maps, iters), start=1):
                    if all_steps or step == iters:
                        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                            of_pair.append(self.update_block.upsample(flow.contiguous(), hidden))
                flows.append(of_pair)
        return [torch.cat(of_step) for of_step in zip(*flows, strict=True)]

    def lookup_plan(self, height: int, width: int, batch: int = 1, iters: int = DEFAULT_ITERS) -> LookupPlan:
        """How images of this size are correlated without gradient where the weights are, and why (`reason`).

        Raises: ValueError for sizes or iters below 1.
        """
        padding = padding_for(height, width, mode=self.padding)
        H, W = (height + padding.top + padding.bottom) // 8, (width + padding.left + padding.right) // 8
        weight = self.fnet.conv2.weight
        with torch.no_grad():
            return self._plan(
                (batch, len(weight), H, W), iters, weight.device, in_place=inference_dtype(weight) is not None
            )

    def _plan(self, shape: Sequence[int], iters: int, device: torch.device, in_place: bool) -> LookupPlan:
        """Plan for feature maps of `shape`; `in_place` is for `_refine_in_place`, which takes one pair at a time."""
        _, *of_a_pair = shape
        if in_place:
            return choose_lookup(self.lookup, (1, *of_a_pair), iters, device, self.radius, PADDED)
        return choose_lookup(self.lookup, shape, iters, device, self.radius, GATHERED)


def raft(pretrained: bool = False, weights: str | Path | None = None) -> RAFT:
    """RAFT; `weights` is a file or URL, `pretrained=True` takes the published ones."""
    return _build("large", "raft", pretrained, weights)


def raft_small(pretrained: bool = False, weights: str | Path | None = None) -> RAFT:
    """RAFT-small; `weights` is a file or URL, `pretrained=True` takes the published ones."""
    return _build("small", "raft_small", pretrained, weights)


def _build(variant: str, name: str, pretrained: bool, weights: str | Path | None) -> RAFT:
    model = RAFT(variant)
    resolve_weights(model, name, pretrained, weights)
    return model.eval()


def _check_pair(features1: FrameFeatures, features2: FrameFeatures, iters: int) -> None:
    if iters < 1:
        raise ValueError(f"iters={iters} must be at least 1")
    check_feature_pair(features1, features2)
    if features1.context is None:
        raise ValueError("features1 have no context: encode the first frames with context=True")
