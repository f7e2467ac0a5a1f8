"""One shard's work: read its clips, compute their flow, write the sidecar shard. Knows nothing of Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32

from kinema.models.flow.geometry import resize_flow
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.sidecars.flow_codec import FlowBlob, encode_clip_flow
from kinema.pipelines.sidecars.sidecar import Count, Sample, ShardOutcome, clip_frames, read_clip, write_shard
from kinema.pipelines.teach import quality
from kinema.pipelines.teach.clip_flow import OtherFlow, clip_flow
from kinema.pipelines.teach.consensus import ConsensusTeacher
from kinema.pipelines.teach.protocol import Pairing, Teacher
from kinema.pipelines.teach.teachers import TeacherSpec, use_threads
from kinema.pipelines.video.errors import Missing

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
        *((name, pa.list_(kind)) for name, kind in quality.COLUMNS.items()),
        ("flow_offset", pa.int64()),
        ("flow_size", pa.int64()),
    ]
)


class ShardTeacher:
    """Holds a loaded teacher; calling it with a shard number builds that shard of the flow artifact.

    Args: `count(clips, pairs)` is told of every finished clip; compare, another teacher's flow of the same clips;
        members, the flow that a consensus judges, by the names of their hashes in a commit.
    """

    def __init__(
        self,
        clips: Artifact,
        flow: Artifact,
        spec: TeacherSpec,
        pairing: Pairing,
        count: Count | None = None,
        teacher: Teacher | ConsensusTeacher | None = None,
        compare: Artifact | None = None,
        members: Mapping[str, Artifact] | None = None,
    ):
        self.clips, self.flow, self.spec, self.pairing = clips, flow, spec, pairing
        self.compare, self.members = compare, dict(members or {})
        self.count = count or (lambda clips, pairs: None)
        self.teacher = teacher or spec.load()

    def __call__(self, shard: int) -> ShardOutcome:
        """Build and commit one shard. Raises: ValueError when the clip shard is missing or was not committed."""
        inputs = {"clips": self.clips} | ({} if self.compare is None else {"compare": self.compare}) | self.members
        with use_threads(self.spec.threads):
            return write_shard(
                inputs,
                self.flow,
                shard,
                FLOW_COLUMNS,
                lambda key, rows: self._clip(shard, rows),
                self.count,
                units="num_pairs",
            )

    def _clip(self, shard: int, rows: dict[str, dict[str, Any]]) -> Sample:
        """Blob and row of one clip. Raises: SourceError, BadFlow."""
        row, compared = rows["clips"], rows.get("compare")
        mp4 = read_clip(self.clips, shard, row)
        height, width = self.spec.flow_size(row["height"], row["width"])
        teacher = self.teacher
        if isinstance(teacher, ConsensusTeacher):
            blobs = self._members_flow(shard, rows)
            teacher, height, width = teacher.of_clip(blobs), blobs[0].header.height, blobs[0].header.width
        signals: list[quality.PairQuality] = []
        other = None if compared is None else self._other_flow(shard, compared, height, width)
        pairs = clip_flow(clip_frames(mp4, row), teacher, self.pairing, signals, other)
        blob = encode_clip_flow(
            pairs,
            height=height,
            width=width,
            teacher=self.spec.name,
            weights_hash=self.spec.weights_hash,
            frames=row["num_frames"],
        )
        columns = quality.columns(signals)
        return {"flow": blob}, {
            "source": row["source"],
            "height": height,
            "width": width,
            "num_frames": row["num_frames"],
            "num_pairs": len(signals),
            "teacher": self.spec.name,
            "weights_hash": self.spec.weights_hash,
            "num_saturated": FlowBlob(blob).num_saturated,
            "mean_flow_px": _mean(columns["pair_motion_px"]),
            "occluded_share": _mean(columns["pair_occluded_share"]) if self.pairing.stores_occlusion else None,
            **columns,
        }

    def _members_flow(self, shard: int, rows: dict[str, dict[str, Any]]) -> list[FlowBlob]:
        """The judged flow of a clip. Raises: Missing when a member quarantined it."""
        absent = [artifact.url for name, artifact in self.members.items() if name not in rows]
        if absent:
            raise Missing(f"the clip has no flow in {', '.join(absent)}; see quarantine.parquet there")
        places = [(artifact.shard_url(shard), rows[name]) for name, artifact in self.members.items()]
        return [FlowBlob(read_range(url, row["flow_offset"], row["flow_size"])) for url, row in places]

    def _other_flow(self, shard: int, row: dict[str, Any], height: int, width: int) -> OtherFlow:
        """The other teacher's flow of a clip, at this teacher's size."""
        assert self.compare is not None
        url = self.compare.shard_url(shard)
        blob = FlowBlob(read_range(url, row["flow_offset"], row["flow_size"]))
        stored = set(blob.pairs)

        def flow(t: int, gap: int) -> Float32[np.ndarray, "2 H W"] | None:
            if (t, gap) not in stored:
                return None
            return resize_flow(torch.from_numpy(blob.flow(t, gap)), height, width).numpy()

        return flow


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
