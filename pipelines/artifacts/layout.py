"""Names inside an artifact's folder."""

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "_plan.parquet"
SAMPLES = "samples.parquet"
QUARANTINE = "quarantine.parquet"
RUN_FILE = "run.json"
"""Of a training run, which is no artifact."""
COMMITS = "_commits"
QUARANTINE_PARTS = "_quarantine"

COMMIT_FIELDS = {
    "shard": int,
    "name": str,
    "sha256": str,
    "bytes": int,
    "num_samples": int,
    "num_planned": int,
    "input_hashes": dict,
    "config_hash": str,
    "code_version": str,
}
"""Every field of a commit record, with its JSON type."""

MAKERS = {"clips": "shard", "flow": "teach", "tracks": "track", "features": "embed"}
"""The command that makes each kind of artifact."""


def commit_record(shard: int) -> str:
    """Name of the JSON record that makes a shard count as done."""
    return f"{COMMITS}/{shard:06d}.json"


def commit_rows(shard: int) -> str:
    """Name of the shard's rows of samples.parquet."""
    return f"{COMMITS}/{shard:06d}.parquet"
