"""An artifact: manifest, plan, shards, commit records, quarantine, samples.parquet.

Plan first, commit last: `_plan.parquet` says what will be made before work begins, and a shard counts as done when its
commit record is valid and the tar has the recorded size. Everything else is derived, so a killed run loses nothing but
the shard it was building, and running it again gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

import kinema
from kinema.pipelines.artifacts import quarantine, tables, verify
from kinema.pipelines.artifacts.layout import (
    COMMIT_FIELDS,
    COMMITS,
    FORMAT,
    MAKERS,
    MANIFEST,
    PLAN,
    QUARANTINE,
    RUN_FILE,
    SAMPLES,
    commit_record,
    commit_rows,
)
from kinema.pipelines.artifacts.shard_writer import ShardWriter
from kinema.pipelines.artifacts.store import Store, open_store
from kinema.pipelines.artifacts.tar import check_key

_READ_THREADS = 16


def sample_key(*parts: str | int | float | None) -> str:
    """32 hex digits of blake2b over the parts (source id, content hash, start pts, end pts, clip config hash)."""
    return hashlib.blake2b(tables.canonical_json(list(parts)), digest_size=16).hexdigest()


class Artifact:
    """One folder (or bucket prefix) of shards and what belongs to them. Picklable; workers open nothing anew."""

    def __init__(self, store: Store, manifest: dict[str, Any]):
        self.store = store
        self.manifest = manifest
        self._plan: pa.Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        *,
        kind: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Create the artifact, or resume into it, after removing what killed writers left.

        Args: `config` is everything that decides the content; `inputs` names what it is made from by an identity
        that stays when the input grows (a sidecar: {"clips": clips.plan8}).
        Raises: ValueError when another kind, config or input is there already, with both hashes.
        """
        store = open_store(url)
        if not re.fullmatch(r"[a-z][a-z0-9_]*", kind):
            raise ValueError(f"artifact kind {kind!r} must be lower-case letters, digits and _")
        wanted = {
            "kind": kind,
            "format": FORMAT,
            "config": json.loads(tables.canonical_json(dict(config))),
            "config_hash": tables.content_hash(dict(config)),
            "plan8": None,
            "inputs": json.loads(tables.canonical_json(dict(inputs or {}))),
            "code_version": kinema.__version__,
        }
        store.sweep()
        try:
            found = _read_manifest(store)
        except FileNotFoundError:
            if RUN_FILE in store.sizes():
                raise ValueError(f"{store.url} holds a training run; choose another out=") from None
            try:
                store.write(MANIFEST, tables.readable_json(wanted))
            except OSError as error:
                why = error.strerror or str(error)
                raise ValueError(f"{store.url} cannot be written: {why}; choose another out=") from None
            return cls(store, wanted)
        _refuse_other(store.url, found, wanted)
        return cls(store, found)

    @staticmethod
    def is_new(url: str | os.PathLike[str]) -> bool:
        """Whether `open` would create the artifact: what could make a run impossible is then checked before."""
        try:
            open_store(url).read(MANIFEST)
        except OSError:  # what cannot be read is told by `open`
            return True
        return False

    @classmethod
    def read(cls, url: str | os.PathLike[str]) -> Artifact:
        """An existing artifact. Raises: ValueError when there is none at the URL."""
        store = open_store(url)
        try:
            return cls(store, _read_manifest(store))
        except FileNotFoundError:
            found = "it is a training run" if RUN_FILE in store.sizes() else f"it has no {MANIFEST}"
            raise ValueError(f"{store.url} holds no artifact: {found}; check the path") from None

    @property
    def url(self) -> str:
        """Absolute path or URL."""
        return self.store.url

    @property
    def kind(self) -> str:
        """`clips`, `flow`, `features`, ..."""
        return self.manifest["kind"]

    @property
    def config_hash(self) -> str:
        """sha256 of the canonical config."""
        return self.manifest["config_hash"]

    @property
    def plan8(self) -> str | None:
        """Eight hex digits that make shard names unique; None until something was planned."""
        return self.manifest["plan8"]

    @property
    def plan(self) -> pa.Table:
        """All planned rows, in the order in which they were appended; empty without a plan."""
        if self._plan is None:
            try:
                self._plan = self._table(PLAN)
            except FileNotFoundError:
                schema = pa.schema([("shard", pa.int32()), ("key", pa.string()), ("source", pa.string())])
                return schema.empty_table()
        return self._plan

    def plan_of(self, shard: int) -> pa.Table:
        """The planned rows of one shard, in their order in the tar."""
        plan = self.plan
        return plan.filter(pc.equal(plan["shard"], shard))

    def planned_shards(self) -> list[int]:
        """Every planned shard number, ascending."""
        return sorted(pc.unique(self.plan["shard"]).to_pylist())

    def append_plan(self, table: pa.Table) -> None:
        """Plan more samples. The table may begin with all existing rows; the rest must be new shards of new keys.

        Raises: ValueError when a key or a shard is planned already, or a key is malformed.
        """
        for column in ("shard", "key", "source"):
            if column not in table.column_names:
                raise ValueError(f"a plan needs the columns shard, key and source; {column} is missing")
        table = table.replace_schema_metadata(None)
        existing = self.plan
        new = table
        if existing.num_rows and table.num_rows >= existing.num_rows:
            head = table.slice(0, existing.num_rows)
            if head.select(existing.column_names).cast(existing.schema, safe=False).equals(existing):
                new = table.slice(existing.num_rows)
        if not new.num_rows:
            return
        _check_new_rows(existing, new)
        if self.plan8 is None:
            identity = [self.kind, self.config_hash, self.manifest["inputs"], new["key"].to_pylist()]
            self.manifest = {**self.manifest, "plan8": tables.content_hash(identity)[:8]}
            self.store.write(MANIFEST, tables.readable_json(self.manifest))
        whole = tables.stack_tables([existing, new]) if existing.num_rows else new.combine_chunks()
        self.store.write(PLAN, tables.parquet_bytes(whole))
        self._plan = whole

    def shard_name(self, shard: int) -> str:
        """`clips-1a2b3c4d-000123.tar`."""
        if self.plan8 is None:
            raise ValueError(f"{self.url} has no plan yet; call append_plan first")
        return f"{self.kind}-{self.plan8}-{shard:06d}.tar"

    def shard_url(self, shard: int) -> str:
        """Path or URL of one shard, for read_range."""
        return self.store.url_of(self.shard_name(shard))

    def shard_writer(self, shard: int, schema: pa.Schema | None = None) -> ShardWriter:
        """A context manager that builds one planned shard.

        `schema` fixes the types of the row's columns (of all but shard, position, key and the offsets); without it
        they are inferred from the values.
        """
        planned = self.plan_of(shard).select(["key", "source"]).to_pylist()
        if not planned:
            raise ValueError(f"shard {shard} of {self.url} is not in its plan")
        return ShardWriter(self.store, self.shard_name(shard), shard, planned, self.config_hash, schema)

    def commits(self) -> dict[int, dict[str, Any]]:
        """The valid commit record of every finished shard, by shard number."""
        if self.plan8 is None:
            return {}
        sizes = self.store.sizes()
        parts = self.store.sizes(COMMITS)
        shards = [s for s in self.planned_shards() if f"{s:06d}.json" in parts and f"{s:06d}.parquet" in parts]
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            records = pool.map(self.commit_of, shards)
            found = {shard: record for shard, record in zip(shards, records, strict=True) if record}
        return {s: r for s, r in found.items() if sizes.get(r["name"]) == r["bytes"]}

    def commit_of(self, shard: int) -> dict[str, Any] | None:
        """The commit record of a shard, or None when it is missing, damaged or another artifact's."""
        try:
            record = json.loads(self.store.read(commit_record(shard)))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(record, dict) or any(
            not isinstance(record.get(name), kind) for name, kind in COMMIT_FIELDS.items()
        ):
            return None
        same = (record["shard"], record["name"]) == (shard, self.shard_name(shard))
        return record if same and record["config_hash"] == self.config_hash else None

    def pending(self) -> list[int]:
        """Planned shards without a valid commit record and a tar of the recorded size, ascending."""
        done = self.commits()
        return [shard for shard in self.planned_shards() if shard not in done]

    @contextlib.contextmanager
    def swept_on_failure(self) -> Iterator[None]:
        """What stopped writers leave is removed when the block fails, not only by the next run."""
        try:
            yield
        except BaseException:
            self.store.sweep()
            raise

    def quarantine(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record bad input at once, so that a killed run loses none of it.

        Each row has source, stage, error_class, message, and where known attempts (default 1), key and shard. A row
        with the same stage, source and key in the same shard is replaced.
        """
        quarantine.add_rows(self.store, rows)

    def clear_quarantine(self, sources: Iterable[str]) -> None:
        """Forget entries of sources that are good again.

        Entries of a shard go only when the source is planned again in a later one: until then they explain why a
        planned sample is missing, and finishing the shard itself removes them.
        """
        chosen = set(sources)
        if chosen:
            quarantine.clear(self.store, chosen, self.latest_shards())

    def latest_shards(self) -> dict[str, int]:
        """The highest shard number in which each source is planned."""
        latest: dict[str, int] = {}
        plan = self.plan
        for source, shard in zip(plan["source"].to_pylist(), plan["shard"].to_pylist(), strict=True):
            latest[source] = max(shard, latest.get(source, shard))
        return latest

    def quarantined(self) -> pa.Table:
        """All entries so far: source, stage, error_class, message, attempts, key, shard."""
        return quarantine.table(quarantine.all_rows(self.store))

    def finalize(self) -> None:
        """Write samples.parquet from the commit parts and quarantine.parquet from its parts, where they changed."""
        self.store.sweep()
        for name, table in ((SAMPLES, self.committed_rows()), (QUARANTINE, self.quarantined())):
            data = tables.parquet_bytes(table)
            try:
                unchanged = self.store.read(name) == data
            except FileNotFoundError:
                unchanged = False
            if not unchanged:
                self.store.write(name, data)

    def rows_of(self, shard: int) -> pa.Table:
        """The rows of one finished shard. Raises: FileNotFoundError before its commit; ValueError when damaged."""
        return self._table(commit_rows(shard), fix="remove it and run the same command, which builds its shard again")

    def committed_rows(self) -> pa.Table:
        """The rows of all finished shards, ordered by shard and position."""
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            parts = list(pool.map(self.rows_of, sorted(self.commits())))
        filled = [part for part in parts if part.num_rows]
        if filled:
            return tables.stack_tables(filled)
        if parts:
            return parts[0]
        return pa.schema([("key", pa.string()), ("shard", pa.int32()), ("position", pa.int32())]).empty_table()

    def samples(self, columns: Sequence[str] | None = None) -> pa.Table:
        """samples.parquet: one row per sample, ordered by (shard, position).

        Raises: ValueError when the stage that makes this artifact has not finished.
        """
        try:
            return self._table(SAMPLES, columns)
        except FileNotFoundError:
            done, planned = len(self.commits()), len(self.planned_shards())
            state = f"{done} of {planned} shards are committed" if done else "no commits yet"
            maker = MAKERS.get(self.kind, self.kind)
            raise ValueError(f"{self.url} has no {SAMPLES}, {state}: run `kinema {maker}` on it to the end") from None

    def _table(
        self, name: str, columns: Sequence[str] | None = None, fix: str = "restore it or choose another out="
    ) -> pa.Table:
        """A Parquet file of the artifact. Raises: FileNotFoundError; ValueError when it is damaged."""
        data = self.store.read(name)
        try:
            return tables.read_parquet(data, columns=None if columns is None else list(columns))
        except (pa.ArrowInvalid, OSError) as error:
            where = self.store.url_of(name)
            raise ValueError(f"{where} is damaged ({' '.join(str(error).split())}); {fix}") from None

    def manifest_hash(self) -> str:
        """sha256 over what the artifact is and the bytes of its finished shards; equal content, equal hash."""
        shards = [(shard, record["sha256"]) for shard, record in sorted(self.commits().items())]
        names = ("kind", "format", "config_hash", "plan8", "inputs")
        return tables.content_hash([{name: self.manifest[name] for name in names}, shards])

    def verify(self) -> list[verify.Problem]:
        """Re-hash every shard and compare it with its rows, records and plan; see artifacts.verify."""
        return verify.verify(self)


def _read_manifest(store: Store) -> dict[str, Any]:
    data = store.read(MANIFEST)
    try:
        manifest = json.loads(data)
        missing = {"kind", "format", "config", "config_hash", "plan8", "inputs"} - set(manifest)
    except (ValueError, TypeError):
        raise ValueError(f"{store.url_of(MANIFEST)} is damaged: it is not a JSON object") from None
    if missing:
        raise ValueError(f"{store.url_of(MANIFEST)} is not an artifact's: it lacks {', '.join(sorted(missing))}")
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{store.url} has artifact format {manifest['format']}, this program reads {FORMAT}; use the version "
            "that wrote it or another out="
        )
    return manifest


def _refuse_other(url: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found["kind"] != wanted["kind"]:
        raise ValueError(f"{url} holds {found['kind']}, not {wanted['kind']}; choose another out=")
    if found["config_hash"] != wanted["config_hash"]:
        both = f"it has {found['config_hash'][:12]}, this run {wanted['config_hash'][:12]}"
        changed = ", ".join(_changes(found["config"], wanted["config"])) or "its layout"
        raise ValueError(f"{url} was made with another config ({both}): {changed}; choose another out=")
    if found["inputs"] != wanted["inputs"]:
        changed = ", ".join(_changes(found["inputs"], wanted["inputs"]))
        raise ValueError(f"{url} was made from another input: {changed}; choose another out=")


def _changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`clip.fps was 12, is 24` for every difference of two nested mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(set(old) | set(new))
        return [c for n in names for c in _changes(old.get(n), new.get(n), f"{prefix}.{n}" if prefix else n)]
    return [] if old == new else [f"{prefix} was {old}, is {new}"]


def _check_new_rows(existing: pa.Table, new: pa.Table) -> None:
    keys = new["key"].to_pylist()
    for key in keys:
        check_key(key)
    if len(set(keys)) != len(keys):
        raise ValueError("the plan names a sample key twice; two clips of a source have the same bounds")
    if not pa.types.is_integer(new.schema.field("shard").type) or new["shard"].null_count:
        raise ValueError("the plan's shard column must hold integers")
    shards = new["shard"].to_pylist()
    if shards != sorted(shards) or shards[0] < 0:
        raise ValueError("planned shards must be ascending from 0, each shard's rows together")
    again = set(keys).intersection(existing["key"].to_pylist())
    if again:
        raise ValueError(f"{len(again)} samples are planned already, for example {min(again)}")
    taken = set(shards).intersection(existing["shard"].to_pylist())
    if taken:
        raise ValueError(
            f"shards {sorted(taken)[:5]} are planned already and cannot grow; plan new samples into new shards"
        )
