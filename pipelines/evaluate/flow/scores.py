"""`evaluate` for flow networks: Sintel, KITTI and Middlebury folders in, one number per measure out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from kinema.pipelines.evaluate.flow.metrics import FlowErrors
from kinema.pipelines.flow_datasets import FlowDataset, FlowSample, Selection, list_dataset

Benchmark = Literal["sintel", "kitti", "middlebury"]
DATASETS = {"sintel": "sintel", "kitti": "kitti2015", "middlebury": "middlebury"}
SINTEL_PASSES = ("clean", "final")


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
    dataset = find_samples(benchmark_root, benchmark)
    if iters is None:
        iters = getattr(network, "benchmark_iters", {}).get(benchmark)
    groups: dict[str, FlowErrors] = {}
    with evaluation_mode(network, "kitti" if benchmark == "kitti" else "sintel"):
        for done, sample in enumerate(dataset, 1):
            flow_gt, occluded = sample.flow_px, sample.occlusion
            assert flow_gt is not None  # training splits have it
            if use_invalid and "invalid" in sample.masks:
                flow_gt = np.where(sample.masks["invalid"], np.float32(np.nan), flow_gt)
            flow = predict(network, sample, iters)
            groups.setdefault(sample.group, FlowErrors()).add(flow, flow_gt, occluded=occluded)
            if progress is not None:
                progress(done, len(dataset), sample.id)
    if benchmark == "sintel":
        return {f"{group}_{k}": v for group, errors in groups.items() for k, v in errors.sintel().items()}
    return getattr(groups[benchmark], benchmark)()


def find_samples(benchmark_root: str | Path, benchmark: Benchmark) -> FlowDataset:
    """The pairs with ground truth of a benchmark's folder, or of as many scenes of it as are there, in order.

    Layouts: those of `flow_datasets`, with or without their `training` folder, and flat folders of single pairs:
    KITTI `frame1.png`, `frame2.png`, `flow_gt.png`; Middlebury `NAME1.png`, `NAME2.png`, `NAME_flow10.flo`.

    Raises: ValueError that says what was looked for and what is there, or which frames of known flow are missing.
    """
    if benchmark not in DATASETS:
        raise ValueError(f"benchmark={benchmark!r} is not one of {', '.join(DATASETS)}")
    root = Path(benchmark_root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; benchmark={benchmark} needs the data set's folder")
    rendered = tuple(p for p in SINTEL_PASSES if (root / p).is_dir() or (root / "training" / p).is_dir())
    selection = Selection(passes=rendered or SINTEL_PASSES)
    dataset = list_dataset(DATASETS[benchmark], root, selection)
    if dataset.num_broken:
        raise ValueError(f"{dataset.num_broken} pairs with ground truth lack files; {dataset.shortfall()}")
    if not len(dataset):
        found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        raise ValueError(f"{root}: no {benchmark} ground truth ({dataset.layout}); found {found}")
    return dataset


def predict(network: nn.Module, sample: FlowSample, iters: int | None) -> Float32[np.ndarray, "2 H W"]:
    """A network's flow of a pair, on the device of its parameters."""
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    image1, image2 = (_batch(image).to(device) for image in (sample.image1, sample.image2))
    with torch.no_grad():
        return network(image1, image2, iters=iters)[0].float().cpu().numpy()


def _batch(image: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, "1 3 H W"]:
    return rearrange(torch.from_numpy(image), "h w c -> 1 c h w").float() / 255


@contextmanager
def evaluation_mode(network: nn.Module, padding: str) -> Iterator[None]:
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
