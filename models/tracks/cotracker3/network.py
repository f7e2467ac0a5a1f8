"""CoTracker3, offline: tracks of many points through a clip, refined together.

Frames are 0..255 with sides that are multiples of 4; queries are (t, x, y) with pixels of those frames,
centres at integers. For frames of any size, uint8 clips and clips of any length see `cotracker3_predictor`.

Source: Karaev et al., "CoTracker3: Simpler and Better Point Tracking by Pseudo-Labelling Real Videos",
arXiv:2410.11831. Deviations: a batch is one call (the published code takes one clip), query times outside the
clip are an error.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.tracks.cotracker3.correlation import (
    MIN_SIDE_PX,
    NUM_LEVELS,
    STRIDE,
    ClipFeatures,
    feature_pyramid,
    gather,
    window_correlation,
    windows,
)
from kinema.models.tracks.cotracker3.inference import encoded_frames
from kinema.models.tracks.cotracker3.layers import FrameEncoder, Mlp, TrackTransformer
from kinema.models.weights import resolve_weights

TOKEN_CHANNELS = 1110
CODE_CHANNELS = 256
NUM_FREQUENCIES = 10
DEFAULT_ITERS = 4
MAX_TRACK_FRAMES_CPU, MAX_TRACK_FRAMES_CUDA = 2**11, 2**15
"""Positions (points times frames) whose windows are correlated at a time: about 70 kB each."""


class PointTracks(NamedTuple):
    """Tracks of a batch of clips."""

    tracks: Float[Tensor, "B T N 2"]
    """(x, y) in pixels of the given frames."""
    visibility: Float[Tensor, "B T N"]
    """Probability that the point is seen."""
    confidence: Float[Tensor, "B T N"]
    """Probability that the position is right to within a few pixels."""


@dataclass(frozen=True)
class TrackState:
    """What is refined; raw values, so that a later window of a long clip can go on from them."""

    xy: Float[Tensor, "B N T 2"]
    """Positions in cells of the feature map (pixels / 4)."""
    visibility: Float[Tensor, "B N T"]
    """Logits."""
    confidence: Float[Tensor, "B N T"]
    """Logits."""

    def published(self) -> PointTracks:
        """In pixels and probabilities, time first."""
        return PointTracks(
            self.xy.transpose(1, 2) * float(STRIDE),
            self.visibility.transpose(1, 2).sigmoid(),
            self.confidence.transpose(1, 2).sigmoid(),
        )


class CoTracker3(nn.Module):
    """`model(video, queries)` gives tracks, visibility and confidence; see `forward`.

    Args:
        window_frames: length of the time table in the checkpoint: 60 offline, 16 online. Clips of other
            lengths use the table resampled.
        model_resolution: (height, width) that relative motion is divided by; frames of other sizes work.
    """

    time_emb: Tensor

    def __init__(self, window_frames: int = 60, model_resolution: tuple[int, int] = (384, 512)) -> None:
        super().__init__()
        height, width = model_resolution
        if min(height, width) < MIN_SIDE_PX or height % STRIDE or width % STRIDE:
            raise ValueError(
                f"model_resolution={model_resolution}: sides must be multiples of {STRIDE}, {MIN_SIDE_PX} or more"
            )
        self.model_resolution = (height, width)
        self.fnet = FrameEncoder()
        self.updateformer = TrackTransformer(TOKEN_CHANNELS)
        self.corr_mlp = Mlp(49 * 49, 384, CODE_CHANNELS, "gelu")
        self.register_buffer("time_emb", time_table(window_frames))

    def forward(
        self,
        video: Float[Tensor, "_ _ _ _ _"],
        queries: Float[Tensor, "_ _ _"],
        iters: int = DEFAULT_ITERS,
    ) -> PointTracks:
        """Tracks of the query points through the clip, forwards and backwards in time.

        Args:
            video: [B, T, 3, H, W], values 0..255; H and W multiples of 4, 32 or more.
            queries: [B, N, 3]: frame (truncated to an integer), x and y in pixels.
            iters: refinements; the published figures use 6.

        Returns: tracks [B, T, N, 2] in pixels, visibility and confidence [B, T, N] in 0..1.
        Raises: ValueError for shapes, sizes or query frames that do not fit, or iters < 1.
        """
        return self._final(self.encode(video), queries, iters)

    def predictions(
        self,
        video: Float[Tensor, "_ _ _ _ _"],
        queries: Float[Tensor, "_ _ _"],
        iters: int = DEFAULT_ITERS,
    ) -> list[PointTracks]:
        """As `forward`, but the tracks after every refinement."""
        features = self.encode(video)
        return [state.published() for state in self._states(features, queries, iters)]

    def track(self, features: ClipFeatures, queries: Float[Tensor, "_ _ _"], iters: int = DEFAULT_ITERS) -> PointTracks:
        """As `forward`, for a clip that is already encoded."""
        return self._final(features, queries, iters)

    def encode(self, video: Float[Tensor, "_ _ _ _ _"], frames_at_once: int = 8) -> ClipFeatures:
        """Features of clips [B, T, 3, H, W] in 0..255, a few frames at a time: frames do not see one another."""
        _check_video(video)
        step = max(frames_at_once // video.shape[0], 1)
        parts = (self._encode(part) for part in video.split(step, dim=1))
        return gather(parts, video.shape[1])

    def templates(self, features: ClipFeatures, queries: Float[Tensor, "B N 3"]) -> list[Float[Tensor, "B N 49 C"]]:
        """The window around each query in its frame, at every level."""
        frames = features.rows().gather(1, queries[..., 0].long())
        cells = queries[..., 1:].float() / STRIDE
        return [
            windows(level.flatten(0, 1), frames, cells / 2**k).flatten(2, 3) for k, level in enumerate(features.levels)
        ]

    def refine(
        self,
        features: ClipFeatures,
        templates: list[Float[Tensor, "B N 49 C"]],
        state: TrackState,
        iters: int,
    ) -> Iterator[TrackState]:
        """The states after each refinement."""
        time = self.times(features.num_frames)
        for _ in range(iters):
            # As published: no gradient through the positions at which features are read.
            xy = state.xy.detach()
            # Built in place: this is the largest array there is.
            inputs = time.expand(*xy.shape[:2], -1, -1).clone()  # [B, N, T, C]
            inputs[..., 0] += state.visibility
            inputs[..., 1] += state.confidence
            self._add_codes(inputs[..., 2 : 2 + NUM_LEVELS * CODE_CHANNELS], features, templates, xy)
            inputs[..., 2 + NUM_LEVELS * CODE_CHANNELS :] += self._motion(xy)
            dx, dy, visibility, confidence = self.updateformer(inputs).float().unbind(-1)
            state = TrackState(
                xy + torch.stack([dx, dy], dim=-1),
                state.visibility + visibility,
                state.confidence + confidence,
            )
            yield state

    def times(self, num_frames: int) -> Float[Tensor, "T C"]:
        """The time table for a clip of this length: the stored one, resampled unless the lengths agree."""
        table = self.time_emb
        if table.shape[1] != num_frames:
            table = F.interpolate(table.transpose(1, 2), size=num_frames, mode="linear").transpose(1, 2)
        return table[0]

    def _states(self, features: ClipFeatures, queries: Tensor, iters: int) -> Iterator[TrackState]:
        _check_queries(queries, features, iters)
        start = queries[..., None, 1:].float() / STRIDE
        xy = start.expand(-1, -1, features.num_frames, -1)
        logits = torch.zeros_like(xy[..., 0])
        return self.refine(features, self.templates(features, queries), TrackState(xy, logits, logits), iters)

    def _final(self, features: ClipFeatures, queries: Tensor, iters: int) -> PointTracks:
        *_, state = self._states(features, queries, iters)
        return state.published()

    def _encode(self, video: Float[Tensor, "B T 3 H W"]) -> ClipFeatures:
        raw = encoded_frames(self.fnet, 2.0 * (video.flatten(0, 1) / 255.0) - 1.0)
        return feature_pyramid(raw.float().unflatten(0, video.shape[:2]))

    def _add_codes(
        self,
        inputs: Float[Tensor, "B N T D"],
        features: ClipFeatures,
        templates: list[Float[Tensor, "B N 49 C"]],
        xy: Float[Tensor, "B N T 2"],
    ) -> None:
        """Add the encoded correlations around every position; the levels' codes stand side by side.

        Some tracks at a time, whose windows are then forgotten; all levels share one network.
        """
        T = xy.shape[2]
        limit = MAX_TRACK_FRAMES_CUDA if xy.is_cuda else MAX_TRACK_FRAMES_CPU
        for clip, frames in enumerate(features.rows()):
            for rows in torch.arange(xy.shape[1]).split(max(limit // T, 1)):
                tracks = slice(int(rows[0]), int(rows[-1]) + 1)
                positions = xy[clip, tracks]
                for k, level in enumerate(features.levels):
                    products = window_correlation(
                        level.flatten(0, 1), templates[k][clip, tracks], frames.expand(len(rows), T), positions / 2**k
                    )
                    inputs[clip, tracks, :, k * CODE_CHANNELS : (k + 1) * CODE_CHANNELS] += self.corr_mlp(products)

    def _motion(self, xy: Float[Tensor, "B N T 2"]) -> Float[Tensor, "B N T 84"]:
        """Displacement from the next and the previous frame, in units of the model resolution, encoded."""
        height, width = self.model_resolution
        scale = xy.new_tensor([width, height]) / STRIDE
        steps = (xy[:, :, 1:] - xy[:, :, :-1]) / scale
        return encode_motion(torch.cat([F.pad(-steps, (0, 0, 0, 1)), F.pad(steps, (0, 0, 1, 0))], dim=-1))


def cotracker3(pretrained: bool = False, weights: str | Path | None = None) -> CoTracker3:
    """CoTracker3 offline; `weights` is a file or URL, `pretrained=True` takes the published ones."""
    return resolve_weights(CoTracker3(), "cotracker3_offline", pretrained, weights).eval()


def time_table(num_frames: int, channels: int = TOKEN_CHANNELS) -> Float[Tensor, "1 T C"]:
    """Sines, then cosines, of the frame numbers at wavelengths from 2 pi to 10000 times that."""
    frequencies = 10000.0 ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels / 2.0))
    angles = torch.arange(num_frames, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[None].float()


def encode_motion(motion: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 84"]:
    """Numbers, then their sines at 1, 2, 4 .. 512 times their size (scale by scale), then the cosines."""
    scales = 2.0 ** torch.arange(NUM_FREQUENCIES, dtype=motion.dtype, device=motion.device)
    angles = (motion[..., None, :] * scales[:, None]).flatten(-2)
    # As published: the cosine is the sine a quarter turn on, which differs from `cos` by rounding.
    return torch.cat([motion, angles.sin(), (angles + 0.5 * math.pi).sin()], dim=-1)


def _check_video(video: Tensor) -> None:
    if video.ndim != 5 or video.shape[2] != 3 or 0 in video.shape:
        raise ValueError(f"video is {list(video.shape)}; CoTracker3 takes [B, T, 3, H, W] with values in 0..255")
    height, width = video.shape[-2:]
    if height % STRIDE or width % STRIDE or min(height, width) < MIN_SIDE_PX:
        raise ValueError(
            f"frames of {height}x{width}: sides must be multiples of {STRIDE}, {MIN_SIDE_PX} or more; "
            "CoTracker3Predictor takes any size"
        )


def _check_queries(queries: Tensor, features: ClipFeatures, iters: int) -> None:
    if queries.ndim != 3 or queries.shape[0] != features.num_clips or queries.shape[1] < 1 or queries.shape[2] != 3:
        raise ValueError(
            f"queries are {list(queries.shape)}; {features.num_clips} clip(s) take "
            f"[{features.num_clips}, N, 3]: frame, x, y"
        )
    check_query_frames(queries, features.num_frames)
    if iters < 1:
        raise ValueError(f"iters={iters} must be at least 1")


def check_query_frames(queries: Float[Tensor, "*B 3"], num_frames: int) -> None:
    """Raises: ValueError for queries that are not finite or whose frame is not in the clip."""
    if not bool(queries.isfinite().all()):
        raise ValueError("queries hold values that are not finite; give t, x and y of points that exist")
    frames = queries[..., 0].long()
    if bool(((frames < 0) | (frames >= num_frames) | (queries[..., 0] < 0)).any()):
        worst = queries[..., 0].flatten()
        raise ValueError(
            f"query frames span {float(worst.min()):g}..{float(worst.max()):g}; the clip has frames 0..{num_frames - 1}"
        )
