"""`kinema shard`: raw videos in, the clips artifact out (sources -> scan -> plan -> build)."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

from kinema.configs.shard import FlowLayout, ShardConfig
from kinema.pipelines.shard.stage import ShardSummary
from kinema.pipelines.shard.stage import run as run_videos

__all__ = ["ShardSummary", "run"]


def run(config: ShardConfig, *, report: Callable[[str], None] | None = None) -> Any:
    """Make or continue the clips artifact; a data set with known flow is packed with its flow (known_flow)."""
    if config.layout in typing.get_args(FlowLayout):
        from kinema.pipelines.shard.known_flow.stage import run as run_flow_dataset  # here: it loads torch

        return run_flow_dataset(config, report=report)
    if config.layout == "rendered":
        from kinema.pipelines.shard.known_flow.rendered import run as run_rendered

        return run_rendered(config, report=report)
    return run_videos(config, report=report)
