"""Parquet and JSON whose bytes depend on their content alone."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kinema.configs.json_text import json_text

ROW_GROUP_ROWS = 4096


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8: equal values give equal bytes; null for nan and infinity.

    Raises: ValueError for unknown types.
    """
    try:
        text = json_text(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"{value!r} cannot be written as JSON: {error}") from None
    return text.encode()


def readable_json(value: Any) -> bytes:
    """Like canonical_json, with line breaks for people."""
    return json_text(value, sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"


def content_hash(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as Parquet: zstd, fixed row groups, no metadata but the schema."""
    sink = pa.BufferOutputStream()
    plain = table.replace_schema_metadata(None).combine_chunks()
    pq.write_table(plain, sink, compression="zstd", compression_level=3, row_group_size=ROW_GROUP_ROWS, version="2.6")
    return sink.getvalue().to_pybytes()


def read_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """The table in a Parquet file's bytes.

    Through ParquetFile and without threads: `pyarrow.parquet.read_table` goes through the dataset engine, whose
    threads sometimes abort the process when it ends soon after.
    """
    return pq.ParquetFile(pa.BufferReader(data)).read(columns=columns, use_threads=False)


def stack_tables(tables: list[pa.Table]) -> pa.Table:
    """Rows of all tables; a column that is all null in one shard takes its type from the others."""
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def written_by(data: bytes) -> str:
    """The release of the Parquet writer that made the file."""
    return pq.read_metadata(pa.BufferReader(data)).created_by
