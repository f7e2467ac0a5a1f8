"""Clips and their known flow, shard by shard: a clips artifact and a flow artifact with the same keys in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from kinema.configs.shard import ClipConfig
from kinema.pipelines import engine
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.flow_datasets.sample import BadPair
from kinema.pipelines.progress import Progress
from kinema.pipelines.shard.known_flow.pack import (
    CLIP_COLUMNS,
    TEACHER,
    TRUTH_COLUMNS,
    ClipFacts,
    clip_sample,
    flow_sample,
)
from kinema.pipelines.shard.plan import assign_shards
from kinema.pipelines.sidecars.flow_codec import FlowPair
from kinema.pipelines.sidecars.tracks_codec import TracksBlob, encode_tracks
from kinema.pipelines.track.shard_tracker import TRACKS_COLUMNS

PLAN = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("source_hash", pa.string()),
        ("clip", pa.int32()),
        ("num_frames", pa.int32()),
        ("num_pairs", pa.int32()),
        ("expected_bytes", pa.int64()),
    ]
)


class PackedClip(Protocol):
    """Where the frames and flow of one clip come from: files, or a renderer. Travels to workers."""

    @property
    def frame_numbers(self) -> tuple[int, ...]: ...
    @property
    def labels(self) -> dict[str, Any]: ...
    def images(self) -> Sequence[UInt8[np.ndarray, "H W 3"]]:
        """The frames. Raises: BadPair."""

    def flows(self) -> Iterable[tuple[FlowPair, int]]:
        """Flow of every pair, and how many of its pixels could not be stored. Raises: BadPair."""


@dataclass(frozen=True)
class PlannedClip:
    """A clip and its row of the plan, shard left out."""

    row: dict[str, Any]
    clip: PackedClip


@dataclass(frozen=True)
class PackTask:
    """What a worker needs to build one shard of both artifacts."""

    clips: Artifact
    flow: Artifact
    shard: int
    sources: dict[str, PackedClip | None]
    """By key; None where the files are no longer there."""
    clip: ClipConfig
    fps: Fraction
    motion: str
    tracks: Artifact | None = None
    """Where the sources know tracks too."""
    tracks_grid: int = 0


def append_plans(
    clips: Artifact,
    open_flow: Callable[[str], Artifact],
    planned: Sequence[PlannedClip],
    shard_mb: int,
    min_shards: int,
) -> tuple[Artifact, int]:
    """Plan the clips that are not planned yet, for both artifacts.

    Args: open_flow, opens the flow artifact of clips with this PLAN8.
    Returns: the flow artifact, and how many clips are new.
    """
    known = set(clips.plan["key"].to_pylist())
    new = [p.row for p in planned if p.row["key"] not in known]
    if new:
        sizes = [row["expected_bytes"] for row in new]
        first = max(clips.planned_shards(), default=-1) + 1
        shards = assign_shards(sizes, first=first, shard_mb=shard_mb, min_shards=min_shards)
        rows = [{**row, "shard": shard} for row, shard in zip(new, shards, strict=True)]
        clips.append_plan(pa.Table.from_pylist(rows, schema=PLAN))
    assert clips.plan8 is not None
    flow = open_flow(clips.plan8)
    done = set(flow.planned_shards())
    rest = [row for row in clips.plan.select(["shard", "key", "source"]).to_pylist() if row["shard"] not in done]
    if rest:
        schema = pa.schema([PLAN.field(name) for name in ("shard", "key", "source")])
        flow.append_plan(pa.Table.from_pylist(rest, schema=schema))
    return flow, len(new)


def build_shards(
    clips: Artifact,
    flow: Artifact,
    planned: Sequence[PlannedClip],
    clip: ClipConfig,
    fps: Fraction,
    motion: str,
    num_workers: int = 0,
    timeout_s: float | None = None,
    tracks: Artifact | None = None,
    tracks_grid: int = 0,
) -> int:
    """Build every shard that either artifact lacks. Returns: how many.

    A shard whose worker keeps dying is quarantined with its clips and stays to be built by the next run.
    """
    todo = sorted({shard for artifact in (clips, flow, tracks) if artifact is not None for shard in artifact.pending()})
    by_key = {p.row["key"]: p.clip for p in planned}
    tasks = [
        PackTask(
            clips=clips,
            flow=flow,
            shard=shard,
            sources={key: by_key.get(key) for key in clips.plan_of(shard)["key"].to_pylist()},
            clip=clip,
            fps=fps,
            motion=motion,
            tracks=tracks,
            tracks_grid=tracks_grid,
        )
        for shard in todo
    ]
    progress = Progress("shard", sum(len(task.sources) for task in tasks), "clips")
    done = 0
    outcomes = engine.run_tasks(pack_shard, tasks, max_in_flight=num_workers, retries=1, timeout_s=timeout_s)
    for task, outcome in outcomes:
        if isinstance(outcome, engine.Failure):
            _quarantine_shard(task, outcome)
        done += len(task.sources)
        progress.update(done)
    progress.close()
    return len(todo)


def pack_shard(task: PackTask) -> int:
    """Build and commit one shard of both artifacts. Returns: its clips."""
    rows = {row["key"]: row for row in task.clips.plan_of(task.shard).to_pylist()}
    with (
        task.clips.shard_writer(task.shard, CLIP_COLUMNS) as clips,
        task.flow.shard_writer(task.shard, TRUTH_COLUMNS) as flow,
    ):
        for key, row in rows.items():
            source = task.sources[key]
            try:
                if source is None:
                    raise BadPair("the files of the clip are no longer there; they were planned in an earlier run")
                images = source.images()
                numbers, labels = source.frame_numbers, source.labels
                facts = ClipFacts(key, row["source"], row["source_hash"], numbers, labels, task.fps)
                packed = clip_sample(facts, images, task.clip, task.motion), flow_sample(facts, images, source.flows())
            except BadPair as error:
                for writer in (clips, flow):
                    writer.quarantine(key, stage="build", error_class=type(error).__name__, message=str(error))
                continue
            clips.add(key, *packed[0])
            flow.add(key, *packed[1])
        hashes = {row["source"]: row["source_hash"] for row in rows.values()}
        record = clips.commit(input_hashes=hashes)
        flow.commit(input_hashes={"clips": record["sha256"]})
    if task.tracks is not None:
        _pack_tracks(task, task.tracks, record["sha256"])
    return record["num_samples"]


def _pack_tracks(task: PackTask, artifact: Artifact, clips_hash: str) -> None:
    """Build and commit the shard of the tracks artifact."""
    with artifact.shard_writer(task.shard, TRACKS_COLUMNS) as writer:
        for row in task.clips.plan_of(task.shard).to_pylist():
            source = task.sources[row["key"]]
            assert source is not None and hasattr(source, "tracks")  # rendered, not read from files
            tracks = source.tracks(task.tracks_grid)
            blob = encode_tracks(tracks, tracker=TEACHER, weights_hash="none")
            steps = np.hypot(*np.moveaxis(np.diff(tracks.points_px, axis=0), -1, 0))
            seen = tracks.visible[1:] & tracks.visible[:-1]
            columns = {
                "source": row["source"],
                "height": tracks.size[0],
                "width": tracks.size[1],
                "num_frames": len(tracks.points_px),
                "num_tracks": len(tracks.queries),
                "tracker": TEACHER,
                "weights_hash": "none",
                "num_saturated": TracksBlob(blob).header.num_saturated,
                "visible_share": float(tracks.visible.mean()),
                "mean_step_px": float(steps[seen].mean()) if seen.any() else None,
            }
            writer.add(row["key"], {"tracks": blob}, columns)
        writer.commit(input_hashes={"clips": clips_hash})


def _quarantine_shard(task: PackTask, failure: engine.Failure) -> None:
    where = f" ({failure.where})" if failure.where else ""
    for artifact in (task.clips, task.flow):
        artifact.quarantine(
            {
                "source": row["source"],
                "stage": "build",
                "error_class": failure.error_class,
                "message": f"the shard's worker failed: {failure.message}{where}",
                "attempts": failure.attempts,
                "key": row["key"],
                "shard": task.shard,
            }
            for row in task.clips.plan_of(task.shard).to_pylist()
        )
