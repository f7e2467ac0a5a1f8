"""Benchmark `davis`: object masks carried through videos by dense features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.configs import EvaluateConfig
from kinema.pipelines.evaluate.davis.folder import find_sequences
from kinema.pipelines.evaluate.davis.scores import evaluate_davis
from kinema.pipelines.evaluate.probes.fitting import ProbeFit
from kinema.pipelines.model_address import load_address
from kinema.pipelines.pictures.images import normalise_images
from kinema.pipelines.progress import Progress


def run_davis(config: EvaluateConfig) -> tuple[dict[str, float], list[Path]]:
    """Measures of every protocol asked for. Raises: ValueError for a model or data that do not fit."""
    sequences = list(config.sequences) or None
    names = [sequence.name for sequence in find_sequences(config.data, sequences)]
    model = load_address(config.model, config.weights, kind="features", user="benchmark=davis").network
    metrics: dict[str, float] = {}
    for protocol in config.protocols:
        progress = Progress(f"evaluate {protocol}", len(names), "sequences")
        progress.update(0, "first sequence")
        options: dict[str, Any] = {"frame_side": config.short_side}
        if protocol != "propagation":
            options = {"fit": ProbeFit()}
        scores = evaluate_davis(
            dense_features(model, "both" if protocol == "attention" else config.features),
            config.data,
            names,
            protocol,
            progress=partial(_show, progress),
            masks_out=Path(config.out) / "masks" / protocol if config.out else None,
            **options,
        )
        progress.close()
        metrics |= {f"davis_{protocol}_{name}": value for name, value in scores.as_dict().items()}
    first = config.protocols[0]
    return {"davis_jf": metrics[f"davis_{first}_jf_mean"], **metrics}, []


def _show(progress: Progress, done: int, _total: int, name: str) -> None:
    progress.update(done, name)


def dense_features(model: Any, which: str) -> Callable[[Tensor], Any]:
    """`frame [3, H, W] in 0..1 -> [C, h, w]`, or the pair (y_enc, y_dec) for `which="both"`.

    The model sees the frame at the nearest size that its patch divides; y_dec is brought back to the frame's size.
    """
    patch = model.encoder.patch_size

    @torch.inference_mode()
    def features(frame: Tensor) -> Any:
        height, width = frame.shape[-2:]
        size = (max(patch, round(height / patch) * patch), max(patch, round(width / patch) * patch))
        image = normalise_images(frame)[None]
        if size != (height, width):
            image = F.interpolate(image, size, mode="bilinear", antialias=True)
        coarse, fine = model(image)
        if size != (height, width):
            fine = F.interpolate(fine, (height, width), mode="bilinear")
        return (coarse[0], fine[0]) if which == "both" else (fine if which == "y_dec" else coarse)[0]

    return features
