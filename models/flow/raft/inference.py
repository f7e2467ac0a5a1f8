"""RAFT's refinement without gradient on a CPU: the same arithmetic as `raft_layers`, arranged for speed.

- All maps stay channels-last, which oneDNN's convolutions want; activations happen in place.
- The inputs of the GRU's convolutions, [hidden, motion], are parts of one map each and written there, not joined.
- Pairs go one after another: the maps of one pair fit in a core's cache, and the memory of its volume is reused.
- Windows are read from a volume with zero margins (`PaddedVolume`); the first weight is arranged to match.

Most of what is left is convolution. docs/LOG.md has what did not pay.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinema.kernels.correlation_lookup import feature_pyramid, lookup_into
from kinema.kernels.correlation_lookup.padded_volume import PaddedVolume
from kinema.kernels.correlation_lookup.window import WindowOrder
from kinema.models.backbones.inference_linear import linear
from kinema.models.flow.raft.layers import ContextGRU, SmallUpdateBlock, UpdateBlock


def can_refine(fmap: Tensor) -> bool:
    """Whether `PairRefiner` may stand in for the layers: float32 on a CPU, nothing recorded or compiled."""
    return (
        fmap.device.type == "cpu"
        and fmap.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


class PairRefiner:
    """Refines the flow of one pair after another, all of one size.

    Args:
        block: whose weights are copied in the order that is fast.
        height, width: of the maps.
        keep_volume: read windows from the volume of all products; otherwise form them at each step.
    """

    def __init__(
        self,
        block: UpdateBlock | SmallUpdateBlock,
        height: int,
        width: int,
        radius: int,
        window_order: WindowOrder,
        keep_volume: bool,
    ) -> None:
        self.block, self.radius, self.window_order = block, radius, window_order
        self.volume = PaddedVolume(height, width, radius) if keep_volume else None
        self.update = _Update(block, height, width)
        if self.volume is not None:
            self.update.arrange_windows(self.volume, window_order)

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
        if self.volume is not None:
            self.volume.fill(fmap1, fmap2, linear)
        else:
            fmap1 = fmap1.contiguous(memory_format=torch.channels_last)
            pooled = [p.contiguous(memory_format=torch.channels_last) for p in feature_pyramid(fmap2)]
            look = lookup_into(fmap1, pooled, self.radius, window_order=self.window_order)
        self.update.begin(context)
        for _ in range(iters):
            if self.volume is not None:
                windows = self.volume.lookup(target)
            else:
                windows = look(target)
            target = target + self.update.step(windows, target - start)
            yield target - start, self.update.hidden


class _Conv:
    """A convolution with its weight in channels-last order."""

    def __init__(self, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...] | str) -> None:
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias, self.padding = bias, padding

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "_Conv":
        return cls(conv.weight, conv.bias, conv.padding)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def relu(self, x: Tensor) -> Tensor:
        return self(x).relu_()


class _Update:
    """One refinement step; the hidden state lives in `hidden`, a part of the first GRU input."""

    def __init__(self, block: UpdateBlock | SmallUpdateBlock, height: int, width: int) -> None:
        encoder, gru = block.encoder, block.gru
        self.hidden_channels, self.context_channels = block.hidden_channels, block.context_channels
        self.correlation = [_Conv.of(encoder.convc1)]
        if isinstance(block, UpdateBlock):
            self.correlation.append(_Conv.of(block.encoder.convc2))
        self.flow = [_Conv.of(encoder.convf1), _Conv.of(encoder.convf2)]
        self.motion = _Conv.of(encoder.conv)
        self.passes = [_Pass(gru, suffix) for suffix in gru.suffixes]
        self.head = [_Conv.of(block.flow_head.conv1), _Conv.of(block.flow_head.conv2)]
        shape = (1, self.hidden_channels + encoder.conv.out_channels + 2, height, width)
        # [hidden, motion, flow] for the gates, and [reset hidden, motion, flow] for the candidate.
        self.inputs = tuple(torch.empty(shape, memory_format=torch.channels_last) for _ in range(2))
        self.hidden = self.inputs[0][:, : self.hidden_channels]

    def arrange_windows(self, volume: PaddedVolume, window_order: WindowOrder) -> None:
        """Expect the windows as `volume` gives them."""
        first = self.correlation[0]
        first.weight = volume.arrange(first.weight, window_order)

    def begin(self, context: Tensor) -> None:
        """The hidden state and the context's share of the GRU, from the raw context."""
        hidden, context = context.split([self.hidden_channels, self.context_channels], dim=1)
        torch.tanh(hidden, out=self.hidden)
        context = torch.relu(context).contiguous(memory_format=torch.channels_last)
        for gru_pass in self.passes:
            gru_pass.begin(context)

    def step(self, windows: Tensor, flow: Tensor) -> Tensor:
        """The flow increment [1, 2, H, W]; the hidden state moves on."""
        correlation, motion = windows, flow.contiguous(memory_format=torch.channels_last)
        for conv in self.correlation:
            correlation = conv.relu(correlation)
        for conv in self.flow:
            motion = conv.relu(motion)
        motion = self.motion.relu(torch.cat([correlation, motion], 1))
        for inputs in self.inputs:
            inputs[:, self.hidden_channels : -2].copy_(motion)
            inputs[:, -2:].copy_(flow)
        for gru_pass in self.passes:
            gru_pass.step(self.inputs, self.hidden)
        hidden = self.hidden.contiguous(memory_format=torch.channels_last)
        return self.head[1](self.head[0].relu(hidden))


class _Pass:
    """One pass of the GRU: as `raft_layers.PreparedPass`, in place."""

    def __init__(self, gru: ContextGRU, suffix: str) -> None:
        convs = [getattr(gru, f"conv{gate}{suffix}") for gate in "zrq"]
        first, last = gru.hidden_channels, gru.hidden_channels + gru.context_channels
        weight, bias = torch.cat([conv.weight for conv in convs]), torch.cat([conv.bias for conv in convs])
        variable = torch.cat([weight[:, :first], weight[:, last:]], dim=1)
        padding = convs[0].padding
        self.channels = first
        self.context = _Conv(weight[:, first:last], bias, padding)
        self.gates = _Conv(variable[: 2 * first], None, padding)
        self.candidate = _Conv(variable[2 * first :], None, padding)

    def begin(self, context: Tensor) -> None:
        shares = self.context(context).split([2 * self.channels, self.channels], dim=1)
        self.share_gates, self.share_candidate = (
            share.contiguous(memory_format=torch.channels_last) for share in shares
        )

    def step(self, inputs: tuple[Tensor, ...], hidden: Tensor) -> None:
        """Moves `hidden`, which is a part of the gates' input, the first of `inputs`."""
        gates_input, candidate_input = inputs
        z, r = self.gates(gates_input).add_(self.share_gates).sigmoid_().split(self.channels, dim=1)
        torch.mul(r, hidden, out=candidate_input[:, : self.channels])
        q = self.candidate(candidate_input).add_(self.share_candidate).tanh_()
        hidden.lerp_(q, z)
