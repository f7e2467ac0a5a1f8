"""One shard's work: read frames of its clips, compute their features, write the shard. Knows nothing of Ray."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from kinema.configs import EmbedConfig
from kinema.pipelines import tracking
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.embed import dense, motion
from kinema.pipelines.loader.clip import Clip, ReadCounter
from kinema.pipelines.model_address import check_kind, row_of
from kinema.pipelines.registry.files import load_registered
from kinema.pipelines.registry.versions import Registry
from kinema.pipelines.sidecars.sidecar import Sample, ShardOutcome, write_shard
from kinema.pipelines.teach.teachers import use_threads
from kinema.pipelines.train.checkpoint import model_sha256, resolve_checkpoint
from kinema.pipelines.train.trained import load_model

FORMS: dict[str, ModuleType] = {"features": dense, "motion": motion}
"""What is stored, by the kind of model: each has `COLUMNS`, `IDENTITY` and `embed_clip`."""


@dataclass(frozen=True)
class ModelSpec:
    """A model by address, fixed to one content; travels to the actors."""

    address: str
    """`models:/NAME/VERSION`, or a checkpoint folder."""
    uri: str
    """Registry; empty for a checkpoint."""
    content_hash: str
    """Of weights and config."""
    kind: str = "features"
    """What it gives, a key of `FORMS`."""
    device: str = "cpu"
    threads: int = 1

    @property
    def form(self) -> Any:
        """How its features are made and stored."""
        return FORMS[self.kind]

    @classmethod
    def locate(cls, model: str) -> ModelSpec:
        """What `model` (registry address, run folder, checkpoint) means at this moment.

        Raises: ValueError if it names nothing.
        """
        if model.startswith("models:/"):
            registry = Registry.at(tracking.tracking_uri(), model)
            version, content_hash = registry.resolve(model)
            return cls(f"models:/{registry.name}/{version}", registry.uri, content_hash, _kind(model))
        checkpoint = resolve_checkpoint(model).resolve()
        kind = _kind(model)
        return cls(str(checkpoint), "", model_sha256(checkpoint), kind)

    def load(self) -> nn.Module:
        """The model on its device, in eval mode."""
        if self.uri:
            model = load_registered(self.address, self.uri)
        else:
            model = load_model(Path(self.address))
        return model.to(self.device).eval()


class ShardEmbedder:
    """Holds a loaded model; calling it with a shard number builds that shard of the features artifact.

    Args: `count(clips, frames)` is told of every finished clip.
    """

    def __init__(
        self,
        clips: Artifact,
        features: Artifact,
        spec: ModelSpec,
        config: EmbedConfig,
        count: Callable[[int, int], None] | None = None,
    ):
        self.clips, self.features, self.spec, self.config = clips, features, spec, config
        self.count = count or (lambda clips, frames: None)
        self.model: Any = spec.load()

    def __call__(self, shard: int) -> ShardOutcome:
        """Build and commit one shard. Raises: ValueError when the clip shard was not committed."""
        with use_threads(self.spec.threads):
            return write_shard(
                {"clips": self.clips},
                self.features,
                shard,
                self.spec.form.COLUMNS,
                lambda key, rows: self._clip(shard, rows["clips"]),
                self.count,
                units="frames",
            )

    def _clip(self, shard: int, row: dict[str, Any]) -> Sample:
        """Members and row of one clip. Raises: DamagedClip, ValueError."""
        members, found = self.embed(Clip(row, self.clips.shard_url(shard), None, ReadCounter()))
        return members, {"source": row["source"], **found}

    def embed(self, clip: Clip) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Members and row of one clip."""
        arrays, row = self.spec.form.embed_clip(self.model, clip, self.config, self.spec.device)
        return {f"{name}.npy": _npy(array) for name, array in arrays.items()}, row


def _kind(model: str) -> str:
    """What the model behind an address gives. Raises: ValueError if clips are not embedded by it."""
    row = row_of(model)
    return row.kind if row.kind in FORMS else check_kind(model, "features", "embed").kind


def _npy(array: np.ndarray) -> bytes:
    """An array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
