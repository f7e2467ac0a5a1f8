"""Re-reads a whole artifact and lists everything that does not agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from kinema.pipelines.artifacts import layout, tables
from kinema.pipelines.artifacts.store import Store, read_range
from kinema.pipelines.artifacts.tar import Member, read_members


@dataclass(frozen=True)
class Problem:
    """One disagreement: `where` is the file, `message` what is wrong with it."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Verifiable(Protocol):
    """What is read of an artifact here; see `Artifact`."""

    store: Store
    manifest: dict[str, Any]

    @property
    def kind(self) -> str: ...
    @property
    def config_hash(self) -> str: ...
    @property
    def plan8(self) -> str | None: ...
    @property
    def plan(self) -> pa.Table: ...
    def planned_shards(self) -> list[int]: ...
    def plan_of(self, shard: int) -> pa.Table: ...
    def shard_name(self, shard: int) -> str: ...
    def latest_shards(self) -> dict[str, int]: ...
    def commit_of(self, shard: int) -> dict[str, Any] | None: ...
    def committed_rows(self) -> pa.Table: ...
    def quarantined(self) -> pa.Table: ...


def verify(artifact: Verifiable) -> list[Problem]:
    """Hash every shard; compare tars, rows, commit records, plan, quarantine and tables.

    Returns: the problems, in a fixed order; an empty list means every byte is as it was committed.
    """
    return list(_problems(artifact))


def _problems(artifact: Verifiable) -> Iterator[Problem]:
    if tables.content_hash(artifact.manifest["config"]) != artifact.config_hash:
        yield Problem(layout.MANIFEST, "config does not match config_hash")
    try:
        shards = artifact.planned_shards()
    except ValueError as error:
        yield Problem(layout.PLAN, f"{error}")
        return
    if artifact.plan8 is None and shards:
        yield Problem(layout.MANIFEST, "plan8 is missing although there is a plan")
        return
    keys = artifact.plan["key"].to_pylist()
    if len(set(keys)) != len(keys):
        yield Problem(layout.PLAN, "a sample key is planned twice")
    try:
        quarantined = artifact.quarantined().to_pylist()
    except (ValueError, KeyError, pa.ArrowInvalid) as error:
        yield Problem("_quarantine", f"cannot be read: {error}")
        return
    latest = artifact.latest_shards()
    sizes = artifact.store.sizes()
    for shard in shards:
        excused = {q["key"] for q in quarantined if q["shard"] == shard}
        yield from _shard_problems(artifact, shard, excused, latest, sizes)
    yield from _stray_files(artifact, shards)
    yield from _derived_tables(artifact)


def _shard_problems(
    artifact: Verifiable, shard: int, excused: set[str | None], latest: dict[str, int], sizes: dict[str, int]
) -> Iterator[Problem]:
    name, planned = artifact.shard_name(shard), artifact.plan_of(shard).select(["key", "source"]).to_pylist()
    record = artifact.commit_of(shard)
    rows: list[dict[str, Any]] = []
    if record is None:
        if all(row["key"] in excused for row in planned):
            return  # the whole shard is quarantined
        damaged = f"{shard:06d}.json" in artifact.store.sizes(layout.COMMITS)
        what = "damaged or another artifact's" if damaged else f"missing, so {name} is not finished"
        yield Problem(layout.commit_record(shard), what)
        return
    try:
        rows = tables.read_parquet(artifact.store.read(layout.commit_rows(shard))).to_pylist()
    except FileNotFoundError:
        yield Problem(layout.commit_rows(shard), "missing")
    except (pa.ArrowInvalid, OSError) as error:
        yield Problem(layout.commit_rows(shard), f"damaged: {error}")
    if record["num_planned"] != len(planned):
        yield Problem(layout.commit_record(shard), f"plans {record['num_planned']} samples, {len(planned)} are planned")
    yield from _tar_problems(artifact, record, rows, sizes.get(record["name"]))
    present = [row["key"] for row in rows]
    order = {row["key"]: place for place, row in enumerate(planned)}
    if [key for key in order if key in set(present)] != present:
        yield Problem(layout.commit_rows(shard), "its keys are not the planned ones in the plan's order")
    for row in planned:
        replanned = latest[row["source"]] > shard
        if row["key"] not in set(present) and row["key"] not in excused and not replanned:
            yield Problem(name, f"planned sample {row['key']} is neither in the shard nor quarantined")


def _tar_problems(
    artifact: Verifiable, record: dict[str, Any], rows: list[dict[str, Any]], size: int | None
) -> Iterator[Problem]:
    name = record["name"]
    if size is None:
        yield Problem(name, "missing although it is committed")
        return
    if size != record["bytes"]:
        yield Problem(name, f"has {size} bytes, {record['bytes']} were committed")
    members: list[Member] = []
    sha256 = None
    with artifact.store.open(name) as file:
        try:
            for item in read_members(file):
                if isinstance(item, Member):
                    members.append(item)
                else:
                    sha256 = item
        except ValueError as error:
            yield Problem(name, f"{error}")
            return
    if sha256 != record["sha256"]:
        yield Problem(name, f"sha256 is {sha256}, {record['sha256']} was committed")
    by_key: dict[str, dict[str, Member]] = {}
    for member in members:
        by_key.setdefault(member.key, {})[member.extension] = member
    if len(by_key) != record["num_samples"]:
        yield Problem(name, f"has {len(by_key)} samples, {record['num_samples']} were committed")
    if list(by_key) != [row["key"] for row in rows]:
        yield Problem(name, "its keys differ from the rows of its commit")
        return
    for row in rows:
        yield from _sample_problems(artifact, name, row, by_key[row["key"]])


def _sample_problems(
    artifact: Verifiable, name: str, row: dict[str, Any], members: dict[str, Member]
) -> Iterator[Problem]:
    for extension, member in members.items():
        column = extension.partition(".")[0]
        if (row.get(f"{column}_offset"), row.get(f"{column}_size")) != (member.offset, member.size):
            yield Problem(name, f"{member.name} is not where the rows say")
    if "json" in members:
        member = members["json"]
        text = read_range(artifact.store.url_of(name), member.offset, member.size)
        try:
            content = json.loads(text)
        except ValueError:
            yield Problem(name, f"{member.name} is not JSON")
            return
        if isinstance(content, dict) and content.get("key", row["key"]) != row["key"]:
            yield Problem(name, f"{member.name} holds the data of {content['key']}")


def _stray_files(artifact: Verifiable, shards: list[int]) -> Iterator[Problem]:
    names = {artifact.shard_name(shard) for shard in shards}
    for name in artifact.store.sizes():
        if name.endswith(".tar") and name not in names:
            yield Problem(name, "is not in the plan")
    stems = {f"{shard:06d}" for shard in shards}
    for name in artifact.store.sizes(layout.COMMITS):
        if name.rpartition(".")[0] not in stems:
            yield Problem(f"_commits/{name}", "belongs to no planned shard")


def _derived_tables(artifact: Verifiable) -> Iterator[Problem]:
    for name, make in ((layout.SAMPLES, artifact.committed_rows), (layout.QUARANTINE, artifact.quarantined)):
        try:
            stored = artifact.store.read(name)
        except FileNotFoundError:
            maker = layout.MAKERS.get(artifact.kind, artifact.kind)
            yield Problem(name, f"missing; run `kinema {maker}` to the end")
            continue
        try:
            same = _same_table(stored, make())
        except (pa.ArrowInvalid, OSError) as error:
            yield Problem(name, f"cannot be checked: {error}")
            continue
        if not same:
            yield Problem(name, "differs from the parts it is made of")


def _same_table(stored: bytes, wanted: pa.Table) -> bool:
    """Equal bytes; where another pyarrow release wrote them, equal tables."""
    ours = tables.parquet_bytes(wanted)
    if stored == ours or tables.written_by(stored) == tables.written_by(ours):
        return stored == ours
    return tables.read_parquet(stored).equals(wanted)
