"""Which settings a stage cannot do without, and which are set often: help has them in this order, and all missing ones
are named at once."""

from __future__ import annotations

from typing import Any

from kinema.configs.describe import field_docs
from kinema.configs.models.benchmarks import BENCHMARKS
from kinema.configs.models.table import MODELS
from kinema.configs.rendered import RENDERED

REQUIRED: dict[str, tuple[str, ...]] = {
    "shard": ("videos", "out"),
    "teach": ("clips",),
    "track": ("clips",),
    "train": ("clips", "out"),
    "evaluate": ("model",),
    "register": ("model",),
    "embed": ("clips", "out"),
    "transfer": ("motion", "image", "out"),
    "search": ("clips", "features", "query", "out"),
    "run": (),
}

COMMON: dict[str, tuple[str, ...]] = {
    "shard": tuple("clip.seconds clip.fps clip.short_side clip.codec clip.crf shard_mb min_shards num_workers".split()),
    "teach": tuple("out teacher weights gaps stride short_side iters device num_actors".split()),
    "track": tuple("flow out tracker weights grid start_frames device num_actors".split()),
    "train": tuple(
        "flow tracks model weights steps batch_size lr seed num_workers use_gpu precision checkpoint_every "
        "loader.mode loader.num_workers loader.hold_out".split()
    ),
    "evaluate": tuple("benchmark data clips tracks out weights".split()),
    "register": ("name",),
    "embed": tuple("model features dtype stride frame_stride short_side device".split()),
    "run": tuple(
        "name workspace stages experiment shard.videos shard.clip.seconds shard.clip.short_side teach.teacher "
        "teach.gaps track.tracker train.model train.steps train.batch_size train.lr train.num_workers".split()
    ),
}
"""Keys that people set; all others stand below them in the help."""


def required(stage: str, config: Any = None) -> tuple[str, ...]:
    """Keys that must be given; what depends on other settings only if they are known."""
    keys = REQUIRED[stage]
    if config is None:
        return keys
    if stage == "train":
        if config.clips == RENDERED:
            return keys
        return (*keys, *MODELS[config.model].needs)
    if stage == "track":
        facts = MODELS[config.tracker].tracker
        return (*keys, *(("flow",) if facts is not None and facts.follows_flow else ()))
    if stage == "evaluate" and BENCHMARKS[config.benchmark].needs_data:
        return (*keys, "data")
    return keys


def check_required(stage: str, config: Any) -> None:
    """Raises: ValueError naming every missing key with what it is, where more than one is missing.

    A single one is told by the stage itself, which knows what would fit.
    """
    missing = [key for key in required(stage, config) if not getattr(config, key)]
    if len(missing) > 1:
        schema: Any = type(config)
        docs = field_docs(schema)
        listed = "; ".join(f"{key}= ({docs.get(key, '').partition('.')[0]})" for key in missing)
        raise ValueError(f"{len(missing)} settings are missing: {listed}; see `kinema {stage} --help`")
