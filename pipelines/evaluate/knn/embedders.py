"""What a video becomes before its neighbours are looked for: motion embeddings, and two baselines to beat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from kinema.models.dismo.layers import FrameEncoder
from kinema.models.flow.dis import DIS

Embedder = Callable[[UInt8[np.ndarray, "T H W 3"]], Float[Tensor, "d"]]
HISTOGRAM_EDGES = tuple(np.geomspace(0.002, 0.2, 15))
"""Of the magnitude of flow between neighbouring frames, in sides of the frame."""


def motion_embedder(model: Any) -> Embedder:
    """The mean of a video's motion embeddings."""

    @torch.inference_mode()
    def embed(frames: UInt8[np.ndarray, "T H W 3"]) -> Float[Tensor, "d"]:
        return model.forward_sliding(torch.from_numpy(frames)[None]).float()[0].mean(dim=0)

    return embed


def flow_histogram() -> Embedder:
    """How much of a video moves how fast: the share of pixels in each range of flow magnitudes."""
    network = DIS()

    @torch.inference_mode()
    def embed(frames: UInt8[np.ndarray, "T H W 3"]) -> Float[Tensor, "d"]:
        images = rearrange(torch.from_numpy(frames), "t h w c -> t c h w").float() / 255
        magnitude = network(images[:-1], images[1:]).norm(dim=1) / min(frames.shape[1:3])
        bins = torch.bucketize(magnitude.flatten(), torch.tensor(HISTOGRAM_EDGES, dtype=magnitude.dtype))
        return torch.bincount(bins, minlength=len(HISTOGRAM_EDGES) + 1).float() / bins.numel()

    return embed


def frame_features(encoder: FrameEncoder) -> Embedder:
    """The mean of an image encoder's features over a video's frames."""

    @torch.inference_mode()
    def embed(frames: UInt8[np.ndarray, "T H W 3"]) -> Float[Tensor, "d"]:
        features = encoder(torch.from_numpy(frames).float() / 127.5 - 1)
        return features.mean(dim=(0, 1, 2))

    return embed


def untrained_encoder(model: Any, seed: int) -> FrameEncoder:
    """An encoder of the same form as the model's, as it is before any training."""
    network = model.frame_encoder.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = FrameEncoder.__new__(FrameEncoder)
        torch.nn.Module.__init__(fresh)
        fresh.model = type(network)(network.config, network.image_size)
        fresh.image_size = model.frame_encoder.image_size
    return fresh.eval()
