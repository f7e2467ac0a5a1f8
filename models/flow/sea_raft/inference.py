"""SEA-RAFT without gradient on a CPU: the arithmetic of `layers`, arranged for speed; float32 or bfloat16.

- Batch norms are folded into the convolutions before them, ReLUs fused. Where a block keeps its size, both terms of its
  sum come out of ReLUs, so that the last ReLU changes nothing.
- The inputs of a ConvNeXt block, [state, context, motion, flow], are parts of one map and written there, not joined.
- A block's last product is linear in the one before it: their weights are multiplied once, 29 % of its work less.
- Correlations are read from a volume with zero margins, as in RAFT (`PairWindows`).

Convolutions are over nine tenths of what is left. docs/LOG.md has the figures.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.inference_conv import InferenceConv
from kinema.models.backbones.inference_linear import linear
from kinema.models.flow.raft.inference import MotionUpdate, PairWindows
from kinema.models.flow.sea_raft.layers import (
    HIDDEN_CHANNELS,
    ConvNextBlock,
    ResNetBlock,
    ResNetEncoder,
    SeaRaftUpdateBlock,
)


class InferenceEncoder:
    """`ResNetEncoder` with its norms folded. Runs with autocast switched off."""

    def __init__(self, encoder: ResNetEncoder, dtype: torch.dtype) -> None:
        self.first = InferenceConv.of(encoder.conv1, encoder.bn1, dtype)
        stages = (encoder.layer1, encoder.layer2, encoder.layer3)
        self.blocks = [_Residual(block, dtype) for stage in stages for block in stage]  # type: ignore[arg-type]
        self.last = InferenceConv.of(encoder.final_conv, dtype=dtype)

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = self.first.relu(images)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class _Residual:
    """`ResNetBlock`, whose input is the output of a ReLU."""

    def __init__(self, block: ResNetBlock, dtype: torch.dtype) -> None:
        self.conv1 = InferenceConv.of(block.conv1, block.bn1, dtype)
        self.conv2 = InferenceConv.of(block.conv2, block.bn2, dtype)
        self.shortcut = None
        if block.downsample is not None:
            conv = block.downsample[0]
            assert isinstance(conv, nn.Conv2d)
            self.shortcut = InferenceConv.of(conv, block.bn3, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.conv2.relu(self.conv1.relu(x))
        return y.add_(x) if self.shortcut is None else y.add_(self.shortcut(x)).relu_()


class PairRefiner:
    """Refines one pair after another, all of one size, from a start that is given. Runs with autocast switched off.

    Args: head, of the flow and its mixture; windows, where correlations come from; height, width, of the maps.
    """

    def __init__(
        self,
        block: SeaRaftUpdateBlock,
        head: nn.Sequential,
        windows: PairWindows,
        height: int,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        self.windows = windows
        self.motion = MotionUpdate(block.encoder, windows, dtype)
        self.blocks = [_ConvNext(part, dtype) for part in block.refine]  # type: ignore[arg-type]
        self.head = head_of(head, dtype)
        shape = (1, 3 * HIDDEN_CHANNELS, height, width)
        self.inputs = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    def refine(
        self,
        fmap1: Float[Tensor, "1 C h w"],
        fmap2: Float[Tensor, "1 C h w"],
        context: Float[Tensor, "1 D h w"],
        start: Float[Tensor, "2 h w"],
        flow: Float[Tensor, "1 2 h w"],
        iters: int,
    ) -> Iterator[tuple[Float[Tensor, "1 2 h w"], Float[Tensor, "1 4 h w"], Float[Tensor, "1 E h w"]]]:
        """Flow, mixture and state after each step; the state is overwritten by the next.

        Args: context, [state, context] of the context network; start, pixel positions; flow, the first.
        """
        self.windows.begin(fmap1, fmap2)
        self.inputs[:, : 2 * HIDDEN_CHANNELS].copy_(context)
        state, of_motion, of_flow = self.inputs.split([HIDDEN_CHANNELS, 2 * HIDDEN_CHANNELS - 2, 2], dim=1)
        for _ in range(iters):
            of_motion[:, HIDDEN_CHANNELS:].copy_(self.motion(self.windows.lookup(start + flow), flow))
            of_flow.copy_(flow)
            for block in self.blocks:
                state.copy_(block(self.inputs))
            increment, info = self.head[1](self.head[0].relu(state)).float().split([2, 4], dim=1)
            flow = flow + increment
            yield flow, info, state


def head_of(head: nn.Sequential, dtype: torch.dtype) -> list[InferenceConv]:
    """Two convolutions, a ReLU between them."""
    convs = [layer for layer in head if isinstance(layer, nn.Conv2d)]
    return [InferenceConv.of(conv, dtype=dtype) for conv in convs]


class _ConvNext:
    """`ConvNextBlock`: final(x + gamma (W y + b)) is final(x) + (final gamma W) y + final(gamma b)."""

    def __init__(self, block: ConvNextBlock, dtype: torch.dtype) -> None:
        self.depthwise = InferenceConv.of(block.dwconv, dtype=dtype)
        self.norm = block.norm
        self.widen = block.pwconv1.weight.to(dtype), block.pwconv1.bias.to(dtype)
        final = block.final.weight.flatten(1)  # [D, C]
        self.final = final.to(dtype)
        self.narrow = (final @ (block.gamma[:, None] * block.pwconv2.weight)).to(dtype)
        assert block.final.bias is not None
        self.bias = (block.final.bias + final @ (block.gamma * block.pwconv2.bias)).to(dtype)

    def __call__(self, x: Float[Tensor, "1 C H W"]) -> Float[Tensor, "1 D H W"]:
        rows, norm = x.permute(0, 2, 3, 1), self.norm  # [1, H, W, C]
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = F.layer_norm(y, norm.normalized_shape, norm.weight.to(y.dtype), norm.bias.to(y.dtype), norm.eps)
        y = linear(linear(y, *self.widen, "gelu"), self.narrow, self.bias)
        return y.add_(linear(rows, self.final, None)).permute(0, 3, 1, 2)
