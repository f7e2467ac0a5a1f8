"""DisMo's motion extractor: one embedding per frame of how a video moves, whatever it shows.

Source: Ressler-Antal et al., "DisMo: Disentangled Motion Representations for Open-World Motion Transfer", NeurIPS 2025,
arXiv:2511.23428, section 3.1. Same numbers and state-dict keys as the published network. Deviations: long videos are
worked through in chunks, each frame is encoded once; uint8 video is accepted.

Shape legend: B batch, T frames, Q queries (embeddings), W windows, h w feature grid, D width, E encoder channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from kinema.models.backbones.rotary_layers import RMSNorm, at_least_float32, cell_centres
from kinema.models.dismo.layers import (
    FrameEncoder,
    GatedFeedForward,
    SpaceTimeRotary,
    TransformerLayer,
    check_head_size,
)
from kinema.models.dismo.stack import run_layers
from kinema.models.weights import resolve_weights

FRAMES_PER_CHUNK = 8
"""Frames that are encoded, and windows that are embedded, at a time."""


class TemporalStem(nn.Module):
    """What changes in a window, as tokens of 2 x 2 cells: features without their mean over time, one convolution.

    A transformer must first learn which cells of which frames to compare. This compares neighbours in space and time
    before anything is learned, and passes little of what stays as it is.
    """

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv = nn.Conv3d(width_in, width, 3, stride=(1, 2, 2), padding=1, bias=False)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, features: Float[Tensor, "B T h w E"]) -> Float[Tensor, "B T h2 w2 D"]:
        changes = rearrange(features - features.mean(dim=1, keepdim=True), "b t h w e -> b e t h w")
        return rearrange(self.norm(self.conv(changes)), "b d t h w -> b t h w d")


class SpreadNorm(nn.Module):
    """Embeddings with mean 0 and deviation 1 over a batch, in every channel; the running ones when not training.

    While a small generator cannot copy its source yet, embeddings are noise to it, and an extractor that may learn to
    be quiet does so for good. This one cannot.
    """

    def __init__(self, width: int):
        super().__init__()
        # Of planes, because those are what training makes one of all ranks.
        self.norm = nn.BatchNorm2d(width, affine=False, momentum=0.05)

    def forward(self, motion: Float[Tensor, "B Q d"]) -> Float[Tensor, "B Q d"]:
        return rearrange(self.norm(rearrange(motion, "b q d -> b d q 1")), "b d q 1 -> b q d")


class MotionExtractor(nn.Module):
    """Embeds T frames as T - `max_delta_time` vectors; the defaults are the published network's.

    Args:
        width: token width, a multiple of `d_head`.
        depth: number of layers.
        d_head: width of an attention head, a multiple of 8.
        d_motion: width of an embedding.
        frame_encoder_params: arguments of `FrameEncoder`.
        max_delta_time: frames that an embedding looks ahead; the last ones have no embedding of their own.
        train_resolution: frames, height and width that the network is trained on; the first is the length of a window.
        temporal_stem: whether `TemporalStem` makes the tokens; not in the published network.
        spread: whether `SpreadNorm` ends it; not in the published network.
    """

    def __init__(
        self,
        width: int = 1024,
        depth: int = 20,
        d_head: int = 64,
        d_motion: int = 128,
        frame_encoder_params: Mapping[str, Any] | None = None,
        max_delta_time: int = 4,
        train_resolution: Sequence[int] = (8, 256, 256),
        temporal_stem: bool = False,
        spread: bool = False,
    ):
        super().__init__()
        check_head_size(width, d_head)
        if not 0 < max_delta_time < train_resolution[0]:
            raise ValueError(
                f"max_delta_time={max_delta_time} with windows of train_resolution[0]={train_resolution[0]} frames: "
                "it must be at least 1 and less than a window"
            )
        self.window = train_resolution[0]
        self.train_size = (train_resolution[1], train_resolution[2])
        self.max_delta_time = max_delta_time
        self.d_motion = d_motion
        self.checkpoint_layers = False
        self.frame_encoder = FrameEncoder(**(frame_encoder_params or {"model_version": "dinov2_vitl14_reg"}))
        self.proj = nn.Linear(self.frame_encoder.width, width, bias=False)
        self.query_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.pos_emb = SpaceTimeRotary(d_head, width // d_head)
        self.layers = nn.ModuleList(TransformerLayer(width, d_head) for _ in range(depth))
        self.head = nn.Sequential(
            RMSNorm(width, gain="scale"),
            GatedFeedForward(width),
            GatedFeedForward(width, out_width=d_motion),
            RMSNorm(d_motion, gain="scale"),
        )
        self.stem = TemporalStem(width, width) if temporal_stem else None
        if spread:
            self.head.append(SpreadNorm(d_motion))

    def forward(self, x: Shaped[Tensor, "..."], lookahead: int | None = None) -> Float[Tensor, "B Q d"]:
        """Embeddings of the first T - lookahead frames, all T frames seen at once.

        Args:
            x: video [B, T, H, W, 3], floating in -1..1 or uint8, of any size; only the central square is seen.
            lookahead: frames at the end that have no embedding; by default `max_delta_time`.
        Raises: ValueError for another shape or dtype, or too few frames.
        """
        lookahead = self._check(x, lookahead)
        return self._embed(self._encode(x), x.shape[1] - lookahead)

    def forward_sliding(
        self, video: Shaped[Tensor, "..."], lookahead: int | None = None, chunk: int = FRAMES_PER_CHUNK
    ) -> Float[Tensor, "B Q d"]:
        """Embeddings of the first T - lookahead frames of a video of any length.

        Windows of the length trained on slide over the video frame by frame: all embeddings of the first, then the
        last of every later one. The video may be on another device than the network: it is moved in parts, and memory
        does not grow with its length, apart from the video and the embeddings.

        Args:
            video, lookahead: as in `forward`.
            chunk: frames worked on at a time; changes memory and speed, not the result.
        """
        lookahead = self._check(video, lookahead)
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: at least one frame must be worked on at a time")
        T = video.shape[1]
        window = min(self.window, T)
        if lookahead >= window:
            raise ValueError(f"lookahead={lookahead} is not less than a window of {window} frames")
        embeddings: list[Tensor] = []
        for windows in self._windows(video, window, chunk):
            found = self._embed(rearrange(windows, "b w t h x d -> (b w) t h x d"), window - lookahead)
            found = rearrange(found, "(b w) q d -> b w q d", w=windows.shape[1])
            if not embeddings:
                embeddings.append(found[:, 0, :-1])
            embeddings.append(found[:, :, -1])
        return torch.cat(embeddings, dim=1)

    def _windows(self, video: Tensor, window: int, chunk: int) -> Iterator[Float[Tensor, "B W t h w D"]]:
        """Windows of projected features, several at a time, in order."""
        waiting: Tensor | None = None
        for frames in video.split(chunk, dim=1):
            features = self._encode(frames)
            waiting = features if waiting is None else torch.cat([waiting, features], dim=1)
            if waiting.shape[1] >= window:
                yield rearrange(waiting.unfold(1, window, 1), "b w h x d t -> b w t h x d")
                waiting = waiting[:, waiting.shape[1] - window + 1 :]

    def _encode(self, video: Shaped[Tensor, "B T H W 3"]) -> Float[Tensor, "B T h w D"]:
        """Features of every frame, projected to the width of the tokens."""
        frames = rearrange(_in_unit_range(video.to(self.proj.weight.device)), "b t h w c -> (b t) h w c")
        features = self.proj(self.frame_encoder(frames))
        return rearrange(features, "(b t) h w d -> b t h w d", b=len(video))

    def _embed(self, features: Float[Tensor, "B T h w D"], num_queries: int) -> Float[Tensor, "B Q d"]:
        """Embeddings of the first frames from the features of all."""
        if self.stem is not None:
            features = self.stem(features)
        B, T, height, width = features.shape[:4]
        device = features.device
        queries = self.query_tokens.to(features.dtype).expand(B, num_queries, -1)
        tokens = torch.cat([queries, rearrange(features, "b t h w d -> b (t h w) d")], dim=1)
        cells = rearrange(cell_centres(height, width, device=device), "h w c -> (h w) c")
        frame_numbers = torch.arange(T, device=device, dtype=torch.float32)
        # A query stands at the centre of the picture, at the time of its frame.
        time = torch.cat([frame_numbers[:num_queries], repeat(frame_numbers, "t -> (t n)", n=len(cells))])
        pos = torch.cat([cells.new_full((num_queries, 2), 0.5), repeat(cells, "n c -> (t n) c", t=T)])
        theta = self.pos_emb(time[None], pos[None])
        tokens = run_layers(self.layers, at_least_float32(tokens), theta, checkpoint=self.checkpoint_layers)
        return self.head(tokens[:, :num_queries])

    def _check(self, video: Tensor, lookahead: int | None) -> int:
        """The lookahead to use.

        Raises: ValueError for a video that cannot be embedded.
        """
        lookahead = self.max_delta_time if lookahead is None else lookahead
        if video.dim() != 5 or video.shape[-1] != 3 or 0 in video.shape:
            raise ValueError(f"the video has shape {list(video.shape)}; it must be [batch, frames, height, width, 3]")
        if video.dtype != torch.uint8 and not video.dtype.is_floating_point:
            raise ValueError(f"the video is {video.dtype}; give uint8 in 0..255 or floating point in -1..1")
        if lookahead < 0:
            raise ValueError(f"lookahead={lookahead} is negative; give the frames at the end without an embedding")
        if video.shape[1] <= lookahead:
            raise ValueError(
                f"the video has {video.shape[1]} frames; an embedding looks {lookahead} frames ahead, "
                f"so at least {lookahead + 1} are needed"
            )
        return lookahead


def _in_unit_range(video: Tensor) -> Tensor:
    """Floating-point video in -1..1."""
    return video.float() / 127.5 - 1 if video.dtype == torch.uint8 else video


NAMES: Mapping[str, Mapping[str, Any]] = {"motion_extractor_large": {}}
"""Arguments of `MotionExtractor` by name."""


def motion_extractor(
    name: str = "motion_extractor_large", pretrained: bool = False, weights: str | Path | None = None
) -> MotionExtractor:
    """A motion extractor by its name in `NAMES`, in eval mode.

    Args:
        pretrained: download the published weights (once) and load them.
        weights: path or URL of a checkpoint to load instead.
    Raises: ValueError for an unknown name or weights that do not fit.
    """
    if name not in NAMES:
        raise ValueError(f"motion extractor {name!r} is not known; use one of {', '.join(NAMES)}")
    return resolve_weights(MotionExtractor(**NAMES[name]), name, pretrained, weights).eval()
