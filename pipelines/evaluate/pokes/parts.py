"""`evaluate` of moving-part segmentation: what a poke tells about the motion of every other point.

A point belongs to the part that a poke moves when the poke changes what its motion is expected to be: when the
divergence KL(p(motion | poke) || p(motion)) in nats is at least a threshold. The threshold is given, or is the one with
the best mean IoU on the tuning images, and is then applied to the others.
Source: Baumann et al., arXiv:2510.12777, section 4.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8

from kinema.models.backbones.rotary_layers import cell_centres
from kinema.models.fpt.data_rules import frame_to_image
from kinema.pipelines.evaluate.pokes.measures import average_precision, iou_by_threshold
from kinema.pipelines.evaluate.pokes.scores import PokeModel, stable_seed

Split = Literal["tune", "test"]
THRESHOLDS_NATS = tuple(float(x) for x in np.geomspace(1e-6, 1e3, 181))
"""Thresholds that tuning chooses from."""


@dataclass(frozen=True)
class PartPoke:
    """A poke, and the part that it moves."""

    pos: tuple[float, float]
    """(x, y) in 0..1 of the central square."""
    flow: tuple[float, float]
    """Its motion in the same unit."""
    mask: Bool[np.ndarray, "S S"]
    """The part, in the pixels of the central square of the image."""


@dataclass(frozen=True)
class PartImage:
    """An image and pokes on it."""

    name: str
    """What random draws depend on, besides the seed."""
    frame: UInt8[np.ndarray, "H W 3"]
    pokes: tuple[PartPoke, ...]
    camera_static: bool = True
    split: Split | None = None
    """None: images are tuned on and tested on in turn."""


@dataclass(frozen=True)
class PartResult:
    """What a poke gave."""

    image: str
    poke: int
    """Number of the poke on its image."""
    split: Split
    part_share: float
    """Share of the square that the part covers: the IoU of calling everything moving."""
    average_precision: float
    """Area under the precision-recall curve of the divergence; needs no threshold."""
    iou: np.ndarray
    """IoU at each of the thresholds."""


@dataclass(frozen=True)
class PartScores:
    """Moving-part segmentation over all pokes; every poke weighs the same."""

    threshold_nats: float
    """The threshold of all masks."""
    thresholds_nats: tuple[float, ...]
    """Thresholds at which IoU is known."""
    results: list[PartResult]

    def at(self, result: PartResult) -> float:
        """IoU of a poke at the threshold."""
        return float(result.iou[self.thresholds_nats.index(self.threshold_nats)])

    def of(self, split: Split) -> list[PartResult]:
        """Results on the images of a split."""
        return [result for result in self.results if result.split == split]

    def curve(self, split: Split) -> Float[np.ndarray, "t"]:
        """Mean IoU of a split at each threshold."""
        return np.mean([result.iou for result in self.of(split)], axis=0)

    def flat(self) -> dict[str, float]:
        """One number per measure, of the test images."""
        test = self.of("test")
        return {
            "miou": float(np.mean([self.at(result) for result in test])),
            "threshold_nats": self.threshold_nats,
            "best_threshold_miou": float(self.curve("test").max()),
            "average_precision": float(np.mean([result.average_precision for result in test])),
            "everything_miou": float(np.mean([result.part_share for result in test])),
            "pokes": float(len(test)),
            "images": float(len({result.image for result in test})),
        }


@torch.no_grad()
def poke_information(
    model: PokeModel,
    image: PartImage,
    *,
    grid: int = 48,
    batch_size: int = 8,
    seed: int = 0,
    image_px: int = 512,
    device: str | torch.device = "cpu",
) -> Float[np.ndarray, "pokes grid grid"]:
    """Divergence in nats of the predicted motion with each poke from that without any, at cell centres of the square.

    The image is embedded and projected once; its pokes are predicted in batches. Random draws depend on `seed`, the
    image's name and the poke's number only. Estimates that come out below 0 are 0.
    """
    d_img = model.project_image(model.embed_image(frame_to_image(image.frame, image_px)[None].to(device)))
    points = cell_centres(grid, grid, device=torch.device(device)).flatten(0, 1)[None]
    nothing = points.new_zeros(1, 0, 2)
    before = model.predict_parallel(nothing, nothing, points, image.camera_static, d_img).to("cpu", torch.float64)
    maps = []
    for start in range(0, len(image.pokes), batch_size):
        pokes = image.pokes[start : start + batch_size]
        pos, flow = (
            torch.tensor([getattr(poke, name) for poke in pokes], dtype=torch.float32, device=device)[:, None]
            for name in ("pos", "flow")
        )
        queries = points.expand(len(pokes), -1, -1)
        after = model.predict_parallel(pos, flow, queries, image.camera_static, d_img).to("cpu", torch.float64)
        for number in range(len(pokes)):
            generator = torch.Generator().manual_seed(stable_seed(seed, image.name, start + number))
            divergence = after[number].kl_divergence(before[0], generator=generator)
            maps.append(divergence.clamp_min(0).view(grid, grid).numpy())
    return np.stack(maps)


def at_pixels(information: Float[np.ndarray, "g g"], side: int) -> Float[np.ndarray, "S S"]:
    """A map of nats at the pixels of the square, interpolated in the logarithm of 1 + nats, whose range is smaller."""
    logs = torch.from_numpy(np.log1p(information))[None, None]
    return torch.expm1(F.interpolate(logs, (side, side), mode="bilinear"))[0, 0].numpy()


def evaluate_parts(
    model: PokeModel,
    images: Iterable[PartImage],
    *,
    threshold_nats: float = 0.0,
    grid: int = 48,
    batch_size: int = 8,
    seed: int = 0,
    image_px: int = 512,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
    look: Callable[[PartImage, Split, np.ndarray], None] | None = None,
) -> PartScores:
    """Segment the part that each poke moves, and compare with its mask.

    Args: threshold_nats, 0 to choose it on the tuning images. progress is called with the number of images done, look
        with every image, its split and its maps of nats [pokes, grid, grid].
    Raises: ValueError if a mask is empty or not of the square's size, or a split that is needed has no image.
    """
    thresholds = (*THRESHOLDS_NATS, threshold_nats) if threshold_nats else THRESHOLDS_NATS
    thresholds = tuple(sorted(set(thresholds)))
    results: list[PartResult] = []
    for done, image in enumerate(images, 1):
        split: Split = image.split or ("test" if threshold_nats or done % 2 == 0 else "tune")
        maps = poke_information(
            model, image, grid=grid, batch_size=batch_size, seed=seed, image_px=image_px, device=device
        )
        for number, (poke, information) in enumerate(zip(image.pokes, maps, strict=True)):
            _check_mask(image, number, poke.mask)
            shown = at_pixels(information, len(poke.mask))
            iou = iou_by_threshold(shown, poke.mask, np.array(thresholds))
            precision = average_precision(shown, poke.mask)
            results.append(PartResult(image.name, number, split, float(poke.mask.mean()), precision, iou))
        if look is not None:
            look(image, split, maps)
        if progress is not None:
            progress(done)
    _check_splits(results, tuning=not threshold_nats)
    if not threshold_nats:
        tuned = np.mean([result.iou for result in results if result.split == "tune"], axis=0)
        threshold_nats = _middle_of_best(tuned, thresholds)
    return PartScores(threshold_nats, thresholds, results)


def _middle_of_best(curve: np.ndarray, thresholds: Sequence[float]) -> float:
    """The threshold of the highest value; in the middle of its plateau, which is the least chance-like."""
    best = np.flatnonzero(curve >= curve.max() - 1e-12)
    return thresholds[int(best[len(best) // 2])]


def _check_mask(image: PartImage, number: int, mask: np.ndarray) -> None:
    side = min(image.frame.shape[:2])
    if mask.shape != (side, side):
        raise ValueError(f"{image.name}: mask {number} is {list(mask.shape)}, the central square is {side} x {side}")
    if not mask.any():
        raise ValueError(f"{image.name}: mask {number} is empty in the central square, which is all the model sees")


def _check_splits(results: Sequence[PartResult], tuning: bool) -> None:
    if not any(result.split == "test" for result in results):
        raise ValueError("no image to test on; give at least two images, or the threshold: pokes.threshold_nats=")
    if tuning and not any(result.split == "tune" for result in results):
        raise ValueError("no image to choose the threshold on; mark some as tune, or give pokes.threshold_nats=")
