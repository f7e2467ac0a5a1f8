"""One shard's work: read its clips, compute their flow, write the sidecar shard. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.errors import StageError
from kinema.pipelines.flow_codec import FlowBlob, encode_clip_flow
from kinema.pipelines.teach.clip_flow import BadFlow, FlowStatistics, Pairing, clip_flow
from kinema.pipelines.teach.teachers import Teacher, TeacherSpec, reduced_size, use_threads
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.errors import Corrupt, Missing, SourceError, Truncated
from kinema.pipelines.video.packets import to_rgb

RETRY = "retry"
# What networks, OpenCV and FFmpeg raise on a clip they cannot take, memory included: it costs the clip, not its shard.
_UNFORESEEN = (ValueError, RuntimeError, cv2.error, av.FFmpegError)

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


class DamagedStorage(SourceError):
    """A clip's bytes cannot be read back as they were written."""


@dataclass(frozen=True)
class ShardOutcome:
    """What one shard came to."""

    clips: int
    pairs: int
    quarantined: int
    bytes: int


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
        count: Callable[[int, int], None] | None = None,
        teacher: Teacher | None = None,
    ):
        self.clips, self.flow, self.spec, self.pairing = clips, flow, spec, pairing
        self.count = count or (lambda clips, pairs: None)
        self.teacher = teacher or spec.load()

    def __call__(self, shard: int) -> ShardOutcome:
        """Build and commit one shard. Raises: ValueError when the clip shard is missing or was not committed."""
        record = self.clips.commit_of(shard)
        if record is None:
            raise ValueError(f"clip shard {shard} of {self.clips.url} is not committed; run `kinema shard` to the end")
        rows = {row["key"]: row for row in self.clips.rows_of(shard).to_pylist()}
        num_pairs, passing = 0, False
        with use_threads(self.spec.threads), self.flow.shard_writer(shard, FLOW_COLUMNS) as writer:
            for key in writer.planned:
                try:
                    blob, row = self._clip(shard, rows.get(key))
                except StageError:
                    raise
                except (SourceError, BadFlow, *_UNFORESEEN) as error:
                    passing |= isinstance(error, (DamagedStorage, *_UNFORESEEN)) and not isinstance(error, BadFlow)
                    writer.quarantine(key, stage="teach", error_class=type(error).__name__, message=str(error))
                    self.count(1, 0)
                    continue
                writer.add(key, {"flow": blob}, row)
                num_pairs += row["num_pairs"]
                self.count(1, row["num_pairs"])
            # RETRY is a hash that no clip shard has, so the next run tries again what may have passed by then.
            committed = writer.commit(input_hashes={"clips": RETRY if passing else record["sha256"]})
        return ShardOutcome(committed["num_samples"], num_pairs, len(writer.quarantined), committed["bytes"])

    def _clip(self, shard: int, row: dict[str, Any] | None) -> tuple[bytes, dict[str, Any]]:
        """Blob and row of one clip. Raises: SourceError, BadFlow."""
        if row is None:
            raise Missing("the clip is no longer in its shard, which was made anew")
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
        return blob, {
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


def read_clip(clips: Artifact, shard: int, row: dict[str, Any]) -> bytes:
    """The mp4 of a clip, compared with the hash in its json. Raises: DamagedStorage."""
    url = clips.shard_url(shard)
    try:
        mp4 = read_range(url, row["mp4_offset"], row["mp4_size"])
        expected = json.loads(read_range(url, row["json_offset"], row["json_size"])).get("sha256")
    except (ValueError, AttributeError) as error:
        raise DamagedStorage(f"clip {row['key']} cannot be read: {error}") from None
    if expected and hashlib.sha256(mp4).hexdigest() != expected:
        raise DamagedStorage(
            f"the bytes of {row['key']} in {url} are not those written; run `kinema verify {clips.url}`"
        )
    return mp4


def clip_frames(mp4: bytes, row: dict[str, Any]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Every frame of a clip once, in order, as RGB.

    Raises: SourceError when a frame is damaged, or the clip has another number or size of frames than its row.
    """
    expected = (row["height"], row["width"])
    num_frames = 0
    with VideoFile(io.BytesIO(mp4)) as video:
        for frame in video.frames():
            if (frame.height, frame.width) != expected:
                found = f"{frame.width}x{frame.height}"
                raise Corrupt(f"frame {num_frames} is {found}, the clip is {expected[1]}x{expected[0]}")
            if num_frames == row["num_frames"]:
                raise Corrupt(f"the clip has more than its {row['num_frames']} frames")
            num_frames += 1
            yield to_rgb(frame)
    if num_frames != row["num_frames"]:
        raise Truncated(f"the clip ends after {num_frames} of {row['num_frames']} frames")
