"""Builds one shard in a temporary file and makes it visible only when it is whole and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import pyarrow as pa

import kinema
from kinema.pipelines.artifacts import tables
from kinema.pipelines.artifacts.layout import commit_record, commit_rows
from kinema.pipelines.artifacts.quarantine import quarantine_row, read_part, shard_part, write_part
from kinema.pipelines.artifacts.store import Store
from kinema.pipelines.artifacts.tar import TarBuilder, read_members


class ShardWriter:
    """Samples of one planned shard, in plan order. Left without `commit()`, it leaves nothing behind."""

    def __init__(
        self,
        store: Store,
        name: str,
        shard: int,
        planned: Sequence[Mapping[str, Any]],
        config_hash: str,
        schema: pa.Schema | None = None,
    ):
        """Args: name, of the tar; planned, its rows of the plan (key, source), in order."""
        self.store = store
        self.shard = shard
        self.schema = schema
        self.name = name
        self.config_hash = config_hash
        self.planned = {row["key"]: row["source"] for row in planned}
        self._order = {key: place for place, key in enumerate(self.planned)}
        self._last_place = -1
        self.rows: list[dict[str, Any]] = []
        self.quarantined: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> ShardWriter:
        self._temporary = self.store.build(self.name)
        self._tar = TarBuilder(self._temporary.write)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.discard()
        self._temporary.discard()

    def add(self, key: str, members: Mapping[str, bytes | memoryview], row: Mapping[str, Any]) -> None:
        """Append a sample; `row` gets shard, position and the offset and size of every member.

        Raises: ValueError when the key is not the shard's or comes out of order; StageError when the disk is full.
        """
        place = self._order.get(key)
        if place is None:
            raise ValueError(f"sample {key} is not planned in shard {self.shard}")
        if place <= self._last_place:
            raise ValueError(f"sample {key} comes out of the plan's order in shard {self.shard}")
        if key in self.quarantined:
            raise ValueError(f"sample {key} is quarantined in shard {self.shard} and cannot be added too")
        added = self._tar.add(key, members)
        self._last_place = place
        offsets: dict[str, Any] = {}
        for extension, member in added.items():
            column = extension.partition(".")[0]
            offsets[f"{column}_offset"] = member.offset
            offsets[f"{column}_size"] = member.size
        position = {"key": key, "shard": self.shard, "position": len(self.rows)}
        self.rows.append({**position, **row, **position, **offsets})

    def quarantine(self, key: str, *, stage: str, error_class: str, message: str, attempts: int = 1) -> None:
        """Record why a planned sample will not be in the shard; written with the commit."""
        if key not in self.planned:
            raise ValueError(f"sample {key} is not planned in shard {self.shard}")
        self.quarantined[key] = quarantine_row(
            source=self.planned[key],
            stage=stage,
            error_class=error_class,
            message=message,
            attempts=attempts,
            key=key,
            shard=self.shard,
        )

    def commit(
        self, *, input_hashes: Mapping[str, str] | None = None, num_planned: int | None = None
    ) -> dict[str, Any]:
        """Check the temporary file against what was added, publish it, then write its record.

        Returns: the commit record. Raises: ValueError when a planned sample was neither added nor quarantined.
        """
        store = self.store
        if num_planned is not None and num_planned != len(self.planned):
            raise ValueError(f"num_planned={num_planned}, but shard {self.shard} plans {len(self.planned)} samples")
        sha256 = self._tar.finish()
        self._temporary.sync()
        with open(self._temporary.path, "rb") as file:
            found = list(read_members(file))
        if found != [*self._tar.members, sha256]:
            raise OSError(f"{self.name} reads back otherwise than it was written; check the disk")
        entries = self._settle_quarantine()
        record = {
            "shard": self.shard,
            "name": self.name,
            "sha256": sha256,
            "bytes": self._tar.num_bytes,
            "num_samples": len(self.rows),
            "num_planned": len(self.planned),
            "input_hashes": dict(sorted((input_hashes or {}).items())),
            "config_hash": self.config_hash,
            "code_version": kinema.__version__,
        }
        store.remove(commit_record(self.shard))  # an older record must never describe the new tar
        store.publish(self._temporary, self.name, sha256)
        store.write(commit_rows(self.shard), tables.parquet_bytes(self._rows_table()))
        write_part(store, shard_part(self.shard), entries)
        store.write(commit_record(self.shard), tables.readable_json(record))
        return record

    def _settle_quarantine(self) -> list[dict[str, Any]]:
        """The shard's entries: those of this build, and earlier ones for samples that are still missing."""
        written = {row["key"] for row in self.rows}
        earlier = [
            row for row in read_part(self.store, shard_part(self.shard)) if row["key"] and row["key"] not in written
        ]
        entries = {row["key"]: row for row in earlier} | self.quarantined
        lost = [key for key in self.planned if key not in written and key not in entries]
        if lost:
            raise ValueError(
                f"shard {self.shard}: {len(lost)} planned samples were neither written nor quarantined, "
                f"for example {lost[0]}"
            )
        return list(entries.values())

    def _rows_table(self) -> pa.Table:
        fixed = [("key", pa.string()), ("shard", pa.int32()), ("position", pa.int32())]
        if self.schema is None and not self.rows:
            return pa.schema(fixed).empty_table()
        if self.schema is None:
            inferred = pa.Table.from_pylist(self.rows)
            types = {name: kind for name, kind in fixed}
            fields = [pa.field(f.name, types.get(f.name, f.type)) for f in inferred.schema]
            return inferred.cast(pa.schema(fields))
        offsets = sorted({name for row in self.rows for name in row if name.endswith(("_offset", "_size"))})
        named = set(self.schema.names)
        extra = [(name, pa.int64()) for name in offsets if name not in named]
        fields = [pa.field(*f) for f in fixed if f[0] not in named] + list(self.schema)
        return pa.Table.from_pylist(self.rows, schema=pa.schema([*fields, *(pa.field(*f) for f in extra)]))
