"""Plan: from scans to rows of `_plan.parquet`. New sources go into new shards; existing rows never change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kinema.configs import ClipConfig
from kinema.configs.json_text import json_text
from kinema.pipelines.artifacts import sample_key
from kinema.pipelines.shard.media import Source
from kinema.pipelines.shard.scan import FrameScan
from kinema.pipelines.video.signature import clip_signature, is_flat, looks_alike, perceptual_hash

_FULL = 1.25  # a shard may get this many times `shard_mb` before it is divided
_DURATIONS_ALIKE = 0.1  # relative difference in length up to which clips are compared

SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("source_hash", pa.string()),
        ("shot", pa.int32()),
        ("clip", pa.int32()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("num_frames", pa.int32()),
        ("expected_bytes", pa.int64()),
        ("phash", pa.uint64()),
        ("duplicate_of", pa.string()),
        ("near_duplicate_of", pa.string()),
        ("labels", pa.string()),
    ]
)


@dataclass(frozen=True)
class PlannedClip:
    """One clip before it has a shard."""

    row: dict
    """All columns but shard, duplicate_of and near_duplicate_of."""
    signature: np.ndarray
    """int8 [5, 64]."""


def plan_source(source: Source, scan: FrameScan, clip: ClipConfig, config_hash: str) -> list[PlannedClip]:
    """The clips of one good source."""
    spans, _ = scan.clips(clip)
    start, tick = scan.facts["start"], scan.time_base
    labels = json_text(source.labels, sort_keys=True, ensure_ascii=False) if source.labels else None
    clips = []
    for number, span in enumerate(spans):
        end = span.start + len(span.frames) / (span.fps * tick)
        signature = clip_signature(scan.signatures[span.frames])
        row = {
            "key": sample_key(source.id, scan.content_hash, str(span.start), str(end), config_hash),
            "source": source.id,
            "source_hash": scan.content_hash,
            "shot": span.shot,
            "clip": number,
            "start_s": float((span.start - start) * tick),
            "end_s": float((end - start) * tick),
            "num_frames": len(span.frames),
            "expected_bytes": len(span.frames) * scan.facts["bytes_per_frame"],
            "phash": perceptual_hash(signature),
            "labels": labels,
        }
        clips.append(PlannedClip(row, signature))
    return clips


class Duplicates:
    """Marks clips that repeat an earlier one, exactly or nearly. Earlier means earlier in the plan."""

    def __init__(self, bits: int):
        self._bits = bits
        self._exact: dict[tuple, str] = {}
        self._by_band: dict[tuple[int, int], list[PlannedClip]] = defaultdict(list)

    def add(self, clip: PlannedClip) -> tuple[str | None, str | None]:
        """Returns: keys of the clip it equals and of the clip it resembles; None where it is the first."""
        row = clip.row
        same = (row["source_hash"], row["start_s"], row["end_s"])
        exact = self._exact.setdefault(same, row["key"])
        if exact != row["key"]:
            return exact, None
        near = None if is_flat(clip.signature) else self._find_near(clip)
        return None, near

    def _find_near(self, clip: PlannedClip) -> str | None:
        """Hashes that differ in at most b bits agree in one of b + 1 bands, so only those are compared."""
        bands = self._bands(clip.row["phash"])
        for band in bands:
            for other in self._by_band[band]:
                if self._alike(clip, other):
                    return other.row["key"]
        for band in bands:
            self._by_band[band].append(clip)
        return None

    def _alike(self, a: PlannedClip, b: PlannedClip) -> bool:
        if (a.row["phash"] ^ b.row["phash"]).bit_count() > self._bits:
            return False
        length_a, length_b = (clip.row["end_s"] - clip.row["start_s"] for clip in (a, b))
        if abs(length_a - length_b) > _DURATIONS_ALIKE * max(length_a, length_b):
            return False
        return looks_alike(a.signature, b.signature, self._bits)

    def _bands(self, phash: int) -> list[tuple[int, int]]:
        edges = [64 * i // (self._bits + 1) for i in range(self._bits + 2)]
        return [
            (i, phash >> low & ((1 << (high - low)) - 1))
            for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False))
        ]


def assign_shards(expected_bytes: Sequence[int], *, first: int, shard_mb: int, min_shards: int) -> list[int]:
    """Shard number of each clip: consecutive clips, shards of like size, none empty.

    Args:
        first: number of the first new shard.
        min_shards: how many shards the whole artifact should have at least, where there are that many clips.
    """
    num_clips = len(expected_bytes)
    largest = shard_mb * 1_000_000 * _FULL
    num_shards = max(1, int(-(-sum(expected_bytes) // largest)), min_shards - first)
    num_shards = min(num_shards, num_clips)
    left_bytes, filled = float(sum(expected_bytes)), 0.0
    shards, current = [], 0
    for index, size in enumerate(expected_bytes):
        shards.append(first + current)
        filled += size
        left_shards = num_shards - current
        must_leave = num_clips - index - 1 == left_shards - 1
        if left_shards > 1 and (must_leave or filled >= left_bytes / left_shards):
            left_bytes -= filled
            filled = 0.0
            current += 1
    return shards


def new_rows(
    clips: Iterable[PlannedClip], duplicates: Duplicates, *, first: int, shard_mb: int, min_shards: int
) -> pa.Table:
    """Rows to append for new clips, in their order."""
    rows = []
    for clip in clips:
        duplicate_of, near_duplicate_of = duplicates.add(clip)
        rows.append({**clip.row, "duplicate_of": duplicate_of, "near_duplicate_of": near_duplicate_of})
    sizes = [row["expected_bytes"] for row in rows]
    if rows:
        shards = assign_shards(sizes, first=first, shard_mb=shard_mb, min_shards=min_shards)
        rows = [{**row, "shard": shard} for row, shard in zip(rows, shards, strict=True)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)
