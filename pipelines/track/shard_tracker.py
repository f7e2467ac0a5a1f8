"""One shard's work: read its clips (or their flow), track points, write the sidecar shard. Knows nothing of Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from kinema.models.tracks.chaining import grid_queries
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.loader.clip import Clip, ReadCounter
from kinema.pipelines.sidecars.sidecar import Count, Sample, ShardOutcome, read_clip, write_shard
from kinema.pipelines.sidecars.tracks_codec import Tracks, TracksBlob, encode_tracks
from kinema.pipelines.teach.teachers import use_threads
from kinema.pipelines.track.trackers import Tracker, TrackerSpec, check_tracks, starting_frames
from kinema.pipelines.video.errors import Missing

TRACKS_COLUMNS = pa.schema(
    [
        ("source", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("num_tracks", pa.int32()),
        ("tracker", pa.string()),
        ("weights_hash", pa.string()),
        ("num_saturated", pa.int64()),
        ("visible_share", pa.float64()),
        ("mean_step_px", pa.float64()),
        ("tracks_offset", pa.int64()),
        ("tracks_size", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Starts:
    """Where tracks begin: a grid x grid of points in some frames; see `starting_frames`."""

    grid: int
    frames: tuple[int, ...]
    spread: int

    def queries(self, num_frames: int, size: tuple[int, int]) -> np.ndarray:
        """(t, x, y) of every track of a clip."""
        return grid_queries(self.grid, *size, starting_frames(num_frames, self.frames, self.spread))


class ShardTracker:
    """Holds a loaded tracker; calling it with a shard number builds that shard of the tracks artifact.

    Args: inputs by kind: "clips", and "flow" for a tracker that follows it; `count(clips, tracks)` is told of every
        finished clip.
    """

    def __init__(
        self,
        inputs: dict[str, Artifact],
        tracks: Artifact,
        spec: TrackerSpec,
        starts: Starts,
        count: Count | None = None,
        tracker: Tracker | None = None,
    ):
        self.inputs, self.tracks, self.spec, self.starts = inputs, tracks, spec, starts
        self.count = count or (lambda clips, tracks: None)
        self.tracker = tracker or spec.load()

    def __call__(self, shard: int) -> ShardOutcome:
        """Build and commit one shard. Raises: ValueError when an input shard is missing or was not committed."""
        with use_threads(self.spec.threads):
            return write_shard(
                self.inputs,
                self.tracks,
                shard,
                TRACKS_COLUMNS,
                lambda key, rows: self._clip(shard, rows),
                self.count,
                units="num_tracks",
            )

    def _clip(self, shard: int, rows: dict[str, dict[str, Any]]) -> Sample:
        """Blob and row of one clip. Raises: SourceError, BadTracks, ValueError."""
        clip = self._open(shard, rows)
        queries = self.starts.queries(clip.num_frames, self.tracker.size(clip))
        tracks = self.tracker(clip, queries)
        check_tracks(tracks)
        blob = encode_tracks(tracks, tracker=self.spec.name, weights_hash=self.spec.weights_hash)
        return {"tracks": blob}, {
            "source": rows["clips"]["source"],
            "height": tracks.size[0],
            "width": tracks.size[1],
            "num_frames": clip.num_frames,
            "num_tracks": len(queries),
            "tracker": self.spec.name,
            "weights_hash": self.spec.weights_hash,
            "num_saturated": TracksBlob(blob).header.num_saturated,
            "visible_share": float(tracks.visible.mean(dtype=np.float64)) if tracks.visible.size else None,
            "mean_step_px": mean_step_px(tracks),
        }

    def _open(self, shard: int, rows: dict[str, dict[str, Any]]) -> Clip:
        """The clip with its flow, if the tracker follows flow; otherwise its bytes are checked against their hash."""
        url = self.inputs["clips"].shard_url(shard)
        if "flow" not in self.inputs:
            read_clip(self.inputs["clips"], shard, rows["clips"])
            return Clip(rows["clips"], url, None, ReadCounter())
        if "flow" not in rows:
            raise Missing("the clip has no flow; see the quarantine.parquet of the flow artifact")
        row = rows["clips"] | {name: rows["flow"][name] for name in ("flow_offset", "flow_size", "num_pairs")}
        return Clip(row, url, self.inputs["flow"].shard_url(shard), ReadCounter())


def mean_step_px(tracks: Tracks) -> float | None:
    """Mean motion from frame to frame of points that are seen in both; None where there is none."""
    both = tracks.visible[1:] & tracks.visible[:-1]
    if not both.any():
        return None
    steps = np.diff(tracks.points_px.astype(np.float64), axis=0)[both]
    return float(np.sqrt(np.square(steps).sum(1)).mean())
