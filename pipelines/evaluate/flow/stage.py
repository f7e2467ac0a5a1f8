"""Benchmarks of flow networks: Sintel, KITTI, Middlebury."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.configs import EvaluateConfig
from kinema.configs.models.table import MODELS
from kinema.pipelines.evaluate.flow.scores import evaluate_flow, find_samples
from kinema.pipelines.model_address import load_address, named_row, row_of
from kinema.pipelines.progress import Progress


def run_flow(config: EvaluateConfig) -> tuple[dict[str, float], list[Path]]:
    """Error of a flow network on a benchmark's pairs. Raises: ValueError for a model or data that do not fit."""
    user = f"benchmark={config.benchmark}"
    model = load_address(config.model, config.weights, kind="flow", user=user, options=_options(config))
    total = len(find_samples(config.data, config.benchmark))  # type: ignore[arg-type]
    progress = Progress("evaluate", total, "pairs")
    values = evaluate_flow(
        model.network,
        config.data,
        config.benchmark,  # type: ignore[arg-type]
        iters=config.iters or None,
        progress=lambda done, _total, name: progress.update(done, name),
    )
    progress.close()
    return {f"{config.benchmark}_{name}": float(value) for name, value in values.items()}, []


def _options(config: EvaluateConfig) -> dict[str, Any]:
    """What the network's builder is told. Raises: ValueError for a scale where there is none."""
    if not config.scale:
        return {}
    row = named_row(config.model) or row_of(config.model)
    if row.teacher is None or not row.teacher.takes_scale:
        listed = ", ".join(name for name, other in MODELS.items() if other.teacher and other.teacher.takes_scale)
        raise ValueError(f"scale={config.scale}: {row.name} runs at the size of the frames; use scale=0, or {listed}")
    return {"scale": config.scale}
