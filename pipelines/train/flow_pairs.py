"""Pairs with stored flow, as the flow networks' recipes read them from a clip."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from kinema.pipelines.loader import Clip, Skip
from kinema.pipelines.pictures.images import flow_picture, panel
from kinema.pipelines.train.flow_augmentation import KnownPair
from kinema.pipelines.train.recipes.protocol import Batch

PICTURE_SAMPLES = 4
NOTHING_KNOWN = Skip("no pixel with known flow in the crop")


def stored_pair(clip: Clip, rng: np.random.Generator, gap: int, visible_only: bool, section: str) -> KnownPair | Skip:
    """One of the stored pairs over at most `gap` frames, its frames at the size of the stored flow.

    Args: visible_only, let pixels that the stored occlusion calls hidden count as unknown; section, whose setting a
        skip names.
    """
    pairs = [(t, distance) for t, distance in clip.flow_pairs if abs(distance) <= gap]
    if not pairs:
        return Skip(f"no flow pair over at most {section}.gap={gap} frames: raise it")
    t, distance = pairs[int(rng.integers(len(pairs)))]
    stored = clip.flow_pair(t, distance)
    valid = None
    if visible_only and stored.occlusion is not None:
        valid = ~stored.occlusion
    size = clip.flow_size[::-1]
    frames = [np.ascontiguousarray(frame) for frame in clip.frames([t, t + distance])]
    if frames[0].shape[1::-1] != size:
        frames = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]
    return KnownPair.of(frames[0], frames[1], stored.flow_px, valid)


def as_tensors(pair: KnownPair) -> dict[str, Tensor]:
    """image1, image2 uint8 [3, h, w], flow_px float32 [2, h, w] and valid [h, w]."""
    return {
        "image1": _planar(pair.image1),
        "image2": _planar(pair.image2),
        "flow_px": torch.from_numpy(np.ascontiguousarray(pair.flow_px)),
        "valid": torch.from_numpy(np.ascontiguousarray(pair.valid)).float(),
    }


def flow_pictures(network: nn.Module, batch: Batch, iters: int | None = None) -> dict[str, np.ndarray]:
    """Rows of frame, known flow (where there is one) and predicted flow, of a batch of `as_tensors`."""
    images = [batch[name][:PICTURE_SAMPLES].float() / 255 for name in ("image1", "image2")]
    was_training = network.training
    with torch.no_grad():
        predicted = network.eval()(*images, iters=iters)
    network.train(was_training)
    shown: list[np.ndarray] = []
    for i, flow in enumerate(predicted):
        known = batch["flow_px"][i] if "flow_px" in batch else None
        longest = float((flow if known is None else known).norm(dim=0).max())
        shown.append((images[0][i] * 255).round().byte().permute(1, 2, 0).cpu().numpy())
        shown += [] if known is None else [flow_picture(known, longest)]
        shown.append(flow_picture(flow, longest))
    name = "input_teacher_prediction" if "flow_px" in batch else "input_prediction"
    return {name: panel(shown, columns=name.count("_") + 1)}


def _planar(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rearrange(image, "h w c -> c h w")))
