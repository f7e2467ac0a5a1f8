"""One shard's work: read frames of its clips, compute their features, write the shard. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kinema.configs import EmbedConfig
from kinema.pipelines import tracking
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.errors import StageError
from kinema.pipelines.loader.clip import Clip, ReadCounter
from kinema.pipelines.model_address import check_kind
from kinema.pipelines.pictures.images import normalise_images, size_for_model
from kinema.pipelines.registry.files import load_registered
from kinema.pipelines.registry.versions import Registry
from kinema.pipelines.teach.teachers import use_threads
from kinema.pipelines.train.checkpoint import MODEL_FILE, resolve_checkpoint
from kinema.pipelines.train.trained import load_model

COLUMNS = pa.schema(
    [
        ("source", pa.string()),
        ("frames", pa.list_(pa.int32())),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("y_dec_mean", pa.list_(pa.float32())),
        ("y_enc_mean", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class ModelSpec:
    """A model by address, fixed to one content; travels to the actors."""

    address: str
    """`models:/NAME/VERSION`, or a checkpoint folder."""
    uri: str
    """Registry; empty for a checkpoint."""
    content_hash: str
    """Of weights and config."""
    device: str = "cpu"
    threads: int = 1

    @classmethod
    def locate(cls, model: str) -> ModelSpec:
        """What `model` (registry address, run folder, checkpoint) means at this moment.

        Raises: ValueError if it names nothing.
        """
        if model.startswith("models:/"):
            registry = Registry.at(tracking.tracking_uri(), model)
            version, content_hash = registry.resolve(model)
            return cls(f"models:/{registry.name}/{version}", registry.uri, content_hash)
        checkpoint = resolve_checkpoint(model).resolve()
        check_kind(model, "features", "embed")
        with (checkpoint / MODEL_FILE).open("rb") as file:
            return cls(str(checkpoint), "", hashlib.file_digest(file, "sha256").hexdigest())

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

    def __call__(self, shard: int) -> int:
        """Build and commit one shard; returns the number of frames.

        Raises: ValueError when the clip shard was not committed.
        """
        record = self.clips.commit_of(shard)
        if record is None:
            raise ValueError(f"clip shard {shard} of {self.clips.url} is not committed; run `kinema shard` to the end")
        rows = {row["key"]: row for row in self.clips.rows_of(shard).to_pylist()}
        num_frames = 0
        with use_threads(self.spec.threads), self.features.shard_writer(shard, COLUMNS) as writer:
            for key in writer.planned:
                clip = Clip(rows[key], self.clips.shard_url(shard), None, ReadCounter())
                try:
                    members, row = self.embed(clip)
                except StageError:
                    raise
                except ValueError as error:  # damaged bytes among them
                    writer.quarantine(key, stage="embed", error_class=type(error).__name__, message=str(error))
                    self.count(1, 0)
                    continue
                writer.add(key, members, {"source": rows[key]["source"], **row})
                num_frames += len(row["frames"])
                self.count(1, len(row["frames"]))
            writer.commit(input_hashes={"clips": record["sha256"]})
        return num_frames

    def embed(self, clip: Clip) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Members and row of one clip.

        Members are arrays over the embedded frames [T, ...]: `y_dec.npy` or `y_enc.npy` float16 [T, C, h, w]; for
        `pooled` both, as float32 means over the frame [T, C]. The row holds their means over frames too.
        """
        chosen = list(range(0, clip.num_frames, self.config.frame_stride))
        parts: dict[str, list[Tensor]] = {"y_enc": [], "y_dec": []}
        means: dict[str, list[Tensor]] = {"y_enc": [], "y_dec": []}
        size = size_for_model((clip.height, clip.width), self.config.short_side, self.model.encoder)
        for start in range(0, len(chosen), self.config.batch_frames):
            frames = torch.from_numpy(clip.frames(chosen[start : start + self.config.batch_frames]))
            for name, maps in zip(("y_enc", "y_dec"), self._maps(frames, size), strict=True):
                means[name].append(maps.mean(dim=(2, 3)).cpu())
                if name == self.config.features:
                    parts[name].append(maps.half().cpu())
        pooled = {name: torch.cat(values) for name, values in means.items()}  # [T, C]
        stored = (
            pooled
            if self.config.features == "pooled"
            else {self.config.features: torch.cat(parts[self.config.features])}
        )
        row = {"frames": chosen, "height": size[0], "width": size[1]}
        row |= {f"{name}_mean": values.mean(dim=0).tolist() for name, values in pooled.items()}
        return {f"{name}.npy": _npy(values.numpy()) for name, values in stored.items()}, row

    @torch.inference_mode()
    def _maps(self, frames: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        images = rearrange(frames.to(self.spec.device), "t h w c -> t c h w").float() / 255
        shown = F.interpolate(images, size, mode="bilinear", antialias=True)
        y_enc, y_dec = self.model(normalise_images(shown))
        return y_enc.float(), y_dec.float()


def _npy(array: np.ndarray) -> bytes:
    """An array as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
