"""`kinema teach`: optical flow of every clip, once, as a sidecar artifact with the clips' shards, keys and order."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.compute as pc

from kinema.configs.schema import TeachConfig
from kinema.models.flow_networks import FLOW_NETWORKS
from kinema.pipelines import engine
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.flow_codec import SCALE
from kinema.pipelines.sidecar import (
    Count,
    SidecarTotals,
    build_shards,
    column_mean,
    column_sum,
    default_out,
    open_input,
    plan_shards,
)
from kinema.pipelines.teach.clip_flow import Pairing
from kinema.pipelines.teach.shard_teacher import ShardTeacher
from kinema.pipelines.teach.teachers import TeacherSpec, locate_weights

_RAFT_BYTES = 4 * 2**30  # what one RAFT on a CPU may take for its correlations


@dataclass(frozen=True)
class TeachSummary:
    """What the artifact holds after the run, and what the run did."""

    clips: int
    """Clips with flow."""
    pairs: int
    """Stored pairs of frames."""
    quarantined: int
    """Clips without flow, each with its reason in quarantine.parquet."""
    seconds: float
    """Duration of this run."""
    shards: int
    """Shards in the artifact."""
    new_shards: int
    """Shards this run computed."""
    bytes: int
    """Size of all shards."""
    mean_flow_px: float
    """Mean length of the stored flow."""
    out: str
    """Where the artifact is."""
    exit_status: int = 0
    """3 when more than the allowed share of the clips is quarantined."""


def run(config: TeachConfig, *, report: Callable[[str], None] | None = None) -> TeachSummary:
    """Compute what is missing in config.out. Raises: ValueError for bad arguments, StageError when it cannot end."""
    started = time.monotonic()
    say = report or (lambda line: print(line, file=sys.stderr, flush=True))
    if config.uncertainty and not config.teacher.startswith("sea_raft"):
        raise ValueError(f"uncertainty=true: the teacher {config.teacher} states none; use a sea_raft_* teacher")
    if config.scale and not FLOW_NETWORKS[config.teacher].takes_scale:
        raise ValueError(f"scale={config.scale}: {config.teacher} runs at the size of the frames; use short_side")
    clips = open_input(config.clips, "clips")
    compare = _open_compared(config, clips)
    pairing = pairing_of(config)
    weights, weights_hash = locate_weights(config.teacher, config.weights)
    spec = TeacherSpec(
        name=config.teacher,
        weights=weights,
        weights_hash=weights_hash,
        iters=_iters(config),
        scale=config.scale,
        padding=config.padding,
        short_side=config.short_side,
        max_pixels=round(config.max_megapixels * 1e6),
        too_large=config.too_large,
        uncertainty=config.uncertainty,
        precision=config.precision,
        threads=config.threads_per_actor,
    )
    out = config.out or default_out(config.clips, "flow", config.teacher)
    if Artifact.is_new(out):
        _check_possible(config, clips, spec)
    flow = Artifact.open(
        out,
        kind="flow",
        config=identity(spec, pairing),
        inputs={"clips": clips.plan8} | ({} if compare is None else {"compare": compare.plan8}),
    )
    todo = plan_shards({"clips": clips} | ({} if compare is None else {"compare": compare}), flow)
    total = flow.plan.num_rows
    say(f"teach: {config.teacher} on {total} clips, {len(todo)} of {len(flow.planned_shards())} shards to compute")
    with flow.swept_on_failure():
        _compute(config, spec, todo, partial(ShardTeacher, clips, flow, pairing=pairing, compare=compare), flow)
    flow.finalize()
    return _summary(config, flow, len(todo), time.monotonic() - started)


def pairing_of(config: TeachConfig) -> Pairing:
    """Which pairs the config asks for."""
    return Pairing(
        gaps=tuple(sorted(set(config.gaps))),
        forward="forward" in config.directions,
        backward="backward" in config.directions,
        stride=config.stride,
        occlusion=config.occlusion,
        batch_pairs=config.batch_pairs,
    )


def _iters(config: TeachConfig) -> int:
    return config.iters or FLOW_NETWORKS[config.teacher].teacher_iters


def identity(spec: TeacherSpec, pairing: Pairing) -> dict[str, Any]:
    """What decides the stored numbers; the artifact refuses to resume with anything else."""
    return {
        "teacher": spec.name,
        "weights_hash": spec.weights_hash,
        "iters": spec.iters,
        "scale": spec.scale,
        "padding": spec.padding,
        "short_side": spec.short_side,
        "max_pixels": spec.max_pixels,
        "too_large": spec.too_large if spec.max_pixels else None,
        "uncertainty": spec.uncertainty,
        "precision": spec.precision,
        "gaps": list(pairing.gaps),
        "forward": pairing.forward,
        "backward": pairing.backward,
        "stride": pairing.stride,
        "occlusion": pairing.stores_occlusion,
        "steps_per_px": SCALE,
    }


def _compute(
    config: TeachConfig, spec: TeacherSpec, todo: list[int], make: Callable[..., ShardTeacher], flow: Artifact
) -> None:
    """Args: make(spec=, count=) -> ShardTeacher."""
    if not todo:
        return
    spec, num_actors = _place(config, spec, engine.resources())
    on_gpu = spec.device == "cuda"
    build_shards(
        flow,
        todo,
        partial(_shard_teacher, make, spec),
        num_actors=num_actors,
        num_cpus=1.0 if on_gpu else float(spec.threads),
        num_gpus=1.0 if on_gpu else 0.0,
        unit="pairs",
    )


def _shard_teacher(make: Callable[..., ShardTeacher], spec: TeacherSpec, count: Count) -> ShardTeacher:
    return make(spec=spec, count=count)


def _open_compared(config: TeachConfig, clips: Artifact) -> Artifact | None:
    """The flow to compare with. Raises: ValueError when it was made from other clips."""
    if not config.compare:
        return None
    other = open_input(config.compare, "flow")
    if other.manifest["inputs"].get("clips") != clips.plan8:
        raise ValueError(
            f"compare={config.compare} was made from clips {other.manifest['inputs'].get('clips')}, these are "
            f"{clips.plan8}; give another teacher's flow of the same clips"
        )
    return other


def _check_possible(config: TeachConfig, clips: Artifact, spec: TeacherSpec) -> None:
    """Before anything is written. Raises: ValueError for settings that nothing can come of."""
    longest = pc.max(clips.samples(["num_frames"])["num_frames"]).as_py()
    if min(config.gaps) >= longest:
        raise ValueError(
            f"gaps={list(config.gaps)} leave no pair of frames: the longest clip has {longest} frames; use a gap "
            f"under {longest}"
        )
    _place(config, spec, engine.resources())


def _place(config: TeachConfig, spec: TeacherSpec, resources: dict[str, float]) -> tuple[TeacherSpec, int]:
    """Device and number of actors. Raises: ValueError when the device is not there."""
    gpus = int(resources.get("GPU", 0))
    if config.device == "cuda" and not gpus:
        raise ValueError("device=cuda, but there is no GPU; use device=auto or device=cpu")
    use_gpu = config.teacher != "dis" and gpus > 0 and config.device != "cpu"
    if config.precision == "bf16" and not use_gpu:
        raise ValueError("precision=bf16 runs on a GPU only; use precision=fp32")
    spec = TeacherSpec(**{**spec.__dict__, "device": "cuda" if use_gpu else "cpu"})
    if config.num_actors:
        return spec, config.num_actors
    if use_gpu:
        return spec, gpus
    num_actors = int(resources.get("CPU", 1)) // config.threads_per_actor
    if config.teacher != "dis":
        num_actors = min(num_actors, int(resources.get("memory", _RAFT_BYTES)) // _RAFT_BYTES)
    return spec, max(1, num_actors)


def _summary(config: TeachConfig, flow: Artifact, new_shards: int, seconds: float) -> TeachSummary:
    totals = SidecarTotals.of(flow, config.allowed_quarantine)
    samples = flow.samples()
    return TeachSummary(
        clips=totals.clips,
        pairs=column_sum(samples, "num_pairs"),
        quarantined=totals.quarantined,
        seconds=round(seconds, 3),
        shards=totals.shards,
        new_shards=new_shards,
        bytes=totals.bytes,
        mean_flow_px=column_mean(samples, "mean_flow_px"),
        out=flow.url,
        exit_status=totals.exit_status,
    )
