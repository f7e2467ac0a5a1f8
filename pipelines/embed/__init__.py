"""`kinema embed`: a registry model and clips/ in, features/ out, with the clips' shards, keys and order."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kinema.configs.schema import EmbedConfig
from kinema.pipelines import engine
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.embed.shard_embedder import ModelSpec, ShardEmbedder
from kinema.pipelines.engine import Failure
from kinema.pipelines.progress import Progress

__all__ = ["EmbedSummary", "run"]


@dataclass(frozen=True)
class EmbedSummary:
    """What the artifact holds after the run."""

    clips: int
    """Clips with features."""
    frames: int
    """Embedded frames."""
    quarantined: int
    """Clips without features, each with its reason in quarantine.parquet."""
    seconds: float
    """Duration of this run."""
    shards: int
    """Shards in the artifact."""
    new_shards: int
    """Shards this run computed."""
    bytes: int
    """Size of all shards."""
    out: str
    """Where the artifact is."""
    exit_status: int = 0
    """3 when more than the allowed share of the clips is quarantined."""


def run(config: EmbedConfig, *, report: Callable[[str], None] | None = None) -> EmbedSummary:
    """Compute what is missing in `out`.

    Raises: ValueError for arguments, a model or clips that do not exist, and when `out` holds other features.
    """
    started = time.monotonic()
    say = report or (lambda line: print(line, file=sys.stderr, flush=True))
    clips = _open_clips(config)
    spec = ModelSpec.locate(config.model)
    features = Artifact.open(
        config.out, kind="features", config=identity(config, spec.content_hash), inputs={"clips": clips.plan8}
    )
    todo = plan(clips, features)
    say(
        f"embed: {spec.address} on {features.plan.num_rows} clips, "
        f"{len(todo)} of {len(features.planned_shards())} shards to compute"
    )
    with features.swept_on_failure():
        _compute(config, clips, features, spec, todo)
    features.finalize()
    return _summary(config, features, len(todo), time.monotonic() - started)


def identity(config: EmbedConfig, model_hash: str) -> dict[str, Any]:
    """What decides the stored numbers; the artifact refuses to resume with anything else."""
    names = ("features", "frame_stride", "short_side")
    return {"model_hash": model_hash} | {name: getattr(config, name) for name in names}


def plan(clips: Artifact, features: Artifact) -> list[int]:
    """Plan a shard for every clip shard that has none yet.

    Returns: the shards to compute: pending ones, and those whose clip shard was made anew.
    Raises: ValueError when a planned shard no longer has the clips it was planned for.
    """
    samples = clips.samples(["shard", "key", "source"])
    known = pa.array(features.planned_shards(), samples["shard"].type)
    old = samples.filter(pc.is_in(samples["shard"], value_set=known))
    planned = [(row["shard"], row["key"]) for row in features.plan.select(["shard", "key"]).to_pylist()]
    if sorted(planned) != sorted((row["shard"], row["key"]) for row in old.to_pylist()):
        raise ValueError(f"{features.url} was planned for other clips than {clips.url} holds now; choose another out=")
    features.append_plan(samples.filter(pc.invert(pc.is_in(samples["shard"], value_set=known))))
    sources = clips.commits()
    changed = [
        shard
        for shard, record in features.commits().items()
        if shard in sources and record["input_hashes"].get("clips") != sources[shard]["sha256"]
    ]
    return sorted({*features.pending(), *changed})


def _open_clips(config: EmbedConfig) -> Artifact:
    for name in ("clips", "out", "model"):
        if not getattr(config, name):
            raise ValueError(f"{name} is empty; set {name}=")
    clips = Artifact.read(config.clips)
    if clips.kind != "clips":
        raise ValueError(
            f"clips={config.clips} holds {clips.kind}, not clips; give the folder that `kinema shard` wrote"
        )
    if not clips.samples(["key"]).num_rows:
        raise ValueError(f"clips={config.clips} holds no clip; see its quarantine.parquet")
    return clips


def _compute(config: EmbedConfig, clips: Artifact, features: Artifact, spec: ModelSpec, todo: list[int]) -> None:
    """Build shards on a pool of actors; a shard that cannot be built is quarantined and tried by the next run."""
    if not todo:
        return
    spec, num_actors = _place(config, spec)
    counter = engine.Counter()
    total = pc.sum(pc.is_in(features.plan["shard"], value_set=pa.array(todo, pa.int32()))).as_py()
    progress = Progress("embed", total, "clips")

    def tick() -> None:
        num_clips, num_frames = counter.read()
        if progress.done < total:
            progress.update(min(num_clips, total), f"{num_frames} frames")

    outcomes = engine.run_on_actors(
        partial(ShardEmbedder, clips, features, spec, config, counter.add),
        todo,
        num_actors=num_actors,
        num_cpus=float(spec.threads),
        num_gpus=1.0 if spec.device == "cuda" else 0.0,
        on_tick=tick,
    )
    for shard, outcome in outcomes:
        if isinstance(outcome, Failure):
            features.quarantine(
                {
                    "source": row["source"],
                    "stage": "embed",
                    "error_class": outcome.error_class,
                    "message": f"the shard's worker failed: {outcome.message}",
                    "attempts": outcome.attempts,
                    "key": row["key"],
                    "shard": shard,
                }
                for row in features.plan_of(shard).select(["source", "key"]).to_pylist()
            )
    tick()
    progress.close()


def _place(config: EmbedConfig, spec: ModelSpec) -> tuple[ModelSpec, int]:
    """Device, threads and number of actors. Raises: ValueError when the device is not there."""
    resources = engine.resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    if config.device == "cuda" and not gpus:
        raise ValueError("device=cuda, but there is no GPU; use device=auto or device=cpu")
    if gpus and config.device != "cpu":
        return dataclasses.replace(spec, device="cuda"), config.num_actors or gpus
    num_actors = config.num_actors or max(1, cpus // 2)
    return dataclasses.replace(spec, threads=max(1, min(2, cpus // num_actors))), num_actors


def _summary(config: EmbedConfig, features: Artifact, new_shards: int, seconds: float) -> EmbedSummary:
    commits = features.commits()
    samples = features.samples()
    quarantined = features.quarantined().num_rows
    frames = pc.sum(pc.list_value_length(samples["frames"])).as_py() if samples.num_rows else 0
    share = quarantined / max(1, features.plan.num_rows)
    return EmbedSummary(
        clips=samples.num_rows,
        frames=int(frames or 0),
        quarantined=quarantined,
        seconds=round(seconds, 3),
        shards=len(commits),
        new_shards=new_shards,
        bytes=sum(record["bytes"] for record in commits.values()),
        out=features.url,
        exit_status=3 if share > config.allowed_quarantine else 0,
    )
