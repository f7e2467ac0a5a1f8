"""Artifacts for tests of search: clips of one frame size, and motion embeddings of any numbers for them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from kinema.configs import ClipConfig
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.embed import motion
from kinema.pipelines.scenes.motion_classes import motion_clips
from kinema.pipelines.scenes.packed import write_scene_clips

FAST = ClipConfig(preset="veryfast", gop=4, crf=12)


def moving_clips(
    folder: Path, count: int, per_shard: int = 8, side: int = 32, seed: int = 4, codec: str = "h264"
) -> Artifact:
    """Rendered clips of twelve frames; their motions come in turn."""
    scenes = list(motion_clips(count, seed, side=side))
    return write_scene_clips(scenes, folder, replace(FAST, codec=codec), clips_per_shard=per_shard)


def keys_only(folder: Path, keys: Sequence[str], per_shard: int) -> Artifact:
    """A clips artifact with keys, and nothing behind them, for what never looks at a frame."""
    artifact = Artifact.open(folder, kind="clips", config={"test": True})
    shards = [number // per_shard for number in range(len(keys))]
    artifact.append_plan(pa.table({"shard": pa.array(shards, pa.int32()), "key": list(keys), "source": list(keys)}))
    for shard in artifact.pending():
        with artifact.shard_writer(shard) as writer:
            for key in writer.planned:
                writer.add(key, {"json": b"{}"}, {"source": key})
            writer.commit()
    artifact.finalize()
    return artifact


def write_motion(
    folder: Path, clips: Artifact, values: Iterator[np.ndarray], model_hash: str = "0" * 64, fps: float = 6.0
) -> Artifact:
    """Features as `embed` writes them, of the next of `values` [Q, d] for each clip in turn."""
    config = {"model_hash": model_hash, "fps": fps}
    features = Artifact.open(folder, kind="features", config=config, inputs={"clips": clips.plan8})
    features.append_plan(clips.samples(["shard", "key", "source"]))
    for shard in features.pending():
        with features.shard_writer(shard, motion.COLUMNS) as writer:
            for key in writer.planned:
                array = next(values).astype(np.float32)
                buffer = io.BytesIO()
                np.save(buffer, array, allow_pickle=False)
                row = {"source": key, "frames": list(range(len(array))), "motion_mean": array.mean(axis=0).tolist()}
                writer.add(key, {"motion.npy": buffer.getvalue()}, row)
            writer.commit(input_hashes={"clips": clips.commit_of(shard)["sha256"]})
    features.finalize()
    return features
