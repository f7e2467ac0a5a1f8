"""Dense features of single frames: maps, or their means over the frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kinema.configs import EmbedConfig
from kinema.pipelines.loader.clip import Clip
from kinema.pipelines.pictures.images import normalise_images, size_for_model

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
IDENTITY = ("features", "frame_stride", "short_side")


def embed_clip(
    model: Any, clip: Clip, config: EmbedConfig, device: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Members and row of one clip.

    Members are arrays over the embedded frames [T, ...]: `y_dec` or `y_enc` float16 [T, C, h, w]; for `pooled` both, as
    float32 means over the frame [T, C]. The row holds their means over frames too.
    """
    chosen = list(range(0, clip.num_frames, config.frame_stride))
    parts: dict[str, list[Tensor]] = {"y_enc": [], "y_dec": []}
    means: dict[str, list[Tensor]] = {"y_enc": [], "y_dec": []}
    size = size_for_model((clip.height, clip.width), config.short_side, model.encoder)
    for start in range(0, len(chosen), config.batch_frames):
        frames = torch.from_numpy(clip.frames(chosen[start : start + config.batch_frames]))
        for name, maps in zip(("y_enc", "y_dec"), _maps(model, frames, size, device), strict=True):
            means[name].append(maps.mean(dim=(2, 3)).cpu())
            if name == config.features:
                parts[name].append(maps.half().cpu())
    pooled = {name: torch.cat(values) for name, values in means.items()}  # [T, C]
    stored = pooled if config.features == "pooled" else {config.features: torch.cat(parts[config.features])}
    row = {"frames": chosen, "height": size[0], "width": size[1]}
    row |= {f"{name}_mean": values.mean(dim=0).tolist() for name, values in pooled.items()}
    return {name: values.numpy() for name, values in stored.items()}, row


@torch.inference_mode()
def _maps(model: Any, frames: Tensor, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    images = rearrange(frames.to(device), "t h w c -> t c h w").float() / 255
    shown = F.interpolate(images, size, mode="bilinear", antialias=True)
    y_enc, y_dec = model(normalise_images(shown))
    return y_enc.float(), y_dec.float()
