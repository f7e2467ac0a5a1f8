"""Which clips can be trained on: clips joined with their flow and tracks by key, the rest counted by reason."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.configs import PairFilterConfig
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.artifacts.layout import MAKERS
from kinema.pipelines.loader.clip import Clip, ReadCounter
from kinema.pipelines.loader.flows import check_signals, signal_columns, usable_pairs
from kinema.pipelines.loader.stream import ShardCache

FlowUse = Literal["choose", "average"]

_CACHED_CLIPS = 256

_PLAIN_COLUMNS = ("key", "shard", "num_frames", "height", "width", "fps_num", "fps_den", "codec", "source", "labels")
_MEMBER_COLUMNS = ("mp4_offset", "mp4_size", "json_offset", "json_size", "masks_offset", "masks_size")
_PACKET_COLUMNS = ("extradata", "packet_offset", "packet_size", "packet_frame", "packet_keyframe")
_JUDGED_COLUMNS = ("key", "num_frames", "motion_score", "duplicate_of")
_FLOW_COLUMNS = ("flow_shard", "flow_offset", "flow_size", "num_pairs")
_USABLE = "flow_usable"
_TRACKS_COLUMNS = ("tracks_shard", "tracks_offset", "tracks_size", "num_tracks")


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
        tracks_shard_urls: dict[int, str] | None = None,
        other_flow_urls: Sequence[dict[int, str]] = (),
        flow_use: FlowUse = "choose",
    ):
        self._table: pa.Table | None = table
        self._file: str | None = None
        self._length = table.num_rows
        self.clips_url = clips_url
        self._shard_urls, self._flow_shard_urls = shard_urls, flow_shard_urls
        self._tracks_shard_urls = tracks_shard_urls or {}
        self._other_flow_urls, self.flow_use = tuple(other_flow_urls), flow_use
        self.left_out = left_out
        self.counter = ReadCounter()
        self.shards: ShardCache | None = None
        """In stream mode, where shards lie whole."""
        self._cache: OrderedDict[int, Clip] = OrderedDict()

    @classmethod
    def open(
        cls,
        clips_url: str | Path,
        flow_url: str | Path | None = None,
        tracks_url: str | Path | None = None,
        *,
        min_motion: float = 0.0,
        skip_duplicates: bool = True,
        min_frames: int = 1,
        other_flows: Sequence[str | Path] = (),
        flow_use: FlowUse = "choose",
        pairs: PairFilterConfig | None = None,
    ) -> ClipIndex:
        """Join clips, flow and tracks; leave out what cannot or should not be used.

        Args: min_motion, lowest motion score; skip_duplicates, without clips that equal an earlier one; min_frames,
            without shorter clips; other_flows, further teachers, and flow_use, whether `drawn` chooses one of all
            teachers or averages them; pairs, limits on the quality of flow pairs.
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
        others = [Artifact.read(url) for url in other_flows]
        if flow is not None:
            judged = _with_flow(judged, flow, left_out, pairs)
        for number, other in enumerate(others, start=1):
            judged = _with_flow(judged, other, left_out, pairs, f"_{number}")
        if pairs is not None and flow is not None and judged.num_rows:
            check_signals(pairs, _known_signals([flow, *others], signal_columns(pairs)))
        tracks = None if tracks_url is None else Artifact.read(tracks_url)
        if tracks is not None:
            judged = _with_sidecar(judged, tracks, "tracks", _TRACKS_COLUMNS, left_out)
        if not judged.num_rows:
            sidecars = [artifact for artifact in (flow, *others, tracks) if artifact is not None]
            raise ValueError(_nothing_left(clips, sidecars, left_out))

        wanted = [*_PLAIN_COLUMNS, *_MEMBER_COLUMNS, *_PACKET_COLUMNS]
        table = samples.select([name for name in wanted if name in samples.column_names])
        table = table.take(judged["row"]).combine_chunks()
        suffixes = ["", *(f"_{number}" for number in range(1, len(others) + 1))]
        flow_columns = [f"{name}{suffix}" for suffix in suffixes for name in (*_FLOW_COLUMNS, _USABLE)]
        for name in (*flow_columns, *_TRACKS_COLUMNS):
            if name in judged.column_names:
                table = table.append_column(name, judged[name].combine_chunks())
        urls = [{} if a is None else _shard_urls(a, table[f"{a.kind}_shard"]) for a in (flow, tracks)]
        other_urls = [_shard_urls(a, table[f"flow_shard_{i}"]) for i, a in enumerate(others, start=1)]
        shard_urls = _shard_urls(clips, table["shard"])
        return cls(table, clips.url, shard_urls, urls[0], left_out, urls[1], other_urls, flow_use)

    def __len__(self) -> int:
        return self._length

    def split(self, hold_out: int) -> tuple[ClipIndex, ClipIndex]:
        """(clips to learn from, clips to judge on): every `hold_out`-th is judged on, one at least if there are two.

        With `hold_out` 0, or a single clip, both are all clips.
        """
        if hold_out == 0 or len(self) < 2:
            return self, self
        step = min(hold_out, len(self))
        judged = list(range(step - 1, len(self), step))
        learned = [number for number in range(len(self)) if number not in set(judged)]
        return self._part(learned, {"held out": len(judged)}), self._part(judged, {})

    def _part(self, numbers: list[int], left_out: dict[str, int]) -> ClipIndex:
        table = self.table.take(pa.array(numbers, pa.int64())).combine_chunks()
        urls = (self._shard_urls, self._flow_shard_urls)
        out = {**self.left_out, **left_out}
        return ClipIndex(
            table, self.clips_url, *urls, out, self._tracks_shard_urls, self._other_flow_urls, self.flow_use
        )

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
            # A shard number that an index without the sidecar lacks is None, which no mapping holds.
            flow_url = self._flow_shard_urls.get(row.get("flow_shard"))
            tracks_url = self._tracks_shard_urls.get(row.get("tracks_shard"))
            clip = Clip(row, self._shard_urls[row["shard"]], flow_url, self.counter, tracks_url)
            clip.add_flows([self._other_flow(row, number) for number in range(1, len(self._other_flow_urls) + 1)])
            self._cache[number] = clip
            if len(self._cache) > _CACHED_CLIPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(number)
        clip.local = self.shards.local if self.shards is not None else str
        return clip

    def drawn(self, number: int, rng: np.random.Generator) -> Clip:
        """Clip `number` with the flow it is learned from this time: one teacher's, drawn by `rng`, or their mean.

        With a single teacher nothing is drawn.
        """
        clip = self.clip(number)
        if clip.num_flows < 2:
            return clip
        return clip.with_flow("average" if self.flow_use == "average" else int(rng.integers(clip.num_flows)))

    def urls_of(self, shard: int) -> list[str]:
        """A clip shard and the sidecar shards of the same number, which hold the same keys."""
        tables = (self._shard_urls, self._flow_shard_urls, *self._other_flow_urls, self._tracks_shard_urls)
        return [table[shard] for table in tables if shard in table]

    def _other_flow(self, row: dict[str, Any], number: int) -> tuple[dict[str, Any], str]:
        place = {name: row.get(f"{name}_{number}") for name in (*_FLOW_COLUMNS, _USABLE)}
        return place, self._other_flow_urls[number - 1][row[f"flow_shard_{number}"]]

    def on_disk(self, folder: str | Path) -> ClipIndex:
        """The same index, whose pickles carry the name of a file in `folder` instead of the rows.

        Processes of this machine then share one copy of the rows in memory, however many clips there are.
        """
        path = Path(folder) / "clip_index.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, self.table.schema) as writer:
            writer.write_table(self.table)
        urls = (self._shard_urls, self._flow_shard_urls)
        tracks_urls, others = self._tracks_shard_urls, self._other_flow_urls
        copy = ClipIndex(self.table, self.clips_url, *urls, self.left_out, tracks_urls, others, self.flow_use)
        copy._file, copy.shards = str(path), self.shards
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


def _with_flow(
    table: pa.Table, flow: Artifact, left_out: dict[str, int], pairs: PairFilterConfig | None, suffix: str = ""
) -> pa.Table:
    """Rows that have a flow blob with at least one usable pair, with the columns that say where it lies."""
    table = _with_sidecar(table, flow, "flow", _FLOW_COLUMNS, left_out, suffix)
    table = _keep(table, pc.greater(table[f"num_pairs{suffix}"], 0), left_out, "without a flow pair")
    columns = () if pairs is None else signal_columns(pairs)
    if pairs is None or not columns:
        return table
    samples = flow.samples()
    missing = [name for name in columns if name not in samples.column_names]
    if missing:
        raise ValueError(f"{flow.url} has no column {missing[0]}, on which pairs are to be filtered; teach it anew")
    rows = {row["key"]: row for row in samples.select(["key", "num_pairs", *columns]).to_pylist()}
    usable = [usable_pairs(pairs, rows[key]) for key in table["key"].to_pylist()]
    table = table.append_column(f"{_USABLE}{suffix}", pa.array(usable, pa.list_(pa.bool_())))
    return _keep(table, pa.array([any(kept) for kept in usable], pa.bool_()), left_out, "without a usable flow pair")


def _known_signals(flows: Sequence[Artifact], columns: Sequence[str]) -> set[str]:
    """Columns in which some pair of some flow has a value."""
    known = set()
    for flow in flows:
        for name in columns:
            values = flow.samples([name])[name].combine_chunks().flatten()
            if len(values) > values.null_count:
                known.add(name)
    return known


def _with_sidecar(
    table: pa.Table,
    sidecar: Artifact,
    kind: str,
    columns: tuple[str, ...],
    left_out: dict[str, int],
    suffix: str = "",
) -> pa.Table:
    """Rows that have a blob, with the columns that say where it lies; the first of them is the blob's shard."""
    maker = MAKERS[kind]
    if sidecar.kind != kind:
        raise ValueError(f"{sidecar.url} holds {sidecar.kind}, not {kind}; give {kind}= the output of `kinema {maker}`")
    blobs = sidecar.samples(["key", "shard", *columns[1:]]).combine_chunks()
    blobs = blobs.rename_columns(["key", *columns])
    place = pc.index_in(table["key"], value_set=blobs["key"].combine_chunks())
    quarantined = pc.is_in(table["key"], value_set=sidecar.quarantined()["key"].combine_chunks())
    judged = table.append_column("place", place).append_column("quarantined", quarantined)
    by_maker = pc.and_(pc.is_null(judged["place"]), judged["quarantined"])
    judged = _keep(judged, pc.invert(by_maker), left_out, f"quarantined by {maker}")
    judged = _keep(judged, pc.is_valid(judged["place"]), left_out, f"without {kind}")
    joined = blobs.take(judged["place"])
    judged = judged.drop_columns(["place", "quarantined"])
    for name in columns:
        judged = judged.append_column(f"{name}{suffix}", joined[name])
    return judged


def _shard_urls(artifact: Artifact, shards: pa.ChunkedArray) -> dict[int, str]:
    return {shard: artifact.shard_url(shard) for shard in pc.unique(shards).to_pylist()}


def _listed(left_out: dict[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in left_out.items())


def _nothing_left(clips: Artifact, sidecars: Sequence[Artifact], left_out: dict[str, int]) -> str:
    places = " and ".join(f"{artifact.kind} {artifact.url}" for artifact in sidecars)
    places = f"{clips.url} with {places}" if sidecars else clips.url
    sources = clips.quarantined().filter(pc.is_null(clips.quarantined()["key"])).num_rows
    text = f"no usable sample in {places}: {clips.plan.num_rows} clips planned"
    if left_out:
        text += f", left out: {_listed(left_out)}"
    if sources:
        text += f"; {sources} sources were quarantined before they gave a clip (see quarantine.parquet)"
    for kind in dict.fromkeys(artifact.kind for artifact in sidecars):
        if f"without {kind}" in left_out and f"quarantined by {MAKERS[kind]}" not in left_out:
            was = "were" if kind == "tracks" else "was"
            text += f"; {was} the {kind} made from these clips?"
    return text
