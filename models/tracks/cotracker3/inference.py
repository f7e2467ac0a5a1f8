"""CoTracker3's frame encoder without gradient on a CPU: the arithmetic of `layers`, arranged for speed.

Maps are channels-last, as oneDNN's convolutions want them, one frame at a time; instance norms and their ReLUs walk
over parts that stay in a core's cache. Where a block keeps its size, both terms of its sum come out of ReLUs, so that
the last ReLU changes nothing.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.inference_conv import InferenceConv, has_hooks, inference_dtype, instance_norm_
from kinema.models.flow.raft.layers import ResidualBlock
from kinema.models.tracks.cotracker3.layers import FrameEncoder


def encoded_frames(encoder: FrameEncoder, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
    """`encoder(images)`, by `InferenceFrameEncoder` where that is allowed."""
    dtype = inference_dtype(images)
    if dtype is None or has_hooks(encoder):
        return encoder(images)
    with torch.autocast("cpu", enabled=False):
        return InferenceFrameEncoder(encoder, dtype)(images)


class InferenceFrameEncoder:
    """`FrameEncoder`. Runs with autocast switched off."""

    def __init__(self, encoder: FrameEncoder, dtype: torch.dtype) -> None:
        self.stride = encoder.stride
        self.first, self.joined, self.last = (
            InferenceConv.of(conv, dtype=dtype) for conv in (encoder.conv1, encoder.conv2, encoder.conv3)
        )
        stages = (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
        self.stages = [[_Residual(block, dtype) for block in stage] for stage in stages]  # type: ignore[arg-type]

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D h w"]:
        return torch.cat([self._encode(image) for image in images.split(1)])

    def _encode(self, image: Float[Tensor, "1 3 H W"]) -> Float[Tensor, "1 D h w"]:
        size = (image.shape[-2] // self.stride, image.shape[-1] // self.stride)
        x = instance_norm_(self.first(image), relu=True)
        scales = []
        for stage in self.stages:
            for block in stage:
                x = block(x)
            same = x.shape[-2:] == size
            scales.append(x if same else F.interpolate(x, size, mode="bilinear", align_corners=True))
        return self.last(instance_norm_(self.joined(torch.cat(scales, dim=1)), relu=True)).float()


class _Residual:
    """`ResidualBlock` with instance norms, whose input is the output of a ReLU."""

    def __init__(self, block: ResidualBlock, dtype: torch.dtype) -> None:
        self.conv1, self.conv2 = InferenceConv.of(block.conv1, dtype=dtype), InferenceConv.of(block.conv2, dtype=dtype)
        self.shortcut = None
        if block.downsample is not None:
            conv = block.downsample[0]
            assert isinstance(conv, nn.Conv2d)
            self.shortcut = InferenceConv.of(conv, dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = instance_norm_(self.conv1(x), relu=True)
        y = instance_norm_(self.conv2(y), relu=True)
        return y.add_(x) if self.shortcut is None else y.add_(instance_norm_(self.shortcut(x), relu=False)).relu_()
