"""The one table of benchmarks: what `kinema evaluate` measures, on what, with which code."""

from __future__ import annotations

from dataclasses import dataclass

from kinema.configs.models.row import Kind


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    run: str
    """`run(EvaluateConfig) -> (metrics, pictures)`, as `module:function`."""
    kind: Kind
    """Models of this kind are measured."""
    summary: str
    """One sentence."""
    needs_data: bool = True
    """Whether `data=` must be given."""
    higher_is_better: bool = True
    """Direction of its first metric."""


BENCHMARKS = {
    "davis": Benchmark(
        "kinema.pipelines.evaluate.davis.stage:run_davis", "features", "DAVIS-2017 masks from features: J and F."
    ),
    "sintel": Benchmark(
        "kinema.pipelines.evaluate.flow.stage:run_flow", "flow", "MPI Sintel: end-point error.", higher_is_better=False
    ),
    "kitti": Benchmark(
        "kinema.pipelines.evaluate.flow.stage:run_flow",
        "flow",
        "KITTI: end-point error, Fl-all.",
        higher_is_better=False,
    ),
    "middlebury": Benchmark(
        "kinema.pipelines.evaluate.flow.stage:run_flow", "flow", "Middlebury: end-point error.", higher_is_better=False
    ),
    "flow": Benchmark(
        "kinema.pipelines.evaluate.flow.stage:run_suite",
        "flow",
        "Sintel, KITTI 2012 and 2015, Spring, Middlebury: every measure, published figures beside; submissions.",
        higher_is_better=False,
    ),
    "tapvid": Benchmark(
        "kinema.pipelines.evaluate.tapvid.stage:run_tapvid", "tracks", "TAP-Vid: AJ, position and occlusion accuracy."
    ),
    "pokes": Benchmark(
        "kinema.pipelines.evaluate.pokes.stage:run_pokes",
        "pokes",
        "Likelihood and error of motion by the number of pokes.",
        needs_data=False,
        higher_is_better=False,
    ),
    "moving_part": Benchmark(
        "kinema.pipelines.evaluate.pokes.stage:run_moving_part", "pokes", "Which part moves along with a poke: mIoU."
    ),
    "knn": Benchmark(
        "kinema.pipelines.evaluate.knn.stage:run_knn",
        "motion",
        "Action, and anything else that is labelled, from the nearest motion embeddings: accuracy.",
    ),
}
