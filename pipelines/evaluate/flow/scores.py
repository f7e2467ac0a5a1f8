"""`evaluate` for flow networks: Sintel, KITTI and Middlebury folders in, one number per measure out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kinema.pipelines.evaluate.flow.metrics import FlowErrors
from kinema.pipelines.sidecars.flow_files import read_flow

Benchmark = Literal["sintel", "kitti", "middlebury"]
SINTEL_PASSES = ("clean", "final")


@dataclass(frozen=True)
class FlowSample:
    """Files of one pair with ground truth."""

    group: str
    """What the pair is averaged with: "clean" or "final" for Sintel, otherwise the benchmark."""
    name: str
    """Name for progress and messages."""
    image1: Path
    """First frame."""
    image2: Path
    """Second frame."""
    flow: Path
    """Ground truth."""
    invalid: Path | None = None
    """Sintel's mask of pixels without trustworthy ground truth."""
    occlusion: Path | None = None
    """Sintel's mask of pixels that the second frame does not show."""


def evaluate_flow(
    network: nn.Module,
    benchmark_root: str | Path,
    benchmark: Benchmark = "sintel",
    iters: int | None = None,
    use_invalid: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:
    """Errors of a flow network on a benchmark's training folder.

    Args:
        network: `network(image1, image2, iters) -> [B, 2, H, W]` in pixels, images [B, 3, H, W] in 0..1;
            run on the device of its parameters. A network with selectable padding gets the benchmark's.
        benchmark_root: the folder as published (or its `training` folder), or one flat folder of a few
            pairs; see `find_samples`.
        iters: refinements; by default those the network's paper used on this benchmark
            (`network.benchmark_iters`), or the network's own default.
        use_invalid: leave out Sintel's invalid pixels; published figures count every pixel.
        progress: called with (done, total, name) after every pair.

    Returns: Sintel: `clean_epe`, `clean_px1` ..., `final_epe` ...; KITTI: `epe`, `fl_all` (percent);
        Middlebury: `epe`, `px1`, `px3`, `px5`. Errors in pixels, px1 the share of pixels below 1 px.
    Raises: ValueError for an unknown benchmark or a folder without its files.
    """
    samples = find_samples(benchmark_root, benchmark)
    if iters is None:
        iters = getattr(network, "benchmark_iters", {}).get(benchmark)
    groups: dict[str, FlowErrors] = {}
    with _evaluation_mode(network, "kitti" if benchmark == "kitti" else "sintel"):
        for done, sample in enumerate(samples, 1):
            flow = _predict(network, sample, iters)
            flow_gt, occluded = _ground_truth(sample, use_invalid)
            if flow.shape != flow_gt.shape:
                raise ValueError(
                    f"{sample.name}: ground truth is {list(flow_gt.shape[1:])}, images {list(flow.shape[1:])}"
                )
            groups.setdefault(sample.group, FlowErrors()).add(flow, flow_gt, occluded=occluded)
            if progress is not None:
                progress(done, len(samples), sample.name)
    if benchmark == "sintel":
        return {f"{group}_{k}": v for group, errors in groups.items() for k, v in errors.sintel().items()}
    return getattr(groups[benchmark], benchmark)()


def find_samples(benchmark_root: str | Path, benchmark: Benchmark) -> list[FlowSample]:
    """All pairs with ground truth in a benchmark's folder, sorted.

    Layouts: Sintel `flow/SCENE/frame_0001.flo` beside `clean` and/or `final` (and `invalid`,
    `occlusions`); KITTI `image_2/000000_10.png`, `_11.png` and `flow_occ/000000_10.png`; Middlebury
    `other-data/NAME/frame10.png`, `frame11.png` and `other-gt-flow/NAME/flow10.flo`. Single pairs:
    KITTI `frame1.png`, `frame2.png`, `flow_gt.png`; Middlebury `NAME1.png`, `NAME2.png`,
    `NAME_flow10.flo`.

    Raises: ValueError that says what was looked for and what is there.
    """
    finders = {"sintel": _sintel, "kitti": _kitti, "middlebury": _middlebury}
    if benchmark not in finders:
        raise ValueError(f"benchmark={benchmark!r} is not one of {', '.join(finders)}")
    root = Path(benchmark_root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; benchmark={benchmark} needs the data set's folder")
    base = root / "training" if (root / "training").is_dir() else root
    samples, wanted = finders[benchmark](base)
    if not samples:
        found = ", ".join(sorted(p.name for p in base.iterdir())[:8]) or "nothing"
        raise ValueError(f"{base}: no {benchmark} ground truth ({wanted}); found {found}")
    for sample in samples:
        for path in (sample.image1, sample.image2):
            if not path.is_file():
                raise ValueError(f"{path}: the frame for ground truth {sample.flow} is missing")
    return samples


def _sintel(base: Path) -> tuple[list[FlowSample], str]:
    samples = []
    for group in (p for p in SINTEL_PASSES if (base / p).is_dir()):
        for flow in sorted((base / "flow").glob("*/frame_*.flo")):
            scene, number = flow.parent.name, int(flow.stem.removeprefix("frame_"))
            image1, image2 = (base / group / scene / f"frame_{n:04d}.png" for n in (number, number + 1))
            invalid, occlusion = (base / kind / scene / f"{flow.stem}.png" for kind in ("invalid", "occlusions"))
            samples.append(
                FlowSample(
                    group,
                    f"{group}/{scene}/{flow.stem}",
                    image1,
                    image2,
                    flow,
                    invalid if invalid.is_file() else None,
                    occlusion if occlusion.is_file() else None,
                )
            )
    return samples, "flow/SCENE/frame_0001.flo beside clean/ or final/"


def _kitti(base: Path) -> tuple[list[FlowSample], str]:
    wanted = "flow_occ/000000_10.png beside image_2/, or frame1.png, frame2.png, flow_gt.png"
    if (base / "flow_gt.png").is_file():
        image1, image2, flow = (base / name for name in ("frame1.png", "frame2.png", "flow_gt.png"))
        return [FlowSample("kitti", base.name, image1, image2, flow)], wanted
    samples = []
    for flow in sorted((base / "flow_occ").glob("*_10.png")):
        folder = next((f for f in ("image_2", "colored_0") if (base / f).is_dir()), "image_2")
        second = base / folder / flow.name.replace("_10.png", "_11.png")
        samples.append(FlowSample("kitti", flow.stem, base / folder / flow.name, second, flow))
    return samples, wanted


def _middlebury(base: Path) -> tuple[list[FlowSample], str]:
    samples = []
    for flow in sorted((base / "other-gt-flow").glob("*/flow10.flo")):
        image1, image2 = (base / "other-data" / flow.parent.name / f"frame{n}.png" for n in (10, 11))
        samples.append(FlowSample("middlebury", flow.parent.name, image1, image2, flow))
    for flow in sorted(base.glob("*_flow10.flo")):
        name = flow.name.removesuffix("_flow10.flo")
        image1, image2 = (base / f"{name}{n}.png" for n in (1, 2))
        samples.append(FlowSample("middlebury", name, image1, image2, flow))
    return samples, "other-gt-flow/NAME/flow10.flo beside other-data/, or NAME_flow10.flo"


def _predict(network: nn.Module, sample: FlowSample, iters: int | None) -> np.ndarray:
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    image1, image2 = _image(sample.image1).to(device), _image(sample.image2).to(device)
    if image1.shape != image2.shape:
        raise ValueError(f"{sample.name}: frames of {list(image1.shape[-2:])} and {list(image2.shape[-2:])}")
    with torch.no_grad():
        return network(image1, image2, iters=iters)[0].float().cpu().numpy()


def _image(path: Path) -> Tensor:
    pixels = np.array(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def _ground_truth(sample: FlowSample, use_invalid: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Flow, nan where it does not count, and the occlusion mask."""
    flow_gt = read_flow(sample.flow)
    if use_invalid and sample.invalid is not None:
        flow_gt = np.where(_mask(sample.invalid), np.float32(np.nan), flow_gt)
    return flow_gt, None if sample.occlusion is None else _mask(sample.occlusion)


def _mask(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("L")) > 127


@contextmanager
def _evaluation_mode(network: nn.Module, padding: str) -> Iterator[None]:
    """Evaluation mode and the benchmark's padding, put back afterwards."""
    training, own_padding = network.training, getattr(network, "padding", None)
    network.eval()
    if own_padding is not None:
        network.padding = padding  # type: ignore[assignment]
    try:
        yield
    finally:
        network.train(training)
        if own_padding is not None:
            network.padding = own_padding
