"""What the fitted probes share: the view of a frame they work on, and the fit to the first annotation.

Source: FlowFeat's DAVIS evaluation: frames and masks with the shorter side resized to 224 and cut to a
centre square; 300 full-batch Adam steps of cross-entropy on frame 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from kinema.pipelines.evaluate.davis.folder import VOID, DavisSequence


@dataclass(frozen=True)
class ProbeFit:
    """How a probe is fitted to the first annotation; the defaults are the published ones."""

    num_steps: int = 300
    """Adam steps, each over every pixel of the feature map."""
    learning_rate: float = 5e-3
    """Adam's step size."""
    weight_decay: float = 5e-4
    """Adam's L2 penalty."""
    seed: int = 0
    """Seed of the probe's first weights."""
    crop_px: int | None = 224
    """Side of the centre square that is seen and scored; None takes whole frames at their own size."""


def segment_by_probe(
    read_features: Callable[[Tensor], tuple[Tensor, ...]],
    build_probe: Callable[[tuple[Tensor, ...], int], nn.Module],
    sequence: DavisSequence,
    fit: ProbeFit,
) -> tuple[UInt8[np.ndarray, "T H W"], UInt8[np.ndarray, "T H W"]]:
    """Masks of every frame by a probe fitted to the first, and the annotations, both in the probe's view.

    Args:
        read_features: frame [3, H, W] in 0..1 to the probe's inputs, each with a batch axis.
        build_probe: from the first frame's inputs and the number of labels.
    """
    annotated = np.stack([view_labels(mask, fit.crop_px) for mask in sequence.labels()])
    size = annotated.shape[1:]
    probe, predicted = None, []
    for path in sequence.frames:
        with torch.no_grad():
            inputs = read_features(read_view(path, fit.crop_px))
            # Features made in inference mode cannot be trained on; a copy can.
            inputs = tuple(value.clone() if value.is_inference() else value for value in inputs)
        if probe is None:
            probe = _fitted(build_probe, inputs, annotated[0], fit)
        with torch.no_grad():
            logits = F.interpolate(probe(*inputs), size=size, mode="bilinear", align_corners=False)
        predicted.append(logits[0].argmax(0).byte().cpu().numpy())
    return np.stack(predicted), annotated


def read_view(path: Path, crop_px: int | None) -> Float[Tensor, "3 H W"]:
    """A frame in 0..1, cut to the centre square of the given side if there is one."""
    with Image.open(path) as picture:
        view = _centre_square(picture.convert("RGB"), crop_px, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(view)).permute(2, 0, 1).float() / 255


def view_labels(labels: UInt8[np.ndarray, "H W"], crop_px: int | None) -> UInt8[np.ndarray, "h w"]:
    """A label map in the same view, nearest."""
    return np.array(_centre_square(Image.fromarray(labels), crop_px, Image.Resampling.NEAREST))


def _centre_square(picture: Image.Image, side: int | None, resample: Image.Resampling) -> Image.Image:
    if side is None:
        return picture
    width, height = picture.size
    if width <= height:
        picture = picture.resize((side, int(side * height / width)), resample)
    else:
        picture = picture.resize((int(side * width / height), side), resample)
    left, top = round((picture.width - side) / 2), round((picture.height - side) / 2)
    return picture.crop((left, top, left + side, top + side))


def _fitted(
    build_probe: Callable[[tuple[Tensor, ...], int], nn.Module],
    inputs: tuple[Tensor, ...],
    labels: UInt8[np.ndarray, "H W"],
    fit: ProbeFit,
) -> nn.Module:
    num_labels = int(np.where(labels == VOID, 0, labels).max()) + 1
    finest = inputs[-1]
    target = F.interpolate(torch.from_numpy(labels)[None, None].float(), size=finest.shape[-2:], mode="nearest-exact")[
        0
    ].long()  # [1, h, w]
    target = target.to(finest.device)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(fit.seed)
        probe = build_probe(inputs, num_labels).to(finest.device)
        optimizer = torch.optim.Adam(probe.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
        for _ in range(fit.num_steps):
            optimizer.zero_grad()
            F.cross_entropy(probe(*inputs), target, ignore_index=VOID).backward()
            optimizer.step()
    return probe.eval()
