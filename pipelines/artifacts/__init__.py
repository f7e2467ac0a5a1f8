"""The one artifact writer and reader: plan, shards, commits, quarantine, samples.parquet, verify."""

from kinema.pipelines.artifacts.artifact import Artifact, sample_key
from kinema.pipelines.artifacts.quarantine import quarantine_row
from kinema.pipelines.artifacts.shard_writer import ShardWriter
from kinema.pipelines.artifacts.store import read_range
from kinema.pipelines.artifacts.tables import content_hash, parquet_bytes, read_parquet
from kinema.pipelines.artifacts.verify import Problem

__all__ = [
    "Artifact",
    "Problem",
    "ShardWriter",
    "content_hash",
    "parquet_bytes",
    "quarantine_row",
    "read_parquet",
    "read_range",
    "sample_key",
]
