"""FlowFeat's DAVIS protocol: a two-layer pixel-wise classifier fitted to the first frame's mask.

Source: Araslanov, Sonnweber, Cremers, FlowFeat, NeurIPS 2025, evaluation: 1x1 convolutions C -> C ->
labels with a ReLU between, Adam 300 steps, learning rate 5e-3, weight decay 5e-4. Deviation: the number of
labels is that of the first annotation, not of the whole sequence.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from kinema.pipelines.evaluate.davis.folder import DavisSequence
from kinema.pipelines.evaluate.probes.fitting import ProbeFit, segment_by_probe


def segment_by_mlp(
    features: Callable[[Tensor], Float[Tensor, "C h w"]],
    sequence: DavisSequence,
    fit: ProbeFit | None = None,
) -> tuple[UInt8[np.ndarray, "T H W"], UInt8[np.ndarray, "T H W"]]:
    """Masks of every frame of a sequence, and its annotations, both in the view of `fit.crop_px`.

    Args: features gets a frame [3, H, W] in 0..1 (a 224 px square by default).
    """

    def read_features(frame: Tensor) -> tuple[Tensor]:
        return (features(frame).detach().float().contiguous()[None],)

    def build_probe(inputs: tuple[Tensor, ...], num_labels: int) -> nn.Module:
        channels = inputs[0].shape[1]
        return nn.Sequential(
            nn.Conv2d(channels, channels, 1), nn.ReLU(inplace=True), nn.Conv2d(channels, num_labels, 1)
        )

    return segment_by_probe(read_features, build_probe, sequence, fit or ProbeFit())
