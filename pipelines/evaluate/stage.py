"""`kinema evaluate`: a model and a benchmark folder in, one table out, logged to the model's run."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.configs import EvaluateConfig
from kinema.pipelines import tracking
from kinema.pipelines.pictures.images import normalise_images
from kinema.pipelines.progress import Progress

if TYPE_CHECKING:
    from kinema.models.flowfeat.model import FlowFeat

FLOW_BENCHMARKS = ("sintel", "kitti", "middlebury")


@dataclass(frozen=True)
class EvaluateSummary:
    """One number per metric, and where they are."""

    metrics: dict[str, float] = field(default_factory=dict)
    """{name: value}; names begin with the benchmark."""
    model: str = ""
    """What was evaluated."""
    benchmark: str = ""
    """On what."""
    seconds: float = 0.0
    """Wall time."""
    run_id: str = ""
    """MLflow run that got the table."""

    def flat(self) -> dict[str, Any]:
        """What `--json` prints: every metric a key of its own."""
        return {**self.metrics, **{k: v for k, v in dataclasses.asdict(self).items() if k != "metrics"}}


def run(config: EvaluateConfig, *, report: Callable[[Any], None] | None = None) -> EvaluateSummary:
    """Evaluate `config.model` on `config.benchmark`.

    Raises: ValueError for a model or folder that does not fit the benchmark; names what would.
    """
    started = time.monotonic()
    if not config.data and config.benchmark != "pokes":
        raise ValueError(f"data is empty; name the folder of the {config.benchmark} benchmark: data=DIR")
    if not config.model:
        raise ValueError(
            "model is empty; give a run folder, models:/NAME@ALIAS, a FlowFeat variant, a flow network or fpt_base"
        )
    if config.out:
        _check_writable(Path(config.out))
    if tracking.tracking_uri().startswith("http"):
        tracking.open_client(tracking.tracking_uri())  # a server that is down is told before the work
    pictures: list[Path] = []
    if config.benchmark in FLOW_BENCHMARKS:
        metrics = _flow(config)
    elif config.benchmark == "tapvid":
        metrics = _tapvid(config)
    elif config.benchmark in ("pokes", "moving_part"):
        from kinema.pipelines.evaluate.pokes.stage import run_moving_part, run_pokes

        metrics, pictures = (run_pokes if config.benchmark == "pokes" else run_moving_part)(config)
    else:
        metrics = _davis(config)
    run_id = _log(config, metrics, pictures)
    summary = EvaluateSummary(metrics, config.model, config.benchmark, round(time.monotonic() - started, 2), run_id)
    if config.out:
        write_table(Path(config.out), summary)
    return summary


def _check_writable(folder: Path) -> None:
    """Known before the work, not after it. Raises: ValueError."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "is not a folder" if not there.is_dir() else "is not writable"
        raise ValueError(f"out={folder} cannot be made: {there} {why}; choose another out=")


def feature_model(model: str, weights: str = "") -> FlowFeat:
    """A FlowFeat from a run folder, checkpoint, registry URI, or hub name (then with `weights` or published ones)."""
    from kinema.models.flowfeat.model import VARIANTS, FlowFeat, flowfeat

    if model in VARIANTS:
        return flowfeat(model, pretrained=not weights, weights=weights or None)
    from kinema.pipelines.registry import load_trained

    return load_trained(model, FlowFeat, "dense features come from a FlowFeat")


def dense_features(model: FlowFeat, which: str) -> Callable[[Tensor], Any]:
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


def _flow(config: EvaluateConfig) -> dict[str, float]:
    from kinema.models.flow.networks import FLOW_NETWORKS, flow_network
    from kinema.pipelines.evaluate.flow.scores import evaluate_flow, find_samples

    if Path(config.model).is_dir():
        network = _trained_flow_network(config)
    elif config.model in FLOW_NETWORKS:
        given = config.weights or None
        network = flow_network(config.model, pretrained=given is None, weights=given, scale=config.scale)
    else:
        names = ", ".join(FLOW_NETWORKS)
        raise ValueError(f"model={config.model}: {config.benchmark} takes a run of a flow network, or one of {names}")
    total = len(find_samples(config.data, config.benchmark))  # type: ignore[arg-type]
    progress = Progress("evaluate", total, "pairs")
    values = evaluate_flow(
        network,
        config.data,
        config.benchmark,  # type: ignore[arg-type]
        iters=config.iters or None,
        progress=_shown_on(progress),
    )
    progress.close()
    return {f"{config.benchmark}_{name}": float(value) for name, value in values.items()}


def _trained_flow_network(config: EvaluateConfig) -> Any:
    from kinema.models.flow.networks import FLOW_NETWORKS, flow_network
    from kinema.pipelines.train.checkpoint import MODEL_FILE, read_meta, resolve_checkpoint

    if config.weights:
        raise ValueError(f"weights={config.weights}: the run model={config.model} has its own; leave weights out")
    checkpoint = resolve_checkpoint(config.model)
    name = read_meta(checkpoint)["train_config"]["model"]
    if name not in FLOW_NETWORKS:
        raise ValueError(f"model={config.model} is a run of {name}, which gives no flow; use a run of a flow network")
    return flow_network(name, weights=checkpoint / MODEL_FILE, scale=config.scale)


def _tapvid(config: EvaluateConfig) -> dict[str, float]:
    from kinema.pipelines.evaluate.tapvid.files import TapVidFiles
    from kinema.pipelines.evaluate.tapvid.scores import SCENES, evaluate_tapvid, scene_videos
    from kinema.pipelines.evaluate.tapvid.trackers import load_tracker

    videos = scene_videos() if config.data == SCENES else TapVidFiles(config.data)
    tracker = load_tracker(
        config.model, config.weights, config.teacher, config.queries, config.single_queries, config.iters
    )
    progress = Progress("evaluate", 0, "videos")

    def shown(done: int, name: str) -> None:
        progress.total = max(done, getattr(videos, "num_known", done))
        progress.update(done, name)

    scores = evaluate_tapvid(tracker, videos, config.queries, shown)
    progress.close()
    if config.out:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        scores.write_csv(Path(config.out) / "videos.csv")
    return {f"tapvid_{name}": value for name, value in scores.mean.items()}


def _davis(config: EvaluateConfig) -> dict[str, float]:
    from kinema.pipelines.evaluate.davis.folder import find_sequences
    from kinema.pipelines.evaluate.davis.scores import evaluate_davis
    from kinema.pipelines.evaluate.probes.fitting import ProbeFit

    sequences = list(config.sequences) or None
    names = [sequence.name for sequence in find_sequences(config.data, sequences)]
    model = feature_model(config.model, config.weights)
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
            progress=_shown_on(progress),
            masks_out=Path(config.out) / "masks" / protocol if config.out else None,
            **options,
        )
        progress.close()
        metrics |= {f"davis_{protocol}_{name}": value for name, value in scores.as_dict().items()}
    first = config.protocols[0]
    return {"davis_jf": metrics[f"davis_{first}_jf_mean"], **metrics}


def _shown_on(progress: Progress) -> Callable[[int, int, str], None]:
    return lambda done, _total, name: progress.update(done, name)


def _log(config: EvaluateConfig, metrics: dict[str, float], pictures: Sequence[Path] = ()) -> str:
    """Log to the run asked for, else to the run that made the model, else to a run of its own; returns its id."""
    run_id = config.run_id
    for folder in (Path(config.model), Path(config.model).parent.parent):
        if not run_id and (folder / "run.json").is_file():
            run_id = json.loads((folder / "run.json").read_text()).get("run_id", "")
    tags = {"kinema.kind": "evaluate"}
    settings = {"evaluate": dataclasses.asdict(config)}
    tracker = tracking.start_run("kinema", f"evaluate-{config.benchmark}", settings, tags=tags, resume=run_id)
    tracker.log_metrics({f"evaluate.{name}": value for name, value in metrics.items() if value == value})
    for picture in pictures:
        tracker.log_artifact(picture, f"evaluate/{config.benchmark}")
    tracker.end()
    return tracker.run_id


def write_table(folder: Path, summary: EvaluateSummary) -> None:
    """`table.json` and `table.csv` in the folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".table.partial"
    partial.write_text(json.dumps(summary.flat(), indent=1, sort_keys=True) + "\n")
    os.replace(partial, folder / "table.json")
    with partial.open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["metric", "value"])
        rows.writerows(sorted(summary.metrics.items()))
    os.replace(partial, folder / "table.csv")
