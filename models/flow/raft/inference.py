"""RAFT's refinement without gradient on a CPU: the same arithmetic as `raft_layers`, arranged for speed.

- All maps stay channels-last, which oneDNN's convolutions want; activations happen in place.
- The inputs of the GRU's convolutions, [hidden, motion], are parts of one map each and written there, not joined.
- Pairs go one after another: the maps of one pair fit in a core's cache, and the memory of its volume is reused.
- Windows are read from a volume with zero margins (`PaddedVolume`); the first weight is arranged to match.
- In bfloat16 (autocast), convolutions are; correlations, positions and the hidden state stay float32.

Most of what is left is convolution. docs/LOG.md has what did not pay. SEA-RAFT shares `PairWindows` and `MotionUpdate`.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.correlation_lookup import feature_pyramid, lookup_into
from kinema.kernels.correlation_lookup.padded_volume import PaddedVolume
from kinema.kernels.correlation_lookup.window import WindowOrder
from kinema.models.backbones.inference_conv import InferenceConv
from kinema.models.backbones.inference_linear import linear
from kinema.models.flow.raft.layers import ContextGRU, MotionEncoder, SmallMotionEncoder, SmallUpdateBlock, UpdateBlock


class PairWindows:
    """Correlation windows of one pair of float32 maps after another, all of one size.

    Args:
        height, width: of the maps.
        keep_volume: read windows from the volume of all products; otherwise form them at each step.
    """

    def __init__(self, height: int, width: int, radius: int, window_order: WindowOrder, keep_volume: bool) -> None:
        self.radius, self.window_order = radius, window_order
        self.volume = PaddedVolume(height, width, radius) if keep_volume else None

    def begin(self, fmap1: Float[Tensor, "1 C H W"], fmap2: Float[Tensor, "1 C H W"]) -> None:
        """The next pair."""
        if self.volume is not None:
            self.volume.fill(fmap1, fmap2, linear)
        else:
            fmap1 = fmap1.contiguous(memory_format=torch.channels_last)
            pooled = [p.contiguous(memory_format=torch.channels_last) for p in feature_pyramid(fmap2)]
            self._look = lookup_into(fmap1, pooled, self.radius, window_order=self.window_order)

    def lookup(self, target: Float[Tensor, "1 2 H W"]) -> Float[Tensor, "1 P H W"]:
        """Windows around these positions; which channel is which, only `arrange` knows."""
        return self._look(target) if self.volume is None else self.volume.lookup(target)

    def arrange(self, weight: Float[Tensor, "D Q 1 1"]) -> Float[Tensor, "D P 1 1"]:
        """The weight of a convolution over the network's own order of windows, for those of `lookup`."""
        return weight if self.volume is None else self.volume.arrange(weight, self.window_order)


class MotionUpdate:
    """`MotionEncoder` or RAFT-small's: windows and flow to motion features, without the flow behind them."""

    def __init__(self, encoder: MotionEncoder | SmallMotionEncoder, windows: PairWindows, dtype: torch.dtype) -> None:
        first = encoder.convc1
        bias = None if first.bias is None else first.bias.to(dtype)
        self.correlation = [InferenceConv(windows.arrange(first.weight).to(dtype), bias)]
        if isinstance(encoder, MotionEncoder):
            self.correlation.append(InferenceConv.of(encoder.convc2, dtype=dtype))
        self.flow = [InferenceConv.of(conv, dtype=dtype) for conv in (encoder.convf1, encoder.convf2)]
        self.motion = InferenceConv.of(encoder.conv, dtype=dtype)
        self.channels = encoder.conv.out_channels

    def __call__(self, windows: Float[Tensor, "1 P H W"], flow: Float[Tensor, "1 2 H W"]) -> Tensor:
        """[1, channels, H, W]."""
        correlation, motion = windows, flow
        for conv in self.correlation:
            correlation = conv.relu(correlation)
        for conv in self.flow:
            motion = conv.relu(motion)
        return self.motion.relu(torch.cat([correlation, motion], 1))


class PairRefiner:
    """Refines the flow of one pair after another, all of one size. Runs with autocast switched off.

    Args:
        block: whose weights are copied in the order that is fast.
        height, width: of the maps.
        keep_volume: see `PairWindows`.
        dtype: of the convolutions.
    """

    def __init__(
        self,
        block: UpdateBlock | SmallUpdateBlock,
        height: int,
        width: int,
        radius: int,
        window_order: WindowOrder,
        keep_volume: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.windows = PairWindows(height, width, radius, window_order, keep_volume)
        self.update = _Update(block, self.windows, height, width, dtype)

    def refine(
        self,
        fmap1: Float[Tensor, "1 C H W"],
        fmap2: Float[Tensor, "1 C H W"],
        context: Float[Tensor, "1 D H W"],
        start: Float[Tensor, "1 2 H W"],
        target: Float[Tensor, "1 2 H W"],
        iters: int,
    ) -> Iterator[tuple[Float[Tensor, "1 2 H W"], Float[Tensor, "1 E H W"]]]:
        """Flow in pixels of the map, and hidden state, after each step; the state is overwritten by the next.

        Args:
            context: raw output of the context network.
            start: pixel positions; `target`: where each is supposed to move at first.
        """
        self.windows.begin(fmap1, fmap2)
        self.update.begin(context)
        for _ in range(iters):
            target = target + self.update.step(self.windows.lookup(target), target - start)
            yield target - start, self.update.hidden


class _Update:
    """One refinement step. `hidden`, float32, is a part of the first GRU input where that is float32, too."""

    def __init__(
        self,
        block: UpdateBlock | SmallUpdateBlock,
        windows: PairWindows,
        height: int,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        self.hidden_channels, self.context_channels = block.hidden_channels, block.context_channels
        self.motion = MotionUpdate(block.encoder, windows, dtype)
        self.passes = [_Pass(block.gru, suffix, dtype) for suffix in block.gru.suffixes]
        self.head = [InferenceConv.of(conv, dtype=dtype) for conv in (block.flow_head.conv1, block.flow_head.conv2)]
        shape = (1, self.hidden_channels + self.motion.channels + 2, height, width)
        # [hidden, motion, flow] for the gates, and [reset hidden, motion, flow] for the candidate.
        self.inputs = tuple(torch.empty(shape, dtype=dtype, memory_format=torch.channels_last) for _ in range(2))
        self.hidden = self.inputs[0][:, : self.hidden_channels]
        if dtype != torch.float32:
            self.hidden = torch.empty(self.hidden.shape, memory_format=torch.channels_last)

    def begin(self, context: Tensor) -> None:
        """The hidden state and the context's share of the GRU, from the raw context."""
        hidden, context = context.split([self.hidden_channels, self.context_channels], dim=1)
        torch.tanh(hidden, out=self.hidden)
        context = torch.relu(context)
        for gru_pass in self.passes:
            gru_pass.begin(context)

    def step(self, windows: Tensor, flow: Tensor) -> Tensor:
        """The flow increment [1, 2, H, W]; the hidden state moves on."""
        motion = self.motion(windows, flow)
        for inputs in self.inputs:
            inputs[:, self.hidden_channels : -2].copy_(motion)
            inputs[:, -2:].copy_(flow)
        for gru_pass in self.passes:
            gru_pass.step(self.inputs, self.hidden)
        return self.head[1](self.head[0].relu(self.hidden)).float()


class _Pass:
    """One pass of the GRU: as `raft_layers.PreparedPass`, in place."""

    def __init__(self, gru: ContextGRU, suffix: str, dtype: torch.dtype) -> None:
        convs = [getattr(gru, f"conv{gate}{suffix}") for gate in "zrq"]
        first, last = gru.hidden_channels, gru.hidden_channels + gru.context_channels
        weight = torch.cat([conv.weight for conv in convs]).to(dtype)
        bias = torch.cat([conv.bias for conv in convs]).to(dtype)
        variable = torch.cat([weight[:, :first], weight[:, last:]], dim=1)
        padding = convs[0].padding
        self.channels = first
        self.context = InferenceConv(weight[:, first:last], bias, padding=padding)
        self.gates = InferenceConv(variable[: 2 * first], None, padding=padding)
        self.candidate = InferenceConv(variable[2 * first :], None, padding=padding)

    def begin(self, context: Tensor) -> None:
        shares = self.context(context).split([2 * self.channels, self.channels], dim=1)
        self.share_gates, self.share_candidate = (
            share.contiguous(memory_format=torch.channels_last) for share in shares
        )

    def step(self, inputs: tuple[Tensor, ...], hidden: Tensor) -> None:
        """Moves `hidden`, which is a part of the gates' input, the first of `inputs`, or is copied there."""
        gates_input, candidate_input = inputs
        if hidden.dtype != gates_input.dtype:
            gates_input[:, : self.channels].copy_(hidden)
        z, r = self.gates(gates_input).add_(self.share_gates).sigmoid_().split(self.channels, dim=1)
        torch.mul(r, gates_input[:, : self.channels], out=candidate_input[:, : self.channels])
        q = self.candidate(candidate_input).add_(self.share_candidate).tanh_()
        hidden.lerp_(q.type_as(hidden), z.type_as(hidden))
