"""Colour and occlusion: what changes frames and leaves their flow alone."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from kinema.configs.models.flow_augmentation import FlowAugmentationConfig
from kinema.pipelines.train.flow_augmentation.pair import KnownPair

_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def recoloured(
    pair: KnownPair, config: FlowAugmentationConfig, rng: np.random.Generator, alike: bool = False
) -> KnownPair:
    """Brightness, contrast, saturation and hue changed in a drawn order; each frame its own way, unless `alike`,
    with the configured probability."""
    if rng.random() < config.asymmetric_prob and not alike:
        image1, image2 = jitter(pair.image1, config, rng), jitter(pair.image2, config, rng)
    else:
        # Side by side they share every draw, and the mean that contrast is measured from.
        both = jitter(np.concatenate([pair.image1, pair.image2]), config, rng)
        image1, image2 = both[: pair.size[0]], both[pair.size[0] :]
    return replace(pair, image1=image1, image2=image2)


def jitter(
    image: UInt8[np.ndarray, "H W 3"], config: FlowAugmentationConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """One draw of brightness, contrast, saturation and hue."""
    brightness, contrast, saturation = (
        np.float32(rng.uniform(1 - reach, 1 + reach))
        for reach in (config.brightness, config.contrast, config.saturation)
    )
    turn = rng.uniform(-config.hue, config.hue)
    colours: Float32[np.ndarray, "H W 3"] = image.astype(np.float32) / 255
    for change in rng.permutation(4):
        if change == 0:
            colours = colours * brightness
        elif change == 1:
            mean = (colours @ _GREY).mean(dtype=np.float64).astype(np.float32)
            colours = mean + (colours - mean) * contrast
        elif change == 2:
            grey = (colours @ _GREY)[..., None]
            colours = grey + (colours - grey) * saturation
        elif turn:
            hsv = cv2.cvtColor(colours, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0] + np.float32(360 * turn)) % 360
            colours = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        colours = np.clip(colours, 0, 1)
    return np.rint(colours * 255).astype(np.uint8)


def erased(pair: KnownPair, config: FlowAugmentationConfig, rng: np.random.Generator) -> KnownPair:
    """One or two rectangles of the second frame in its mean colour, with the configured probability."""
    if rng.random() >= config.eraser_prob:
        return pair
    image2 = pair.image2.copy()
    mean = image2.reshape(-1, 3).mean(axis=0)
    shortest, longest = config.eraser_px
    for _ in range(int(rng.integers(1, 3))):
        top, left = (int(rng.integers(0, side)) for side in pair.size)
        height, width = (int(rng.integers(shortest, longest + 1)) for _ in range(2))
        image2[top : top + height, left : left + width] = np.rint(mean)
    return replace(pair, image2=image2)
