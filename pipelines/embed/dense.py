"""Dense features of single frames: maps, or their means over the frame."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kinema.configs import EmbedConfig
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.loader.clip import Clip
from kinema.pipelines.pictures.images import normalise_images, size_for_model
from kinema.pipelines.registry.shipped.compact import packed, thinned

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
IDENTITY = ("features", "frame_stride", "short_side", "dtype", "stride")
DTYPE_BYTES = {"float32": 4, "float16": 2, "int8": 1}


def embed_clip(
    model: Any, clip: Clip, config: EmbedConfig, device: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Members and row of one clip.

    Members are arrays over the embedded frames [T, ...]: `y_dec` or `y_enc` [T, C, h, w] in the config's type, for int8
    with `y_dec_scale` float32 [C]; for `pooled` both, as float32 means over the frame [T, C]. The row holds their means
    over frames too.
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
                parts[name].append(thinned(maps, config.stride).cpu())
    pooled = {name: torch.cat(values) for name, values in means.items()}  # [T, C]
    stored = {name: values.numpy() for name, values in pooled.items()}
    if config.features != "pooled":
        kept = packed(torch.cat(parts[config.features]), config.dtype)
        stored = {f"{config.features}_{end}" if end else config.features: values for end, values in kept.items()}
    row = {"frames": chosen, "height": size[0], "width": size[1]}
    row |= {f"{name}_mean": values.mean(dim=0).tolist() for name, values in pooled.items()}
    return stored, row


@torch.inference_mode()
def describe_size(config: EmbedConfig, model: Any, clips: Artifact) -> str:
    """How many bytes the maps of all clips will take, and what makes them fewer."""
    num_frames: dict[tuple[int, int], int] = {}
    for row in clips.samples(["num_frames", "height", "width"]).to_pylist():
        size = size_for_model((row["height"], row["width"]), config.short_side, model.encoder)
        num_frames[size] = num_frames.get(size, 0) + math.ceil(row["num_frames"] / config.frame_stride)
    wanted, values = ("y_enc", "y_dec").index(config.features), 0
    for size, count in num_frames.items():
        maps = model(torch.zeros(1, 3, *size, device=next(model.parameters()).device))[wanted]
        values += count * thinned(maps, config.stride).numel()
    total, frames = values * DTYPE_BYTES[config.dtype], sum(num_frames.values())
    fewer = [f"stride={2 * config.stride} a quarter", *(["dtype=int8 half"] if config.dtype == "float16" else [])]
    each = _megabytes(total / max(1, frames))
    return (
        f"{config.features} of {frames:,} frames takes {_megabytes(total)} ({each} a frame, {config.dtype}, "
        f"stride {config.stride}); {', '.join(fewer)}, features=pooled next to nothing"
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


@torch.inference_mode()
def _maps(model: Any, frames: Tensor, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    images = rearrange(frames.to(device), "t h w c -> t c h w").float() / 255
    shown = F.interpolate(images, size, mode="bilinear", antialias=True)
    y_enc, y_dec = model(normalise_images(shown))
    return y_enc.float(), y_dec.float()
