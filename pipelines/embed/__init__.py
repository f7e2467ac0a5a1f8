"""`kinema embed`: a registry model and clips/ in, features/ out, with the clips' shards, keys and order."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.compute as pc

from kinema.configs import EmbedConfig
from kinema.pipelines import engine
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.embed import dense
from kinema.pipelines.embed.shard_embedder import ModelSpec, ShardEmbedder
from kinema.pipelines.sidecars.sidecar import (
    Place,
    SidecarSummary,
    check_seen_by_workers,
    complete,
    open_input,
    place_actors,
)

__all__ = ["EmbedSummary", "run"]


@dataclass(frozen=True, kw_only=True)
class EmbedSummary(SidecarSummary):
    """What the features artifact holds after the run, and what the run did."""

    frames: int
    """Embedded frames."""


def run(config: EmbedConfig, *, report: Callable[[str], None] | None = None) -> EmbedSummary:
    """Compute what is missing in `out`.

    Raises: ValueError for arguments, a model or clips that do not exist, and when `out` holds other features.
    """
    started = time.monotonic()
    say = report or (lambda line: print(line, file=sys.stderr, flush=True))
    clips = _open_clips(config)
    spec = ModelSpec.locate(config.model)
    features = Artifact.open(config.out, kind="features", config=identity(config, spec), inputs={"clips": clips.plan8})

    def prepare() -> tuple[Any, Place]:
        if spec.form is dense and config.features != "pooled":
            say(f"embed: {dense.describe_size(config, spec.load(), clips)}")
        placed, place = _place(config, spec)
        return partial(ShardEmbedder, clips, features, placed, config), place

    options: dict[str, Any] = {"allowed_quarantine": config.allowed_quarantine, "started": started, "say": say}
    done = complete(features, {"clips": clips}, spec.address, prepare, unit="frames", **options)
    samples = features.samples()
    frames = pc.sum(pc.list_value_length(samples["frames"])).as_py() if samples.num_rows else 0
    return EmbedSummary(frames=frames, **done)


def identity(config: EmbedConfig, spec: ModelSpec) -> dict[str, Any]:
    """What decides the stored numbers; the artifact refuses to resume with anything else."""
    return {"model_hash": spec.content_hash} | {name: getattr(config, name) for name in spec.form.IDENTITY}


def _open_clips(config: EmbedConfig) -> Artifact:
    for name in ("clips", "out", "model"):
        if not getattr(config, name):
            raise ValueError(f"{name} is empty; set {name}=")
    check_seen_by_workers("out", config.out)
    return open_input(config.clips, "clips")


def _place(config: EmbedConfig, spec: ModelSpec) -> tuple[ModelSpec, Place]:
    """Device, threads and number of actors. Raises: ValueError when the device is not there."""
    cpus = int(engine.resources().get("CPU", 1))
    largest = max(int(node.get("CPU", 0)) for node in engine.resources_of_nodes())
    threads = max(1, min(2, largest, cpus // (config.num_actors or max(1, cpus // 2))))
    place = place_actors(config.device, config.num_actors, threads, uses_gpu=True)
    return dataclasses.replace(spec, device=place.device, threads=threads), place
