"""RAFT's augmentation of a pair of frames with known flow; all randomness comes from the generator it is given.

Order and ranges follow the published training code of Teed and Deng (arXiv:2003.12039); what differs: pixels whose
flow would be a blend of known and unknown, or lie outside the known ones' centres, become unknown instead.
"""

from __future__ import annotations

import numpy as np

from kinema.configs.models.flow_augmentation import FlowAugmentationConfig, Variant
from kinema.pipelines.train.flow_augmentation import photometric, spatial
from kinema.pipelines.train.flow_augmentation.pair import KnownPair

__all__ = ["FlowAugmentationConfig", "KnownPair", "augment"]


def augment(
    pair: KnownPair,
    variant: Variant,
    config: FlowAugmentationConfig,
    crop: tuple[int, int],
    rng: np.random.Generator,
) -> KnownPair:
    """The pair as it is learned from, `crop` = (height, width) large.

    Args: variant, off (a random crop alone), dense or sparse; see kinema.configs.models.flow_augmentation.
    Raises: ValueError where "off" meets a pair smaller than the crop; the others enlarge it.
    """
    if variant == "off":
        return spatial.randomly_cropped(pair, crop, rng)
    pair = photometric.recoloured(pair, config, rng, alike=variant == "sparse")
    pair = photometric.erased(pair, config, rng)
    pair = spatial.rescaled(pair, config, crop, rng, sparse=variant == "sparse")
    pair = spatial.flipped(pair, config, rng)
    return spatial.randomly_cropped(pair, crop, rng, spatial.SPARSE_MARGINS if variant == "sparse" else (0, 0))
