"""Which settings a stage cannot do without, so that help marks them and all missing ones are named at once."""

from __future__ import annotations

from typing import Any

from kinema.configs.describe import field_docs
from kinema.configs.models.benchmarks import BENCHMARKS
from kinema.configs.models.table import MODELS

REQUIRED: dict[str, tuple[str, ...]] = {
    "shard": ("videos", "out"),
    "teach": ("clips",),
    "track": ("clips",),
    "train": ("clips", "out"),
    "evaluate": ("model",),
    "register": ("model",),
    "embed": ("clips", "out"),
    "search": ("clips", "features", "query", "out"),
    "run": (),
}


def required(stage: str, config: Any = None) -> tuple[str, ...]:
    """Keys that must be given; what depends on other settings only if they are known."""
    keys = REQUIRED[stage]
    if config is None:
        return keys
    if stage == "train":
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
