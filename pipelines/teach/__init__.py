"""`kinema teach`: optical flow of every clip, once, as a sidecar artifact with the clips' shards, keys and order."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow.compute as pc

from kinema.configs import TeachConfig
from kinema.configs.models.row import TeacherFacts
from kinema.configs.models.table import MODELS
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.precision import check_bf16
from kinema.pipelines.sidecars.flow_codec import SCALE
from kinema.pipelines.sidecars.sidecar import (
    Count,
    Place,
    SidecarSummary,
    check_seen_by_workers,
    column_mean,
    column_sum,
    complete,
    default_out,
    fullest_flow,
    open_input,
    place_actors,
    weights_notices,
)
from kinema.pipelines.teach.consensus import open_members
from kinema.pipelines.teach.protocol import Pairing
from kinema.pipelines.teach.shard_teacher import ShardTeacher
from kinema.pipelines.teach.teachers import TeacherSpec, locate_weights

_SIGNS = {"forward": 1, "backward": -1}


@dataclass(frozen=True, kw_only=True)
class TeachSummary(SidecarSummary):
    """What the flow artifact holds after the run, and what the run did."""

    pairs: int
    """Stored pairs of frames."""
    mean_flow_px: float
    """Mean length of the stored flow."""


def run(config: TeachConfig, *, report: Callable[[str], None] | None = None) -> TeachSummary:
    """Compute what is missing in config.out. Raises: ValueError for bad arguments, StageError when it cannot end."""
    started = time.monotonic()
    say = report or (lambda line: print(line, file=sys.stderr, flush=True))
    _check_settings(config)
    clips = open_input(config.clips, "clips")
    compare = _open_compared(config, clips)
    pairing = pairing_of(config)
    members = open_members(config.from_, clips, pairing) if facts_of(config.teacher).judges_flow else {}
    inputs = {"clips": clips} | ({} if compare is None else {"compare": compare}) | members
    weights, weights_hash = locate_weights(config.teacher, config.weights)
    spec = TeacherSpec(
        name=config.teacher,
        weights=weights,
        weights_hash=weights_hash,
        iters=config.iters or facts_of(config.teacher).iters,
        scale=config.scale,
        padding=config.padding,
        short_side=config.short_side,
        max_pixels=round(config.max_megapixels * 1e6),
        too_large=config.too_large,
        uncertainty=config.uncertainty or facts_of(config.teacher).judges_flow,
        precision=config.precision,
        cuda_graphs=config.cuda_graphs != "off",
        threads=config.threads_per_actor,
    )
    out = config.out or default_out(config.clips, "flow", config.teacher)
    check_seen_by_workers("out", out)
    if Artifact.is_new(out):
        _check_possible(config, clips, spec)
    flow = Artifact.open(
        out,
        kind="flow",
        config=identity(spec, pairing),
        inputs={name: artifact.plan8 for name, artifact in inputs.items()},
    )

    def prepare() -> tuple[Any, Place]:
        placed, place = _place(config, spec)
        make = partial(ShardTeacher, clips, flow, placed, pairing, compare=compare, members=members)
        return partial(_shard_teacher, make), place

    options: dict[str, Any] = {"allowed_quarantine": config.allowed_quarantine, "started": started, "say": say}
    if weights:
        options["notices"] = weights_notices(MODELS[config.teacher].weights or config.teacher, config.weights)
    done = complete(flow, inputs, config.teacher, prepare, unit="pairs", **options)
    samples = flow.samples()
    return TeachSummary(
        pairs=column_sum(samples, "num_pairs"), mean_flow_px=column_mean(samples, "mean_flow_px"), **done
    )


def pairing_of(config: TeachConfig) -> Pairing:
    """Which pairs the config asks for."""
    return Pairing(
        gaps=tuple(sorted(set(config.gaps))),
        forward="forward" in config.directions,
        backward="backward" in config.directions,
        stride=config.stride,
        occlusion=config.occlusion,
        batch_pairs=config.batch_pairs,
        teacher_sees_occlusion=facts_of(config.teacher).sees_occlusion,
    )


def facts_of(teacher: str) -> TeacherFacts:
    """What the table of models says of a teacher."""
    facts = MODELS[teacher].teacher
    assert facts is not None, "the config admits teachers only"
    return facts


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


def _shard_teacher(make: Callable[..., ShardTeacher], count: Count) -> ShardTeacher:
    return make(count=count)


def _check_settings(config: TeachConfig) -> None:
    """Raises: ValueError for settings that this teacher, or these others, leave without effect."""
    teacher, facts = config.teacher, facts_of(config.teacher)
    if config.uncertainty and not facts.gives_uncertainty:
        listed = ", ".join(name for name in MODELS.teachers() if facts_of(name).gives_uncertainty)
        raise ValueError(f"uncertainty=true: the teacher {teacher} states none; use one of {listed}")
    if config.scale and not facts.takes_scale:
        raise ValueError(f"scale={config.scale}: {teacher} runs at the size of the frames; use short_side")
    if config.padding != "sintel" and not facts.takes_padding:
        listed = ", ".join(name for name in MODELS.teachers() if facts_of(name).takes_padding)
        raise ValueError(f"padding={config.padding}: {teacher} knows no such choice, only {listed}; leave it out")
    if config.from_ and not facts.judges_flow:
        raise ValueError(f"from={list(config.from_)}: {teacher} looks at frames alone; use teacher=consensus")
    if facts.judges_flow and (config.short_side or config.max_megapixels or config.iters):
        raise ValueError(f"{teacher} works at its first member's size; leave short_side, max_megapixels and iters out")
    if config.too_large == "tile" and facts.sees_occlusion:
        raise ValueError(f"too_large=tile: {teacher} follows pixels across the whole frame; use too_large=downscale")
    if config.too_large == "tile" and not config.max_megapixels:
        raise ValueError("too_large=tile needs max_megapixels, the size from which frames are cut into tiles")


def _open_compared(config: TeachConfig, clips: Artifact) -> Artifact | None:
    """The flow to compare with. Raises: ValueError when it was made from other clips."""
    if not config.compare:
        return None
    other = open_input(config.compare, "flow", setting="compare")
    if other.manifest["inputs"].get("clips") != clips.plan8:
        raise ValueError(
            f"compare={config.compare} was made from clips {other.manifest['inputs'].get('clips')}, these are "
            f"{clips.plan8}; give another teacher's flow of the same clips"
        )
    wanted = {gap * sign for gap in config.gaps for way, sign in _SIGNS.items() if way in config.directions}
    stored = {gap for _, gap in fullest_flow(other).pairs}
    if not wanted & stored:
        raise ValueError(
            f"compare={config.compare} holds flow over {sorted(stored)} frames, this run asks for {sorted(wanted)} "
            "(negative: backward); use gaps and directions of which both have one"
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
    _place(config, spec)


def _place(config: TeachConfig, spec: TeacherSpec) -> tuple[TeacherSpec, Place]:
    """Device and number of actors. Raises: ValueError when the device is not there."""
    facts = facts_of(config.teacher)
    place = place_actors(
        config.device,
        config.num_actors,
        config.threads_per_actor,
        uses_gpu=facts.needs_weights,
        actor_bytes=facts.actor_bytes,
    )
    check_bf16(config.precision, place.device, config.teacher, facts.needs_weights)
    pairwise = facts.needs_weights and not facts.sees_occlusion
    if config.cuda_graphs == "on" and (place.device != "cuda" or not pairwise):
        where = f"on a {place.device.upper()}" if pairwise else f"for teacher={config.teacher}"
        raise ValueError(f"cuda_graphs=on: there are none {where}; use auto or off")
    return replace(spec, device=place.device), place
