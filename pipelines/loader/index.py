"""Which clips can be trained on: clips joined with their flow by key, the rest counted by reason."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.loader.clip import Clip, ReadCounter

_CACHED_CLIPS = 256

_PLAIN_COLUMNS = ("key", "shard", "num_frames", "height", "width", "fps_num", "fps_den", "codec", "source", "labels")
_MEMBER_COLUMNS = ("mp4_offset", "mp4_size", "json_offset", "json_size", "masks_offset", "masks_size")
_PACKET_COLUMNS = ("extradata", "packet_offset", "packet_size", "packet_frame", "packet_keyframe")
_JUDGED_COLUMNS = ("key", "num_frames", "motion_score", "duplicate_of")
_FLOW_COLUMNS = ("flow_shard", "flow_offset", "flow_size", "num_pairs")


class ClipIndex:
    """The usable clips of an artifact, by number; picklable, for loader workers and other nodes.

    `left_out` counts the clips that are not in it, by reason.
    """

    def __init__(
        self,
        table: pa.Table,
        clips_url: str,
        shard_urls: dict[int, str],
        flow_shard_urls: dict[int, str],
        left_out: dict[str, int],
    ):
        self._table: pa.Table | None = table
        self._file: str | None = None
        self._length = table.num_rows
        self.clips_url = clips_url
        self._shard_urls, self._flow_shard_urls = shard_urls, flow_shard_urls
        self.left_out = left_out
        self.counter = ReadCounter()
        self._cache: OrderedDict[int, Clip] = OrderedDict()

    @classmethod
    def open(
        cls,
        clips_url: str | Path,
        flow_url: str | Path | None = None,
        *,
        min_motion: float = 0.0,
        skip_duplicates: bool = True,
        min_frames: int = 1,
    ) -> ClipIndex:
        """Join clips and flow; leave out what cannot or should not be used.

        Args: min_motion, lowest motion score; skip_duplicates, without clips that equal an earlier one; min_frames,
            without shorter clips.
        Raises: ValueError when an artifact is missing or unfinished, or no clip is left: it names the reasons with
            counts.
        """
        clips = Artifact.read(clips_url)
        if clips.kind != "clips":
            raise ValueError(f"{clips.url} holds {clips.kind}, not clips; give clips= the output of `kinema shard`")
        samples = clips.samples()
        left_out: dict[str, int] = {}
        _count(left_out, "quarantined by shard", clips.plan.num_rows - samples.num_rows)

        # Judged on a few narrow columns; the packet tables, most of the bytes, are copied once, at the end.
        judged = samples.select([name for name in _JUDGED_COLUMNS if name in samples.column_names])
        judged = judged.append_column("row", pa.array(range(samples.num_rows), pa.int64()))
        if skip_duplicates and "duplicate_of" in judged.column_names:
            judged = _keep(judged, pc.is_null(judged["duplicate_of"]), left_out, "exact duplicate")
        long_enough = pc.greater_equal(judged["num_frames"], min_frames)
        judged = _keep(judged, long_enough, left_out, f"under {min_frames} frames")
        if min_motion > 0:
            judged = _with_motion(judged, min_motion, left_out)
        flow = None if flow_url is None else Artifact.read(flow_url)
        if flow is not None:
            judged = _with_flow(judged, flow, left_out)
        if not judged.num_rows:
            raise ValueError(_nothing_left(clips, flow, left_out))

        wanted = [*_PLAIN_COLUMNS, *_MEMBER_COLUMNS, *_PACKET_COLUMNS]
        table = samples.select([name for name in wanted if name in samples.column_names])
        table = table.take(judged["row"]).combine_chunks()
        for name in _FLOW_COLUMNS if flow is not None else ():
            table = table.append_column(name, judged[name].combine_chunks())
        return cls(table, clips.url, _shard_urls(clips, table["shard"]), _flow_shard_urls(flow, table), left_out)

    def __len__(self) -> int:
        return self._length

    @property
    def keys(self) -> list[str]:
        """Key of every clip, in order."""
        return self.table["key"].to_pylist()

    @property
    def table(self) -> pa.Table:
        """One row per clip."""
        if self._table is None:
            with pa.memory_map(self._file) as source:
                self._table = pa.ipc.open_file(source).read_all()
        return self._table

    def clip(self, number: int) -> Clip:
        """Clip `number` of 0..len-1. What was parsed of the last few hundred clips stays in memory."""
        clip = self._cache.get(number)
        if clip is None:
            if not 0 <= number < len(self):
                raise IndexError(f"clip {number} of {len(self)}")
            row = self.table.slice(number, 1).to_pylist()[0]
            flow_shard = row.get("flow_shard")
            flow_url = None if flow_shard is None else self._flow_shard_urls[flow_shard]
            clip = self._cache[number] = Clip(row, self._shard_urls[row["shard"]], flow_url, self.counter)
            if len(self._cache) > _CACHED_CLIPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(number)
        return clip

    def on_disk(self, folder: str | Path) -> ClipIndex:
        """The same index, whose pickles carry the name of a file in `folder` instead of the rows.

        Processes of this machine then share one copy of the rows in memory, however many clips there are.
        """
        path = Path(folder) / "clip_index.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, self.table.schema) as writer:
            writer.write_table(self.table)
        copy = ClipIndex(self.table, self.clips_url, self._shard_urls, self._flow_shard_urls, self.left_out)
        copy._file = str(path)
        return copy

    def describe(self) -> str:
        """`120 clips; left out: 3 exact duplicate, 1 without flow`."""
        return f"{len(self)} clips" + (f"; left out: {_listed(self.left_out)}" if self.left_out else "")

    def __getstate__(self) -> dict[str, Any]:
        table = self._table if self._file is None else None
        return {**self.__dict__, "_table": table, "_cache": OrderedDict(), "counter": ReadCounter()}


def _count(left_out: dict[str, int], reason: str, number: int) -> None:
    if number:
        left_out[reason] = left_out.get(reason, 0) + number


def _keep(table: pa.Table, mask: pa.ChunkedArray, left_out: dict[str, int], reason: str) -> pa.Table:
    kept = table.filter(mask)
    _count(left_out, reason, table.num_rows - kept.num_rows)
    return kept


def _with_motion(table: pa.Table, min_motion: float, left_out: dict[str, int]) -> pa.Table:
    if "motion_score" not in table.column_names:
        raise ValueError(f"loader.min_motion={min_motion}, but these clips carry no motion score; shard them with one")
    score = pc.fill_null(pc.cast(table["motion_score"], pa.float64()), float("nan"))
    table = table.set_column(table.schema.get_field_index("motion_score"), "motion_score", score)
    table = _keep(table, pc.invert(pc.is_nan(table["motion_score"])), left_out, "without motion score")
    reason = f"motion score under {min_motion:g}"
    return _keep(table, pc.greater_equal(table["motion_score"], min_motion), left_out, reason)


def _with_flow(table: pa.Table, flow: Artifact, left_out: dict[str, int]) -> pa.Table:
    """Rows that have a flow blob with at least one pair, with the columns that say where it lies."""
    if flow.kind != "flow":
        raise ValueError(f"{flow.url} holds {flow.kind}, not flow; give flow= the output of `kinema teach`")
    blobs = flow.samples(["key", "shard", "flow_offset", "flow_size", "num_pairs"]).combine_chunks()
    blobs = blobs.rename_columns(["key", *_FLOW_COLUMNS])
    place = pc.index_in(table["key"], value_set=blobs["key"].combine_chunks())
    quarantined = pc.is_in(table["key"], value_set=flow.quarantined()["key"].combine_chunks())
    table = table.append_column("place", place).append_column("quarantined", quarantined)
    by_teacher = pc.and_(pc.is_null(table["place"]), table["quarantined"])
    table = _keep(table, pc.invert(by_teacher), left_out, "quarantined by teach")
    table = _keep(table, pc.is_valid(table["place"]), left_out, "without flow")
    joined = blobs.take(table["place"])
    for name in _FLOW_COLUMNS:
        table = table.append_column(name, joined[name])
    return _keep(table, pc.greater(table["num_pairs"], 0), left_out, "without a flow pair")


def _shard_urls(artifact: Artifact, shards: pa.ChunkedArray) -> dict[int, str]:
    return {shard: artifact.shard_url(shard) for shard in pc.unique(shards).to_pylist()}


def _flow_shard_urls(flow: Artifact | None, table: pa.Table) -> dict[int, str]:
    return {} if flow is None else _shard_urls(flow, table["flow_shard"])


def _listed(left_out: dict[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in left_out.items())


def _nothing_left(clips: Artifact, flow: Artifact | None, left_out: dict[str, int]) -> str:
    places = clips.url if flow is None else f"{clips.url} with flow {flow.url}"
    sources = clips.quarantined().filter(pc.is_null(clips.quarantined()["key"])).num_rows
    text = f"no usable sample in {places}: {clips.plan.num_rows} clips planned"
    if left_out:
        text += f", left out: {_listed(left_out)}"
    if sources:
        text += f"; {sources} sources were quarantined before they gave a clip (see quarantine.parquet)"
    if "without flow" in left_out and "quarantined by teach" not in left_out:
        text += "; was the flow made from these clips?"
    return text
