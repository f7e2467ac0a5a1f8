"""The attention probe on DAVIS: fitted to the first frame's mask, read out on every frame."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from kinema.models.flowfeat.probe import AttentionProbe
from kinema.pipelines.evaluate.davis.folder import DavisSequence
from kinema.pipelines.evaluate.probes.fitting import ProbeFit, segment_by_probe


def segment_by_attention(
    features: Callable[[Tensor], tuple[Float[Tensor, "D h w"], Float[Tensor, "C H W"]]],
    sequence: DavisSequence,
    fit: ProbeFit | None = None,
    with_norm: bool = True,
    downscale: int = 1,
) -> tuple[UInt8[np.ndarray, "T H W"], UInt8[np.ndarray, "T H W"]]:
    """Masks of every frame of a sequence, and its annotations, both in the view of `fit.crop_px`.

    Args:
        features: frame [3, H, W] in 0..1 to (y_enc, y_dec), the coarse and the fine map.
        with_norm, downscale: as in `kinema.models.flowfeat.probe.AttentionProbe`.
    """

    def read_features(frame: Tensor) -> tuple[Tensor, Tensor]:
        coarse, fine = features(frame)
        return coarse.detach().float()[None], fine.detach().float()[None]

    def build_probe(inputs: tuple[Tensor, ...], num_labels: int) -> nn.Module:
        coarse, fine = inputs
        return AttentionProbe(coarse.shape[1], fine.shape[1], num_labels, with_norm, downscale)

    return segment_by_probe(read_features, build_probe, sequence, fit or ProbeFit())
