"""`kinema track`: point tracks of every clip, as a sidecar artifact with the clips' shards, keys and order."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kinema.configs.schema import TrackConfig
from kinema.models.track_chaining import check_pairs
from kinema.pipelines import engine
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.flow_codec import FlowBlob
from kinema.pipelines.sidecar import (
    SidecarTotals,
    build_shards,
    column_mean,
    column_sum,
    default_out,
    open_input,
    plan_shards,
)
from kinema.pipelines.track.shard_tracker import ShardTracker, Starts
from kinema.pipelines.track.trackers import TrackerSpec, locate_weights

_COTRACKER3_BYTES = 6 * 2**30  # features, and points x frames that are refined together
_COTRACKER3_ITERS = 6


@dataclass(frozen=True)
class TrackSummary:
    """What the artifact holds after the run, and what the run did."""

    clips: int
    """Clips with tracks."""
    tracks: int
    """Stored tracks."""
    quarantined: int
    """Clips without tracks, each with its reason in quarantine.parquet."""
    seconds: float
    """Duration of this run."""
    shards: int
    """Shards in the artifact."""
    new_shards: int
    """Shards this run computed."""
    bytes: int
    """Size of all shards."""
    visible_share: float
    """Mean share of the frames in which a track is seen."""
    out: str
    """Where the artifact is."""
    exit_status: int = 0
    """3 when more than the allowed share of the clips is quarantined."""


def run(config: TrackConfig, *, report: Callable[[str], None] | None = None) -> TrackSummary:
    """Compute what is missing in config.out. Raises: ValueError for bad arguments, StageError when it cannot end."""
    started = time.monotonic()
    say = report or (lambda line: print(line, file=sys.stderr, flush=True))
    inputs = {"clips": open_input(config.clips, "clips")}
    if config.tracker == "chain":
        inputs["flow"] = _open_flow(config.flow, inputs["clips"])
    weights, weights_hash = locate_weights(config.tracker, config.weights)
    spec = TrackerSpec(
        name=config.tracker,
        weights=weights,
        weights_hash=weights_hash,
        iters=_iters(config),
        threads=config.threads_per_actor,
    )
    starts = Starts(config.grid, tuple(config.start_frames), config.spread_starts)
    out = config.out or default_out(config.clips, "tracks", config.tracker)
    if Artifact.is_new(out):
        _place(config, spec)
        spec.load()  # wrong weights are refused before an artifact is tied to their hash
    tracks = Artifact.open(
        out,
        kind="tracks",
        config=identity(spec, starts),
        inputs={name: artifact.plan8 for name, artifact in inputs.items()},
    )
    todo = plan_shards(inputs, tracks)
    total = tracks.plan.num_rows
    say(f"track: {config.tracker} on {total} clips, {len(todo)} of {len(tracks.planned_shards())} shards to compute")
    with tracks.swept_on_failure():
        _compute(config, inputs, tracks, spec, starts, todo)
    tracks.finalize()
    return _summary(config, tracks, len(todo), time.monotonic() - started)


def _open_flow(url: str, clips: Artifact) -> Artifact:
    """The flow that `chain` follows. Raises: ValueError when it is another clips' or lacks pairs that it needs."""
    if not url:
        raise ValueError("flow= is empty; tracker=chain follows the flow that `kinema teach` wrote: give its folder")
    flow = open_input(url, "flow")
    if flow.manifest["inputs"].get("clips") != clips.plan8:
        raise ValueError(f"flow={url} was made from other clips than {clips.url}; run `kinema teach` on these")
    row = max(
        flow.samples(["shard", "flow_offset", "flow_size", "num_pairs"]).to_pylist(), key=lambda r: r["num_pairs"]
    )
    shard_url = flow.shard_url(row["shard"])
    blob = FlowBlob(lambda at, size: read_range(shard_url, row["flow_offset"] + at, size), row["flow_size"])
    check_pairs(blob.pairs, blob.header.frames)
    return flow


def _iters(config: TrackConfig) -> int:
    return 0 if config.tracker == "chain" else config.iters or _COTRACKER3_ITERS


def identity(spec: TrackerSpec, starts: Starts) -> dict[str, Any]:
    """What decides the stored numbers; the artifact refuses to resume with anything else."""
    return {
        "tracker": spec.name,
        "weights_hash": spec.weights_hash,
        "iters": spec.iters,
        "grid": starts.grid,
        "start_frames": [] if starts.spread else list(starts.frames),
        "spread_starts": starts.spread,
    }


def _compute(
    config: TrackConfig,
    inputs: dict[str, Artifact],
    tracks: Artifact,
    spec: TrackerSpec,
    starts: Starts,
    todo: list[int],
) -> None:
    if not todo:
        return
    spec, num_actors = _place(config, spec)
    on_gpu = spec.device == "cuda"
    build_shards(
        tracks,
        todo,
        partial(ShardTracker, inputs, tracks, spec, starts),
        num_actors=num_actors,
        num_cpus=1.0 if on_gpu else float(spec.threads),
        num_gpus=1.0 if on_gpu else 0.0,
        unit="tracks",
    )


def _place(config: TrackConfig, spec: TrackerSpec) -> tuple[TrackerSpec, int]:
    """Device and number of actors. Raises: ValueError when the device is not there."""
    resources = engine.resources()
    gpus = int(resources.get("GPU", 0))
    if config.device == "cuda" and not gpus:
        raise ValueError("device=cuda, but there is no GPU; use device=auto or device=cpu")
    use_gpu = config.tracker != "chain" and gpus > 0 and config.device != "cpu"
    spec = replace(spec, device="cuda" if use_gpu else "cpu")
    if config.num_actors:
        return spec, config.num_actors
    if use_gpu:
        return spec, gpus
    num_actors = int(resources.get("CPU", 1)) // config.threads_per_actor
    if config.tracker != "chain":
        num_actors = min(num_actors, int(resources.get("memory", _COTRACKER3_BYTES)) // _COTRACKER3_BYTES)
    return spec, max(1, num_actors)


def _summary(config: TrackConfig, tracks: Artifact, new_shards: int, seconds: float) -> TrackSummary:
    totals = SidecarTotals.of(tracks, config.allowed_quarantine)
    samples = tracks.samples()
    return TrackSummary(
        clips=totals.clips,
        tracks=column_sum(samples, "num_tracks"),
        quarantined=totals.quarantined,
        seconds=round(seconds, 3),
        shards=totals.shards,
        new_shards=new_shards,
        bytes=totals.bytes,
        visible_share=column_mean(samples, "visible_share"),
        out=tracks.url,
        exit_status=totals.exit_status,
    )
