"""FlowFeat's DAVIS protocol: a two-layer pixel-wise classifier fitted to the first frame's mask.

Source: Araslanov, Sonnweber, Cremers, FlowFeat, NeurIPS 2025, evaluation: 1x1 convolutions C -> C ->
labels with a ReLU between, Adam 300 steps, learning rate 5e-3, weight decay 5e-4. Deviation: the number of
labels is that of the first annotation, not of the whole sequence.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from kinema.pipelines.evaluate.davis_folder import DavisSequence
from kinema.pipelines.evaluate.probe_fitting import ProbeFit, segment_by_probe


class PixelMLP(nn.Module):
    """Two linear layers at every pixel."""

    def __init__(self, channels: int, num_labels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, num_labels)
        )

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K H W"]:
        """Logits of every label."""
        return self.layers(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def segment_by_mlp(
    features: Callable[[Tensor], Float[Tensor, "C h w"]],
    sequence: DavisSequence,
    fit: ProbeFit | None = None,
) -> tuple[UInt8[np.ndarray, "T H W"], UInt8[np.ndarray, "T H W"]]:
    """Masks of every frame of a sequence, and its annotations, both in the view of `fit.crop_px`.

    Args: features gets a frame [3, H, W] in 0..1 (a 224 px square by default).
    """

    def read_features(frame: Tensor) -> tuple[Tensor]:
        # Channels last in memory: the probe's linear layers read one pixel's channels at a stretch.
        return (features(frame).detach().float().permute(1, 2, 0).contiguous().permute(2, 0, 1)[None],)

    def build_probe(inputs: tuple[Tensor, ...], num_labels: int) -> nn.Module:
        return PixelMLP(inputs[0].shape[1], num_labels)

    return segment_by_probe(read_features, build_probe, sequence, fit or ProbeFit())
