"""`kinema shard`: raw videos in, the clips artifact out (sources -> scan -> plan -> build)."""

from kinema.pipelines.shard.stage import ShardSummary, run

__all__ = ["ShardSummary", "run"]
