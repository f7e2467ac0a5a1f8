"""One shard's work: read its clips, compute their flow, write the sidecar shard. Knows nothing of Ray."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.flow_codec import FlowBlob, encode_clip_flow
from kinema.pipelines.sidecar import Count, Sample, ShardOutcome, clip_frames, read_clip, write_shard
from kinema.pipelines.teach.clip_flow import FlowStatistics, Pairing, clip_flow
from kinema.pipelines.teach.teachers import Teacher, TeacherSpec, reduced_size, use_threads

FLOW_COLUMNS = pa.schema(
    [
        ("source", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("num_pairs", pa.int32()),
        ("teacher", pa.string()),
        ("weights_hash", pa.string()),
        ("num_saturated", pa.int64()),
        ("mean_flow_px", pa.float64()),
        ("occluded_share", pa.float64()),
        ("flow_offset", pa.int64()),
        ("flow_size", pa.int64()),
    ]
)


class ShardTeacher:
    """Holds a loaded teacher; calling it with a shard number builds that shard of the flow artifact.

    Args: `count(clips, pairs)` is told of every finished clip.
    """

    def __init__(
        self,
        clips: Artifact,
        flow: Artifact,
        spec: TeacherSpec,
        pairing: Pairing,
        count: Count | None = None,
        teacher: Teacher | None = None,
    ):
        self.clips, self.flow, self.spec, self.pairing = clips, flow, spec, pairing
        self.count = count or (lambda clips, pairs: None)
        self.teacher = teacher or spec.load()

    def __call__(self, shard: int) -> ShardOutcome:
        """Build and commit one shard. Raises: ValueError when the clip shard is missing or was not committed."""
        with use_threads(self.spec.threads):
            return write_shard(
                {"clips": self.clips},
                self.flow,
                shard,
                FLOW_COLUMNS,
                lambda key, rows: self._clip(shard, rows["clips"]),
                self.count,
                units="num_pairs",
            )

    def _clip(self, shard: int, row: dict[str, Any]) -> Sample:
        """Blob and row of one clip. Raises: SourceError, BadFlow."""
        mp4 = read_clip(self.clips, shard, row)
        height, width = reduced_size(row["height"], row["width"], self.spec.short_side)
        statistics = FlowStatistics()
        frames = clip_frames(mp4, row)
        blob = encode_clip_flow(
            statistics.watch(clip_flow(frames, self.teacher, self.pairing)),
            height=height,
            width=width,
            teacher=self.spec.name,
            weights_hash=self.spec.weights_hash,
            frames=row["num_frames"],
        )
        return {"flow": blob}, {
            "source": row["source"],
            "height": height,
            "width": width,
            "num_frames": row["num_frames"],
            "num_pairs": statistics.num_pairs,
            "teacher": self.spec.name,
            "weights_hash": self.spec.weights_hash,
            "num_saturated": FlowBlob(blob).num_saturated,
            "mean_flow_px": statistics.mean_flow_px,
            "occluded_share": statistics.occluded_share,
        }
