"""`kinema track`: point tracks of every clip, as a sidecar artifact with the clips' shards, keys and order."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kinema.configs import TrackConfig
from kinema.configs.models.table import MODELS
from kinema.models.tracks.chaining import check_pairs
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.precision import check_bf16
from kinema.pipelines.sidecars.sidecar import (
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
from kinema.pipelines.track.shard_tracker import ShardTracker, Starts
from kinema.pipelines.track.trackers import TrackerSpec, facts_of, locate_weights


@dataclass(frozen=True, kw_only=True)
class TrackSummary(SidecarSummary):
    """What the tracks artifact holds after the run, and what the run did."""

    tracks: int
    """Stored tracks."""
    visible_share: float
    """Mean share of the frames in which a track is seen."""


def run(config: TrackConfig, *, report: Callable[[str], None] | None = None) -> TrackSummary:
    """Compute what is missing in config.out. Raises: ValueError for bad arguments, StageError when it cannot end."""
    started = time.monotonic()
    say = report or (lambda line: print(line, file=sys.stderr, flush=True))
    facts = facts_of(config.tracker)
    if config.iters and not facts.iters:
        raise ValueError(f"iters={config.iters}: the tracker {config.tracker} refines nothing; leave iters out")
    inputs = {"clips": open_input(config.clips, "clips")}
    if facts.follows_flow:
        inputs["flow"] = _open_flow(config.flow, inputs["clips"])
    weights, weights_hash = locate_weights(config.tracker, config.weights)
    spec = TrackerSpec(
        name=config.tracker,
        weights=weights,
        weights_hash=weights_hash,
        iters=config.iters or facts.iters,
        threads=config.threads_per_actor,
        precision=config.precision,
    )
    starts = Starts(config.grid, tuple(config.start_frames), config.spread_starts)
    out = config.out or default_out(config.clips, "tracks", config.tracker)
    check_seen_by_workers("out", out)
    if Artifact.is_new(out):
        _place(config, spec)
        spec.load()  # wrong weights are refused before an artifact is tied to their hash
    tracks = Artifact.open(
        out,
        kind="tracks",
        config=identity(spec, starts),
        inputs={name: artifact.plan8 for name, artifact in inputs.items()},
    )

    def prepare() -> tuple[Any, Place]:
        placed, place = _place(config, spec)
        return partial(ShardTracker, inputs, tracks, placed, starts), place

    options: dict[str, Any] = {"allowed_quarantine": config.allowed_quarantine, "started": started, "say": say}
    if weights:
        options["notices"] = weights_notices(MODELS[config.tracker].weights or config.tracker, config.weights)
    done = complete(tracks, inputs, config.tracker, prepare, unit="tracks", **options)
    samples = tracks.samples()
    return TrackSummary(
        tracks=column_sum(samples, "num_tracks"), visible_share=column_mean(samples, "visible_share"), **done
    )


def _open_flow(url: str, clips: Artifact) -> Artifact:
    """The flow that `chain` follows. Raises: ValueError when it is another clips' or lacks pairs that it needs."""
    if not url:
        raise ValueError("flow= is empty; tracker=chain follows the flow that `kinema teach` wrote: give its folder")
    flow = open_input(url, "flow")
    if flow.manifest["inputs"].get("clips") != clips.plan8:
        raise ValueError(f"flow={url} was made from other clips than {clips.url}; run `kinema teach` on these")
    blob = fullest_flow(flow)
    check_pairs(blob.pairs, blob.header.frames)
    return flow


def identity(spec: TrackerSpec, starts: Starts) -> dict[str, Any]:
    """What decides the stored numbers; the artifact refuses to resume with anything else.

    `precision` came later: float32 is not named, so that older artifacts are gone on with.
    """
    later = {} if spec.precision == "fp32" else {"precision": spec.precision}
    return later | {
        "tracker": spec.name,
        "weights_hash": spec.weights_hash,
        "iters": spec.iters,
        "grid": starts.grid,
        "start_frames": [] if starts.spread else list(starts.frames),
        "spread_starts": starts.spread,
    }


def _place(config: TrackConfig, spec: TrackerSpec) -> tuple[TrackerSpec, Place]:
    """Device and number of actors. Raises: ValueError when the device is not there, or cannot multiply in bf16."""
    facts = facts_of(config.tracker)
    place = place_actors(
        config.device,
        config.num_actors,
        config.threads_per_actor,
        uses_gpu=facts.needs_weights,
        actor_bytes=facts.actor_bytes,
    )
    check_bf16(config.precision, place.device, config.tracker, facts.needs_weights)
    return replace(spec, device=place.device), place
