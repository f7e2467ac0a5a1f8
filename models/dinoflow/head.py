"""DinoFlow's head: two fused feature maps to a motion signal, and the SDT trunk from there to flow.

The model card gives the head's parts and its size, 6.88 M parameters. Two readings of the front end have that size:
A, one convolution over features, correlations and difference (6,884,198), and B, two convolutions over correlations
and difference (6,884,710), which fits the card's wording better. A checkpoint's shapes say which of them it is.

Source: model card of blanchon/dinoflow-model; AnyDepth, arXiv:2601.02760. What the card leaves open is chosen here:
correlations as `kinema.kernels.local_correlation` scales them, the difference as frame 2 minus frame 1, a rectifier
behind every norm of the front end.

Shape legend: B batch, F fusion width, P correlations (81), h w patch grid, H W output.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kinema.kernels import local_correlation
from kinema.models.dinoflow.sdt import SDTHead, conv_norm_relu

READINGS = ("A", "B")
RADIUS = 4
NUM_CORRELATIONS = (2 * RADIUS + 1) ** 2


class MotionFrontEnd(nn.Sequential):
    """Features of both frames to one map of their motion: convolutions without bias, each normed and rectified."""

    def __init__(self, width: int, reading: str):
        if reading not in READINGS:
            raise ValueError(f"reading={reading!r} is not one of 'A', 'B'")
        width_in = NUM_CORRELATIONS + width * (2 if reading == "A" else 1)
        layers = conv_norm_relu(width_in, width, bias=False)
        if reading == "B":
            layers += conv_norm_relu(width, width, bias=False)
        super().__init__(*layers)
        self.reading = reading

    @torch.no_grad()
    def read_waves(self) -> None:
        """Begin with channels that see the correlations' sines and cosines over the displacements, in all directions.

        Where one displacement stands out, they tell how far it leads along each direction, whatever all correlations
        have in common; drawn as usual, sums over hundreds of them hide it, and one axis is learned without the other.
        """
        weight: Tensor = self[0].weight  # type: ignore[assignment]
        start, count = weight.shape[1] - weight.shape[0] - NUM_CORRELATIONS, weight.shape[0]
        places = torch.arange(-RADIUS, RADIUS + 1, dtype=weight.dtype, device=weight.device)
        y, x = torch.meshgrid(places, places, indexing="ij")
        number = torch.arange(count, device=weight.device)[:, None, None]
        angle, shift = math.pi * (number // 4) / math.ceil(count / 4), math.pi / 2 * (number % 2)
        period = (2 * RADIUS + 1) * torch.where(number % 4 < 2, 2.0, 1.0)
        waves = torch.cos(2 * math.pi * (x * angle.cos() + y * angle.sin()) / period - shift).flatten(1)
        correlations = slice(start, start + NUM_CORRELATIONS)
        weight[:, correlations] = 0.0
        weight[:, correlations, 1, 1] = waves - waves.mean(dim=1, keepdim=True)

    def forward(  # type: ignore[override]
        self, features1: Float[Tensor, "B F h w"], features2: Float[Tensor, "B F h w"]
    ) -> Float[Tensor, "B F h w"]:
        correlation = local_correlation(features1, features2, RADIUS).to(features1.dtype)
        signal = [correlation, features2 - features1]
        if self.reading == "A":
            signal.insert(0, features1)
        return super().forward(torch.cat(signal, dim=1))


class FlowHead(SDTHead):
    """All of DinoFlow that is trained.

    Args:
        in_channels: token width of each tap.
        fusion_channels, use_cls_token, factors: as for `SDTHead`.
        reading: of the front end; see the module.

    Loading a checkpoint turns the front end into the reading that its shapes show, and takes its front end under
    whatever names it has there; make optimizers after loading.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        fusion_channels: int = 256,
        use_cls_token: bool = True,
        factors: tuple[int, int] = (4, 4),
        reading: str = "B",
    ):
        super().__init__(in_channels, fusion_channels, 2, use_cls_token, factors)
        self.motion = MotionFrontEnd(fusion_channels, reading)
        self.register_load_state_dict_pre_hook(_adapt_before_loading)

    def flow(self, fused1: Float[Tensor, "B F h w"], fused2: Float[Tensor, "B F h w"]) -> Float[Tensor, "B 2 H W"]:
        """Flow from frame 1 to frame 2 out of what `fuse` gives for each; in pixels of the output, float32."""
        return self.decode(self.motion(fused1, fused2)).float()

    def adapt_state_dict(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Fit the front end to a checkpoint, and the checkpoint's names of it to ours, in place."""
        names = {name for name in self.state_dict() if not name.startswith("motion.")}
        foreign = [k for k in state if k.startswith(prefix) and k.removeprefix(prefix) not in names]
        convolutions = [state[k] for k in foreign if state[k].ndim == 4]
        width = self.detail_enhancer.norm.num_features
        reading = _reading_of(convolutions, width)
        if reading is None:
            return  # loading will report what does not fit
        if reading != self.motion.reading:
            where = next(self.motion.parameters())
            front_end = MotionFrontEnd(width, reading).to(where.device, where.dtype)
            self.motion = front_end.train(self.motion.training)
        ours = [f"motion.{name}" for name in self.motion.state_dict()]
        renamed = _in_order(foreign, state)
        if len(renamed) == len(ours):
            tensors = [state.pop(key) for key in renamed]
            state.update({prefix + name: tensor for name, tensor in zip(ours, tensors, strict=True)})


def _reading_of(convolutions: Sequence[Tensor], width: int) -> str | None:
    """The reading whose front end has convolutions of these shapes, in any order; None if neither has."""
    shapes = sorted(tuple(c.shape) for c in convolutions)
    for reading in READINGS:
        # On no device: only the shapes are wanted.
        with torch.device("meta"):
            wanted = [tuple(p.shape) for p in MotionFrontEnd(width, reading).parameters() if p.ndim == 4]
        if shapes == sorted(wanted):
            return reading
    return None


def _in_order(keys: Sequence[str], state: dict[str, Tensor]) -> list[str]:
    """Keys of a front end in the order of ours: layer by layer, within a norm as torch stores it."""
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def place(key: str) -> tuple[Any, ...]:
        layer, _, part = key.rpartition(".")
        numbers = [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in re.findall(r"\d+|\D+", layer)]
        return numbers, parts.index(part) if part in parts else len(parts)

    ordered = sorted(keys, key=place)
    convolutions = [k for k in ordered if state[k].ndim == 4]
    # The first convolution is the one with the wider input, whatever the layers are called.
    convolutions.sort(key=lambda k: -state[k].shape[1])
    norms = [k for k in ordered if state[k].ndim != 4]
    size = len(norms) // max(1, len(convolutions))
    return [k for i, c in enumerate(convolutions) for k in [c, *norms[i * size : (i + 1) * size]]]


def _adapt_before_loading(module: FlowHead, state: dict, prefix: str, *_) -> None:
    module.adapt_state_dict(state, prefix)
