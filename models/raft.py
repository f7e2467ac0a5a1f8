"""RAFT and RAFT-small: optical flow by recurrent refinement over an all-pairs correlation volume.

Images are float in 0..1, any size; flow is (x, y) in pixels of those images. Inside, maps live at 1/8
of the padded image and flow in pixels of that map.

For a video, `encode` once per frame and `flow_from_features` per pair: each frame is in two pairs or
more, and the encoders need not see it again. The numbers equal those of a direct call.

Source: Teed and Deng, ECCV 2020, arXiv:2003.12039. Deviation: sides below 128 pixels are padded up to
128, where the published code divides by zero at the coarsest level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kinema.kernels import correlation_lookup as lookup_on_demand
from kinema.kernels.correlation_lookup import (
    correlation_pyramid,
    feature_pyramid,
    volume_bytes,
    volume_lookup,
)
from kinema.models.padding import Padding, grid_padding, padding_for
from kinema.models.raft_layers import (
    BottleneckBlock,
    Encoder,
    ResidualBlock,
    SmallUpdateBlock,
    UpdateBlock,
)
from kinema.models.weights import resolve_weights

DEFAULT_ITERS = 12
MAX_VOLUME_BYTES_CPU = 4 * 2**30


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


class RAFT(nn.Module):
    """`model(image1, image2)` gives the flow from image1 to image2; see `forward`.

    Args:
        variant: "large" (5.3 M parameters) or "small" (1.0 M).
        padding: "sintel" splits the padding over both sides, "kitti" puts all rows below; each network
            of the paper was evaluated with the mode of that benchmark.
        lookup: "volume" keeps all correlations in memory, "on_demand" forms the windows at each step;
            "auto" takes the volume while it fits (4 GiB on a CPU, half of the free memory on a GPU).
    """

    benchmark_iters = {"sintel": 32, "kitti": 24, "middlebury": 32}
    """Refinements of the published figures; Middlebury is not among them and follows Sintel."""

    def __init__(
        self,
        variant: str = "large",
        padding: str = "sintel",
        lookup: str = "auto",
    ) -> None:
        super().__init__()
        if variant not in ("large", "small"):
            raise ValueError(f"variant={variant!r} is not one of 'large', 'small'")
        if lookup not in ("auto", "volume", "on_demand"):
            raise ValueError(f"lookup={lookup!r} is not one of 'auto', 'volume', 'on_demand'")
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

    def forward(
        self,
        image1: Float[Tensor, "_ _ _ _"],
        image2: Float[Tensor, "_ _ _ _"],
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> Float[Tensor, "B 2 H W"]:
        """Flow from image1 to image2 after `iters` refinements (default 12).

        Args:
            image1, image2: [B, 3, H, W] float in 0..1.
            flow_init: [B, 2, ceil(H/8), ceil(W/8)], a first guess in 1/8 pixels.

        Returns: [B, 2, H, W] float32, (x, y) in pixels.
        Raises: ValueError for images or flow_init of the wrong shape, or iters < 1.
        """
        return self._refine(*self._encode_pair(image1, image2), iters, flow_init, all_steps=False)[-1]

    def predictions(
        self,
        image1: Float[Tensor, "_ _ _ _"],
        image2: Float[Tensor, "_ _ _ _"],
        iters: int | None = None,
        flow_init: Float[Tensor, "_ _ _ _"] | None = None,
    ) -> list[Float[Tensor, "B 2 H W"]]:
        """As `forward`, but the flow after every refinement, for the sequence loss."""
        return self._refine(*self._encode_pair(image1, image2), iters, flow_init, all_steps=True)

    def encode(self, images: Float[Tensor, "_ _ _ _"], context: bool = True) -> FrameFeatures:
        """Features of frames [B, 3, H, W] in 0..1; without `context` they can only be targets."""
        _check_images(images)
        height, width = images.shape[-2:]
        padding = padding_for(height, width, mode=self.padding)
        x = padding.pad(2.0 * images.float() - 1.0).contiguous()
        fmap, raw_context = self.fnet(x).float(), None
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

    def _encode_pair(self, image1: Tensor, image2: Tensor) -> tuple[FrameFeatures, FrameFeatures]:
        _check_images(image1)
        if image1.shape != image2.shape:
            raise ValueError(f"image1 is {list(image1.shape)} and image2 is {list(image2.shape)}: shapes must agree")
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
        fmap1 = features1.fmap
        look_up = self._lookup(fmap1, features2.fmap)
        block = self.update_block
        assert features1.context is not None  # checked with a message above
        hidden, context = features1.context.split([block.hidden_channels, block.context_channels], dim=1)
        hidden, passes = torch.tanh(hidden), block.gru.prepare(torch.relu(context))
        start = _pixel_grid(fmap1)
        target = start if flow_init is None else start + self._initial_flow(flow_init, features1)
        flows = []
        for step in range(iters):
            target = target.detach()  # as published: no gradient through the positions of the lookup
            motion = block.encoder(target - start, look_up(target))
            for gru_pass in passes:
                hidden = gru_pass.step(hidden, motion)
            target = target + block.flow_head(hidden).float()
            if all_steps or step == iters - 1:
                flow = block.upsample((target - start).contiguous(), hidden)
                flows.append(features1.padding.unpad(flow).contiguous())
        return flows

    def _lookup(self, fmap1: Tensor, fmap2: Tensor):
        """A function from target positions [B, 2, H, W] to correlation windows."""
        B, _, H, W = fmap1.shape
        if self.lookup == "volume" or (self.lookup == "auto" and volume_bytes(B, H, W) <= _volume_budget(fmap1)):
            pyramid = correlation_pyramid(fmap1, fmap2)
            return lambda coords: volume_lookup(pyramid, coords, self.radius)
        pooled = feature_pyramid(fmap2.float())
        return lambda coords: lookup_on_demand(fmap1, pooled, coords, self.radius)

    def _initial_flow(self, flow_init: Tensor, features: FrameFeatures) -> Tensor:
        height, width = features.size
        expected = (len(features), 2, -(-height // 8), -(-width // 8))
        if tuple(flow_init.shape) != expected:
            raise ValueError(
                f"flow_init is {list(flow_init.shape)}; for images of {height}x{width} it must be "
                f"{list(expected)} (1/8 of the size rounded up, values in 1/8 pixels)"
            )
        return grid_padding(height, width).pad(flow_init.float())


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


def _pixel_grid(fmap: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 2 H W"]:
    B, _, H, W = fmap.shape
    y, x = torch.meshgrid(
        torch.arange(H, device=fmap.device, dtype=torch.float32),
        torch.arange(W, device=fmap.device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack([x, y]).expand(B, 2, H, W)


def _volume_budget(fmap: Tensor) -> int:
    if fmap.device.type == "cuda":
        return torch.cuda.mem_get_info(fmap.device)[0] // 2
    return MAX_VOLUME_BYTES_CPU


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {list(images.shape)}; RAFT takes [B, 3, H, W] with values in 0..1")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; RAFT takes floats in 0..1: divide bytes by 255")


def _check_pair(features1: FrameFeatures, features2: FrameFeatures, iters: int) -> None:
    if iters < 1:
        raise ValueError(f"iters={iters} must be at least 1")
    if features1.context is None:
        raise ValueError("features1 have no context: encode the first frames with context=True")
    if features1.size != features2.size or len(features1) != len(features2):
        raise ValueError(
            f"features1 hold {len(features1)} frames of {features1.size} and features2 "
            f"{len(features2)} of {features2.size}: numbers and sizes must agree"
        )
