"""Build: one planned shard from its sources, one clip in memory at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
import pyarrow as pa

from kinema.configs import ClipConfig
from kinema.pipelines.artifacts import Artifact, ShardWriter
from kinema.pipelines.artifacts.tables import canonical_json
from kinema.pipelines.shard.limits import memory_limited, needs_more, one_thread
from kinema.pipelines.shard.media import AnyVideo, Source, open_source, read_all
from kinema.pipelines.shard.runs import THUMBNAIL_SIDE
from kinema.pipelines.shard.scan import FrameScan, load_scan, stall_watch
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.encode import ClipEncoder
from kinema.pipelines.video.errors import Corrupt, Missing, SourceError, TooMuchMemory
from kinema.pipelines.video.masks import masks_npz, parse_palette, read_masks
from kinema.pipelines.video.motion import MOTION, is_measured
from kinema.pipelines.video.packets import packet_table
from kinema.pipelines.video.picture import PictureMaker, Thumbnails, matrix_fallback
from kinema.pipelines.video.timeline import ClipSpan

ROWS = pa.schema(
    [
        ("source", pa.string()),
        ("source_hash", pa.string()),
        ("shot", pa.int32()),
        ("clip", pa.int32()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("num_frames", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps_num", pa.int64()),
        ("fps_den", pa.int64()),
        ("rotation", pa.int32()),
        ("codec", pa.string()),
        ("motion_score", pa.float64()),
        ("phash", pa.uint64()),
        ("duplicate_of", pa.string()),
        ("near_duplicate_of", pa.string()),
        ("labels", pa.string()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("mp4_offset", pa.int64()),
        ("mp4_size", pa.int64()),
        ("masks_offset", pa.int64()),
        ("masks_size", pa.int64()),
        ("extradata", pa.binary()),
        ("packet_offset", pa.list_(pa.int64())),
        ("packet_size", pa.list_(pa.int32())),
        ("packet_frame", pa.list_(pa.int32())),
        ("packet_keyframe", pa.list_(pa.bool_())),
    ]
)
"""Columns of samples.parquet besides key, shard and position."""


@dataclass(frozen=True)
class BuildTask:
    """What a worker needs to build one shard."""

    artifact: Artifact
    shard: int
    rows: list[dict[str, Any]]
    """The shard's plan."""
    sources: dict[str, Source]
    """Where the sources of these rows are now; one that is gone is missing here."""
    clip: ClipConfig
    frames_fps: float
    motion: str
    stall_s: float | None
    stream: int = -1
    """Index of the video stream to take; -1 chooses."""
    palette: tuple[str, ...] = ()
    """Labels of masks' colours."""
    memory_bytes: int = 0
    """What decoding and encoding may allocate; 0: anything."""
    excluded: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    """Sources that stopped earlier attempts -> (error class, message, attempts)."""


@dataclass(frozen=True)
class Built:
    """What became of a shard."""

    num_samples: int
    num_bytes: int
    quarantined: tuple[str, ...]
    """Sources of which clips are missing."""


@one_thread()
def build_shard(task: BuildTask) -> Built:
    """Encode the shard's clips and commit it. What cannot be decoded is quarantined with the shard."""
    hashes = {row["source"]: row["source_hash"] for row in task.rows}
    lost: set[str] = set()
    with task.artifact.shard_writer(task.shard, ROWS) as writer:
        for source_id, rows in _by_source(task.rows):
            if not _build_source(task, source_id, rows, writer):
                lost.add(source_id)
        record = writer.commit(num_planned=len(task.rows), input_hashes=hashes)
    return Built(record["num_samples"], record["bytes"], tuple(sorted(lost)))


@one_thread()
def try_source(task: BuildTask) -> None:
    """Encode a source's clips and throw them away, to see whether it stops its worker.

    Raises: SourceError and whatever stopped the build.
    """
    for source_id, rows in _by_source(task.rows):
        for _ in _clips_of(task, source_id, rows):
            pass


def _by_source(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for source_id, group in itertools.groupby(rows, key=lambda row: row["source"]):
        yield source_id, list(group)


def _build_source(task: BuildTask, source_id: str, rows: list[dict[str, Any]], writer: ShardWriter) -> bool:
    """Returns: whether all clips of the source are in the shard."""
    if source_id in task.excluded:
        _quarantine(writer, rows, *task.excluded[source_id])
        return False
    written = 0
    try:
        with memory_limited(task.memory_bytes):
            for key, members, row in _clips_of(task, source_id, rows):
                writer.add(key, members, row)
                written += 1
    except SourceError as error:
        _quarantine(writer, rows[written:], type(error).__name__, str(error), 1)
        return False
    except MemoryError:
        why = needs_more("making its clips", task.memory_bytes)
        _quarantine(writer, rows[written:], TooMuchMemory.__name__, why, 1)
        return False
    return True


def _quarantine(writer: ShardWriter, rows: list[dict[str, Any]], error_class: str, message: str, attempts: int) -> None:
    for row in rows:
        writer.quarantine(row["key"], stage="build", error_class=error_class, message=message, attempts=attempts)


def _clips_of(
    task: BuildTask, source_id: str, rows: list[dict[str, Any]]
) -> Iterator[tuple[str, dict[str, bytes], dict[str, Any]]]:
    """(key, members, columns) of each planned clip of one source."""
    scan = load_scan(task.artifact, source_id)
    if not isinstance(scan, FrameScan) or scan.content_hash != rows[0]["source_hash"]:
        raise Missing("the file changed after it was planned, before its clips were cut")
    if source_id not in task.sources:
        raise Missing("the file is no longer there; it was planned in an earlier run")
    source = task.sources[source_id]
    alive = stall_watch(task.stall_s)
    spans, _ = scan.clips(task.clip)
    try:
        with open_source(source, task.frames_fps, task.stream, task.clip.deinterlace) as video:
            cursor = FrameCursor(video, scan, alive)
            for row in rows:
                span = spans[row["clip"]] if row["clip"] < len(spans) else None
                if span is None or len(span.frames) != row["num_frames"]:
                    raise Corrupt("the clips were planned by another version of the program; choose another out=")
                if span.copied and isinstance(video, VideoFile):
                    mp4 = video.copy(scan.pts[span.frames].tolist(), span.fps)
                    motion_score = measure_motion(cursor, scan, span, task.motion)
                else:
                    mp4, motion_score = encode_clip(cursor, scan, span, task.clip, task.motion)
                meta = _sample_meta(row, scan, span, task.clip, motion_score, mp4, bool(source.masks))
                members = {"mp4": mp4, "json": canonical_json(meta)}
                if source.masks:
                    members["masks.npz"] = _masks(source, scan, span, task.palette)
                yield row["key"], members, _columns(meta, row, mp4)
    except av.FFmpegError as error:
        raise Corrupt(f"encoding or decoding fails: {error.strerror}") from None


class _InexactSeek(Exception):
    """A seek did not lead to the frames the scan saw."""


class FrameCursor:
    """The frames of a source by index, seeking to the keyframe before where the container does that exactly."""

    def __init__(self, video: AnyVideo, scan: FrameScan, alive: Callable[[], None] = lambda: None):
        self._video, self._scan, self._alive = video, scan, alive
        self._seeks = scan.facts["seeks"]
        self._needs_before = int(scan.interlaced.any())  # what becomes of a field depends on the frame before
        self._frames: Iterator[av.VideoFrame] | None = None
        self._next = 0

    def frames(self, first: int, last: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) from `first` up to and without `last`. Raises: Corrupt if they differ from the scan's."""
        if self._frames is None or first < self._next or self._keyframe_between(self._next, first):
            self._frames = self._go_to(first)
        while self._next < last:
            self._alive()
            frame = next(self._frames, None)
            if frame is None or frame.pts != self._scan.pts[self._next]:
                raise _InexactSeek
            index = self._next
            self._next += 1
            if index >= first:
                yield index, frame

    def give_up_seeking(self, where: int) -> None:
        """Decode from the start from now on. Raises: Corrupt when that is what was done."""
        if not self._seeks:
            raise Corrupt(f"frame {where} decodes differently than the first time")
        self._seeks, self._frames = False, None

    def _keyframe_between(self, after: int, upto: int) -> bool:
        keys = self._scan.keyframes
        return self._seeks and bool(((keys > after) & (keys <= upto - self._needs_before)).any())

    def _go_to(self, first: int) -> Iterator[av.VideoFrame]:
        """The frames from `self._next` on, which becomes a frame at or before `first`."""
        self._next = 0
        if not self._seeks or first == 0 or not self._keyframe_between(0, first):
            return self._video.frames()
        frames = self._video.frames(from_pts=int(self._scan.pts[first - self._needs_before]))
        start = next(frames, None)
        if start is None or start.pts is None:
            raise _InexactSeek
        index = int(np.searchsorted(self._scan.pts, start.pts))
        if index > first - self._needs_before or self._scan.pts[index] != start.pts:
            raise _InexactSeek
        self._next = index
        return itertools.chain([start], frames)


def encode_clip(
    cursor: FrameCursor, scan: FrameScan, span: ClipSpan, clip: ClipConfig, motion: str
) -> tuple[bytes, float | None]:
    """Encode one clip; holds its encoded bytes and a few frames.

    Returns: the mp4, and the motion score (None when not measured).
    Raises: Corrupt if the source decodes differently than when it was scanned.
    """
    while True:
        try:
            return _encode_once(cursor, scan, span, clip, motion)
        except (_InexactSeek, SourceError) as error:
            try:
                cursor.give_up_seeking(int(span.frames[0]))
            except Corrupt:
                raise (error if isinstance(error, SourceError) else Corrupt(_differs(span))) from None


def _differs(span: ClipSpan) -> str:
    return f"frames {span.frames[0]} to {span.frames[-1]} decode differently than the first time"


def _encode_once(
    cursor: FrameCursor, scan: FrameScan, span: ClipSpan, clip: ClipConfig, motion: str
) -> tuple[bytes, float | None]:
    first, last = int(span.frames[0]), int(span.frames[-1])
    times_shown = np.bincount(span.frames - first, minlength=last - first + 1)
    spec = scan.stretches[span.stretch].spec
    maker, thumbnails = PictureMaker(spec), Thumbnails(spec.orientation, THUMBNAIL_SIDE, spec)
    measure = MOTION[motion]()
    with ClipEncoder(clip, spec, span.fps) as encoder:
        for index, frame in cursor.frames(first, last + 1):
            shown = range(encoder.num_frames, encoder.num_frames + times_shown[index - first])
            measured = sum(map(is_measured, shown)) if motion != "none" else 0
            if measured or index in (first, last):
                small = thumbnails.make(frame)
            if index in (first, last) and zlib.crc32(small.data) != scan.checks[index]:
                raise _InexactSeek
            if shown:
                picture = maker.make(frame)
            for _ in shown:
                encoder.add(picture)
            for _ in range(measured):
                measure.add(small)
        return encoder.finish(), measure.score()


def measure_motion(cursor: FrameCursor, scan: FrameScan, span: ClipSpan, motion: str) -> float | None:
    """Motion score of a clip whose packets were taken over: from samples, where the scan took some.

    Raises: SourceError.
    """
    if motion == "none":
        return None
    if len(scan.motion_shares):
        shares = scan.motion_shares[span.frames[1:]]
        if not np.isnan(shares).all():
            return float(np.nanmean(shares))
    spec = scan.stretches[span.stretch].spec
    while True:
        thumbnails, measure = Thumbnails(spec.orientation, THUMBNAIL_SIDE, spec), MOTION[motion]()
        try:
            for index, frame in cursor.frames(int(span.frames[0]), int(span.frames[-1]) + 1):
                if is_measured(index - int(span.frames[0])):
                    measure.add(thumbnails.make(frame))
            return measure.score()
        except _InexactSeek:
            cursor.give_up_seeking(int(span.frames[0]))


def _codec_of(scan: FrameScan, span: ClipSpan, clip: ClipConfig) -> str:
    if span.copied:
        return scan.facts["codec"]
    return "h264" if clip.codec == "copy" else clip.codec


def _gop_of(scan: FrameScan, span: ClipSpan, clip: ClipConfig) -> int:
    """Frames of the longest group of pictures."""
    if not span.copied:
        return clip.gop
    first, last = int(span.frames[0]), int(span.frames[-1]) + 1
    starts = [start for start in scan.stretches[span.stretch].groups if first <= start < last]
    return int(np.diff([*starts, last]).max())


def _masks(source: Source, scan: FrameScan, span: ClipSpan, palette: tuple[str, ...]) -> bytes:
    spec = scan.stretches[span.stretch].spec
    paths = [source.masks[index] for index in span.frames]
    size, padding = (spec.width, spec.height), (spec.pad_right, spec.pad_bottom)
    labels, annotated = read_masks(paths, size, padding, read_all, parse_palette(palette))
    return masks_npz(labels, annotated)


def _sample_meta(
    row: dict[str, Any],
    scan: FrameScan,
    span: ClipSpan,
    clip: ClipConfig,
    motion_score: float | None,
    mp4: bytes,
    has_masks: bool,
) -> dict[str, Any]:
    """The sample's json. What is irregular about its source is there only where something is."""
    stretch = scan.stretches[span.stretch]
    spec, look, fps = stretch.spec, stretch.look, span.fps
    found = irregularities(scan, span)
    return {
        **({"irregular": found} if found else {}),
        "key": row["key"],
        "source": row["source"],
        "source_hash": row["source_hash"],
        "shot": row["shot"],
        "clip": row["clip"],
        "pts": scan.pts[span.frames].tolist(),
        "time_base": scan.facts["time_base"],
        "start_s": row["start_s"],
        "end_s": row["end_s"],
        "fps": [fps.numerator, fps.denominator],
        "num_frames": len(span.frames),
        "width": spec.width,
        "height": spec.height,
        "padding": [spec.pad_right, spec.pad_bottom],
        "rotation": spec.orientation.degrees,
        "mirrored": spec.orientation.mirror,
        "codec": _codec_of(scan, span, clip),
        "gop": _gop_of(scan, span, clip),
        "pix_fmt": look.pix_fmt if span.copied else spec.pix_fmt,
        "color": {
            "matrix": spec.matrix,
            "range": spec.color_range,
            "primaries": spec.primaries,
            "transfer": spec.transfer,
        },
        "source_facts": {
            **{name: scan.facts[name] for name in ("container", "codec", "stream")},
            "stored_width": look.width,
            "stored_height": look.height,
            "stored_pix_fmt": look.pix_fmt,
            "pixel_aspect_ratio": [look.pixel_aspect.numerator, look.pixel_aspect.denominator],
            "fps": [stretch.rate.fps.numerator, stretch.rate.fps.denominator],
            "variable_rate": stretch.rate.variable,
        },
        "motion_score": None if motion_score is None else round(motion_score, 8),
        "phash": f"{row['phash']:016x}",
        "duplicate_of": row["duplicate_of"],
        "near_duplicate_of": row["near_duplicate_of"],
        "has_masks": has_masks,
        "sha256": hashlib.sha256(mp4).hexdigest(),
        "labels": json.loads(row["labels"]) if row["labels"] else {},
    }


def irregularities(scan: FrameScan, span: ClipSpan) -> dict[str, Any]:
    """What was irregular about a clip's frames and what was done about it; empty for a clean source."""
    stretch = scan.stretches[span.stretch]
    spec, look = stretch.spec, stretch.look
    found: dict[str, Any] = {}
    if span.repeats:
        found["repeated_frames"] = list(span.repeats)
    if len(scan.stretches) > 1:
        found["stretch"] = span.stretch
    if stretch.clock_offset:
        found["clock_offset"] = stretch.clock_offset
    if look.pixel_aspect != 1:
        source = [look.pixel_aspect.numerator, look.pixel_aspect.denominator]
        found["pixel_aspect_ratio"] = {"source": source, "clip": list(spec.pixel_aspect)}
    if fallback := matrix_fallback(look.pix_fmt, look.matrix, look.primaries):
        found["matrix"] = fallback
    if interlaced := int(scan.interlaced[np.unique(span.frames)].sum()):
        found["interlaced_frames"] = interlaced
    if scan.facts["dropped_damaged"]:
        found["dropped_damaged"] = scan.facts["dropped_damaged"]
    return found


def _columns(meta: dict[str, Any], row: dict[str, Any], mp4: bytes) -> dict[str, Any]:
    """The sample's row of samples.parquet."""
    table = packet_table(mp4)
    if len(table.frame) != meta["num_frames"]:
        raise Corrupt(f"the encoder wrote {len(table.frame)} of {meta['num_frames']} frames")
    same = ("source", "source_hash", "shot", "clip", "start_s", "end_s", "num_frames", "width", "height", "rotation")
    return {
        **{name: meta[name] for name in (*same, "codec", "motion_score", "duplicate_of", "near_duplicate_of")},
        "fps_num": meta["fps"][0],
        "fps_den": meta["fps"][1],
        "phash": row["phash"],
        "labels": row["labels"],
        "masks_offset": 0,
        "masks_size": 0,
        "extradata": table.extradata,
        "packet_offset": table.offset,
        "packet_size": table.size,
        "packet_frame": table.frame,
        "packet_keyframe": table.keyframe,
    }
