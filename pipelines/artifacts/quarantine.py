"""Bad input as data: one JSON part per source or shard, merged into quarantine.parquet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from kinema.pipelines.artifacts import tables
from kinema.pipelines.artifacts.layout import QUARANTINE_PARTS
from kinema.pipelines.artifacts.store import Store

MAX_MESSAGE = 2000

SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("stage", pa.string()),
        ("error_class", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int32()),
        ("key", pa.string()),
        ("shard", pa.int32()),
    ]
)


def quarantine_row(
    *,
    source: str,
    stage: str,
    error_class: str,
    message: str,
    attempts: int = 1,
    key: str | None = None,
    shard: int | None = None,
) -> dict[str, Any]:
    """One entry with its message on one line."""
    return {
        "source": source,
        "stage": stage,
        "error_class": error_class,
        "message": " ".join(message.split())[:MAX_MESSAGE],
        "attempts": attempts,
        "key": key,
        "shard": shard,
    }


def shard_part(shard: int) -> str:
    """Name of the part that holds one shard's entries."""
    return f"{QUARANTINE_PARTS}/shard-{shard:06d}.json"


def source_part(source: str) -> str:
    """Name of the part that holds what is wrong with a source before anything was planned for it."""
    return f"{QUARANTINE_PARTS}/source-{hashlib.blake2b(source.encode(), digest_size=12).hexdigest()}.json"


def read_part(store: Store, name: str) -> list[dict[str, Any]]:
    """The entries of a part; none when it does not exist."""
    try:
        return json.loads(store.read(name))
    except FileNotFoundError:
        return []


def write_part(store: Store, name: str, rows: list[dict[str, Any]]) -> None:
    """Replace a part; without entries it is removed."""
    if rows:
        store.write(name, tables.readable_json(table(rows).to_pylist()))
    else:
        store.remove(name)


def add_rows(store: Store, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add entries to their parts; one with the same stage, source and key is replaced."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        clean = quarantine_row(**row)
        name = source_part(clean["source"]) if clean["shard"] is None else shard_part(clean["shard"])
        parts.setdefault(name, []).append(clean)
    for name, added in parts.items():
        merged = {(r["stage"], r["source"], r["key"]): r for r in [*read_part(store, name), *added]}
        write_part(store, name, list(merged.values()))


def clear(store: Store, sources: set[str], latest_shard: Mapping[str, int]) -> None:
    """Remove the entries of `sources`; those of a shard only where `latest_shard` of the source lies behind it."""
    parts = store.sizes(QUARANTINE_PARTS)
    for name in sorted({source_part(source) for source in sources}):
        if name.rpartition("/")[2] in parts:
            store.remove(name)
    for name in (f"{QUARANTINE_PARTS}/{part}" for part in parts if part.startswith("shard-")):
        rows = read_part(store, name)
        kept = [r for r in rows if r["source"] not in sources or latest_shard.get(r["source"], -1) <= r["shard"]]
        if len(kept) != len(rows):
            write_part(store, name, kept)


def all_rows(store: Store) -> list[dict[str, Any]]:
    """Every entry of every part."""
    names = [f"{QUARANTINE_PARTS}/{n}" for n in store.sizes(QUARANTINE_PARTS) if n.endswith(".json")]
    return [row for name in names for row in read_part(store, name)]


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """Entries in a fixed order: stage, source, shard, key."""
    ordered = sorted(
        rows,
        key=lambda r: (r["stage"], r["source"], -1 if r["shard"] is None else r["shard"], r["key"] or ""),
    )
    return pa.Table.from_pylist(ordered, schema=SCHEMA)
