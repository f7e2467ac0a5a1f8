"""What is looked for: a clip of the corpus, or a video that is embedded as the corpus was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from jaxtyping import Float, UInt8

from kinema.configs import SearchConfig
from kinema.configs.search import is_clip_key
from kinema.pipelines import tracking
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.embed.shard_embedder import ModelSpec
from kinema.pipelines.registry.versions import version_of_content
from kinema.pipelines.search.windows import MotionWindows
from kinema.pipelines.video.at_rate import read_video
from kinema.pipelines.video.errors import SourceError


@dataclass(frozen=True)
class Query:
    """The windows to compare with, and what to show of them."""

    name: str
    """Key, or the video's name."""
    key: str
    """Of the clip, which is not found itself; empty for a video."""
    windows: Float[np.ndarray, "m d"]
    frames: UInt8[np.ndarray, "T H W 3"] | None = None
    """Of a video, at the rate it was embedded at."""
    fps: float = 0.0


def read_query(config: SearchConfig, windows: MotionWindows, clips: Artifact) -> Query:
    """The query of `query=`.

    Raises: ValueError for what is neither a key of the features nor a video that can be embedded.
    """
    text = config.query
    if not Path(text).is_file():
        return _of_key(text, windows, clips)
    spec = _model(config, windows)
    fps = float(windows.features.manifest["config"]["fps"])
    try:
        frames = read_video(Path(text), fps, _short_side(clips), config.max_seconds)
    except (SourceError, OSError) as error:
        raise ValueError(f"query={text} cannot be read as a video: {error}") from None
    network: Any = spec.load()
    least = network.max_delta_time + 1
    if len(frames) < least:
        raise ValueError(
            f"query={text} has {len(frames)} frames at {fps:g} a second; motion embeddings need {least}: give a "
            "longer video"
        )
    with torch.inference_mode():
        motion = network.forward_sliding(torch.from_numpy(frames)[None]).float().cpu()[0].numpy()
    return Query(Path(text).name, "", windows.directions(motion), frames, fps)


def _of_key(key: str, windows: MotionWindows, clips: Artifact) -> Query:
    found = windows.of_key(key)
    if found is not None:
        return Query(key, key, found)
    if not is_clip_key(key):
        raise ValueError(
            f"query={key} is neither a file nor a clip's key (32 hex digits, column key of samples.parquet)"
        )
    keys = clips.samples(["key"])["key"]
    if pc.any(pc.equal(keys, key)).as_py():
        raise ValueError(
            f"query={key} is a clip without motion embeddings in features={windows.features.url} (too short, or "
            "not embedded yet; see its quarantine.parquet)"
        )
    raise ValueError(f"query={key} is no clip of {clips.url}; its samples.parquet lists the keys")


def _model(config: SearchConfig, windows: MotionWindows) -> ModelSpec:
    """What made the features, so that the query's embeddings can be compared with theirs."""
    wanted = windows.features.manifest["config"]["model_hash"]
    address = config.model or version_of_content(tracking.tracking_uri(), wanted)
    if not address:
        raise ValueError(
            f"the model that made features={config.features} (content {wanted[:12]}) is not in the registry at "
            f"{tracking.tracking_uri()}; a query by video needs model= its run, checkpoint or models:/NAME@ALIAS"
        )
    spec = ModelSpec.locate(address)
    if spec.content_hash != wanted:
        raise ValueError(
            f"model={address} (content {spec.content_hash[:12]}) did not make features={config.features} (by "
            f"{wanted[:12]}); their embeddings cannot be compared"
        )
    return spec


def _short_side(clips: Artifact) -> int:
    """Usual shorter side of the clips, which a query is shrunk to as they were."""
    sizes = clips.samples(["height", "width"])
    return int(np.median(np.minimum(sizes["height"].to_numpy(), sizes["width"].to_numpy())))


def copies_of(clips: Artifact) -> Mapping[str, str]:
    """{key: first of its group} for every clip with a near duplicate, itself included."""
    table = clips.samples()
    of: dict[str, str] = {}
    for column in ("near_duplicate_of", "duplicate_of"):
        if column in table.column_names:
            pairs = zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True)
            of |= {key: other for key, other in pairs if other}

    def root(key: str) -> str:
        seen = {key}
        while (key := of.get(key, key)) not in seen:
            seen.add(key)
        return key

    return {key: root(key) for key in of} | {root(key): root(key) for key in of}
