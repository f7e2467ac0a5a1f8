"""AllTracker: the flow of every pixel of one frame, the anchor, to every frame of a clip, with visibility.

Frames are 0..255, of any size; flow is (x, y) in pixels of those frames, from the anchor, frame 0. Inside, maps live
at 1/8 of the padded frames and flow in cells of that map. Clips go in windows of 16 frames that overlap by half.

Source: Harley et al., "AllTracker: Efficient Dense Point Tracking at High Resolution", ICCV 2025, arXiv:2506.07310.
Deviations: sides below 128 pixels are padded up to 128, where the published code fails; a pair of frames has a time
axis in the result, on which frame 0 (not estimated then) has no motion and is seen.

Shape legend: B clips, T frames, S frames of a window, H W frame, h w map, C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kinema.kernels.convex_upsampling import convex_upsample
from kinema.models.flow.geometry import pixel_grid
from kinema.models.flow.padding import Padding, padding_for
from kinema.models.tracks.alltracker.correlation import LOOKUP_CHANNELS, AnchorCorrelation
from kinema.models.tracks.alltracker.layers import CHANNELS, ConvNextEncoder, UpdateBlock, frame_by_frame
from kinema.models.tracks.cotracker3.inference import encoded_frames
from kinema.models.tracks.cotracker3.layers import FrameEncoder
from kinema.models.weights import download, load_weights, published_file, read_state_dict

WINDOW_FRAMES = 16
STRIDE, MULTIPLE, MIN_SIDE_PX = 8, 64, 128
"""Cell of the map, what padded sides divide by, and their least: five correlation levels of at least one cell."""
PAIR_TIME_ROW = 1
"""Row of the time table that the only target of a pair has."""
NAMES = ("alltracker", "alltracker_tiny")
Frames = Callable[[int, int], Float[Tensor, "B n 3 H W"]]
"""`frames(start, end)`: those frames of all clips, in 0..255."""
EncodedFrames = Callable[[int, int], "FrameMaps"]
"""`encoded(start, end)`: those frames as `AllTracker.encode` gives them."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DenseTracks(NamedTuple):
    """Where the pixels of frame 0 are in each frame, and whether they are seen there."""

    flow: Float[Tensor, "B T 2 H W"]
    """(x, y) in pixels, from frame 0."""
    visconf: Float[Tensor, "B T 2 H W"]
    """Probability that the pixel is seen, and that its position is right to within a few pixels."""


class TrackPart(NamedTuple):
    """Final tracks of the frames from `start` on."""

    start: int
    tracks: DenseTracks


@dataclass(frozen=True)
class FrameMaps:
    """Encoded frames, in the order of a clip. Joining and cutting them gives other clips of the same frames."""

    maps: Float[Tensor, "B T C h w"]
    """Features of the padded frames."""
    size: tuple[int, int]
    """Height and width of the frames as given."""

    def __getitem__(self, frames: slice) -> "FrameMaps":
        return FrameMaps(self.maps[:, frames], self.size)

    @staticmethod
    def join(parts: Sequence["FrameMaps"]) -> "FrameMaps":
        """Parts of one clip, one after another."""
        return FrameMaps(torch.cat([part.maps for part in parts], dim=1), parts[0].size)


@dataclass(frozen=True)
class _State:
    """What is refined: flow in cells, logits of visible and confident, hidden state. Rows: frames of all clips."""

    flow: Float[Tensor, "R 2 h w"]
    logits: Float[Tensor, "R 2 h w"]
    hidden: Float[Tensor, "R C h w"]


class AllTracker(nn.Module):
    """`model(video)` gives dense tracks of frame 0; see `forward`.

    Args:
        tiny: the small encoder, whose map is state and context at once.
        iters: refinements of a window when a call does not say.
    """

    time_emb: Tensor

    def __init__(self, tiny: bool = False, iters: int = 4) -> None:
        super().__init__()
        self.tiny, self.iters = tiny, iters
        if tiny:
            self.fnet = FrameEncoder(CHANNELS, stride=STRIDE)
        else:
            self.cnn = ConvNextEncoder()
            self.dot_conv = nn.Conv2d(384, 2 * CHANNELS, 1)
        self.upsample_weight = _head(64 * 9, kernel=1)
        self.flow_head = _head(2)
        self.visconf_head = _head(2)
        self.update_block = UpdateBlock(LOOKUP_CHANNELS)
        self.register_buffer("time_emb", time_table(WINDOW_FRAMES))

    def forward(self, video: Float[Tensor, "_ _ _ _ _"], iters: int | None = None) -> DenseTracks:
        """Tracks of every pixel of frame 0; where windows overlap, the later one counts.

        Args:
            video: [B, T, 3, H, W], values 0..255, T at least 2.
            iters: refinements of each window (default: `self.iters`).

        Returns: flow [B, T, 2, H, W] in pixels from frame 0 (whose own flow is an estimate, unless T is 2), and
            visconf [B, T, 2, H, W].
        Raises: ValueError for a video of another shape, or iters < 1.
        """
        return self._assembled(video, iters, overwrite=True)

    def sliding(
        self, video: Float[Tensor, "_ _ _ _ _"], iters: int | None = None, window_frames: int = WINDOW_FRAMES
    ) -> DenseTracks:
        """As `forward`, but where windows overlap the earlier one counts: for frames that come one after another."""
        return self._assembled(video, iters, overwrite=False, window_frames=window_frames)

    def stream(
        self,
        frames: Frames,
        num_frames: int,
        iters: int | None = None,
        overwrite: bool = False,
        window_frames: int = WINDOW_FRAMES,
    ) -> Iterator[TrackPart]:
        """The parts of a clip as soon as they are final, each frame once, in order. Holds one window at a time.

        Args: overwrite, let later windows count where two overlap, as `forward` does.
        Raises: ValueError for fewer than 2 frames, or iters < 1.
        """
        return self.stream_encoded(
            lambda start, end: self.encode(frames(start, end)), num_frames, iters, overwrite, window_frames
        )

    def stream_encoded(
        self,
        encoded: EncodedFrames,
        num_frames: int,
        iters: int | None = None,
        overwrite: bool = False,
        window_frames: int = WINDOW_FRAMES,
    ) -> Iterator[TrackPart]:
        """As `stream`, for frames that are encoded already: a frame may serve many clips."""
        if num_frames < 2:
            raise ValueError(f"a clip of {num_frames} frame(s); AllTracker needs at least 2")
        iters = self._checked(iters)
        if num_frames == 2:
            yield self._pair(encoded(0, 2), iters)
            return
        step, last = window_frames // 2, window_starts(num_frames, window_frames)[-1]
        for start, state, size in self._windows(encoded, num_frames, iters, window_frames):
            if overwrite:
                kept = slice(0, window_frames if start == last else step)
            else:
                kept = slice(0 if start == 0 else window_frames - step, window_frames)
            kept = slice(kept.start, min(kept.stop, num_frames - start))
            if kept.stop > kept.start:
                yield TrackPart(start + kept.start, self._full_size(state, window_frames, kept, size))

    def predictions(
        self, video: Float[Tensor, "_ _ _ _ _"], iters: int | None = None, time_row: int = PAIR_TIME_ROW
    ) -> list[list[DenseTracks]]:
        """For each window, the tracks after every refinement, with gradients: for the losses.

        Args: time_row, that a pair's target has in the time table (training draws it at random).
        Raises: ValueError for a clip that windows do not fill, as in training.
        """
        _check_video(video)
        iters, num_frames = self._checked(iters), video.shape[1]
        if num_frames != 2 and (num_frames < WINDOW_FRAMES or num_frames % (WINDOW_FRAMES // 2)):
            raise ValueError(
                f"training clips have 2 frames, or {WINDOW_FRAMES} and more in steps of {WINDOW_FRAMES // 2}; "
                f"this one has {num_frames}"
            )
        encoded = self.encode(video)
        features = encoded.maps
        starts = window_starts(num_frames, WINDOW_FRAMES) if num_frames > 2 else [0]
        windows: list[list[DenseTracks]] = []
        state = None
        for start in starts:
            targets = features[:, start : start + WINDOW_FRAMES] if num_frames > 2 else features[:, 1:]
            times = self.times(WINDOW_FRAMES) if num_frames > 2 else self.time_emb[0, time_row : time_row + 1]
            begin = self._begin(state, targets)
            steps = []
            for state in self._refine(features[:, 0], targets, times, begin, iters):
                every = slice(0, targets.shape[1])
                steps.append(self._full_size(state, targets.shape[1], every, encoded.size))
            windows.append(steps)
        return windows

    def encode(self, video: Float[Tensor, "B T 3 H W"]) -> FrameMaps:
        """Features of frames in 0..255; without gradient one frame at a time: frames do not see one another."""
        mean, std = (video.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (_MEAN, _STD))
        images = _padding(video.shape[-2:]).pad((video.flatten(0, 1).float() / 255.0 - mean) / std)
        maps = frame_by_frame(_Encoder(self), images).float().unflatten(0, video.shape[:2])
        return FrameMaps(maps, (video.shape[-2], video.shape[-1]))

    def times(self, num_frames: int) -> Float[Tensor, "S C"]:
        """The time table for a window of this length: the stored one, resampled unless the lengths agree."""
        table = self.time_emb
        if num_frames == 1:
            return table[0, PAIR_TIME_ROW : PAIR_TIME_ROW + 1]
        if table.shape[1] != num_frames:
            table = F.interpolate(table.transpose(1, 2), size=num_frames, mode="linear").transpose(1, 2)
        return table[0]

    def _checked(self, iters: int | None) -> int:
        iters = self.iters if iters is None else iters
        if iters < 1:
            raise ValueError(f"iters={iters} must be at least 1")
        return iters

    def _assembled(
        self, video: Tensor, iters: int | None, overwrite: bool, window_frames: int = WINDOW_FRAMES
    ) -> DenseTracks:
        _check_video(video)
        parts = [
            part.tracks
            for part in self.stream(
                lambda start, end: video[:, start:end], video.shape[1], iters, overwrite, window_frames
            )
        ]
        return DenseTracks(*(torch.cat(maps, dim=1) for maps in zip(*parts, strict=True)))

    def _pair(self, encoded: FrameMaps, iters: int) -> TrackPart:
        """Both frames of a pair: the anchor as it is, and the estimate of the other."""
        anchor, targets = encoded.maps[:, 0], encoded.maps[:, 1:]
        *_, state = self._refine(anchor, targets, self.times(1), self._begin(None, targets), iters)
        flow, visconf = self._full_size(state, 1, slice(0, 1), encoded.size)
        still, seen = torch.zeros_like(flow), torch.ones_like(visconf)
        return TrackPart(0, DenseTracks(torch.cat([still, flow], dim=1), torch.cat([seen, visconf], dim=1)))

    def _windows(
        self, encoded: EncodedFrames, num_frames: int, iters: int, length: int
    ) -> Iterator[tuple[int, _State, tuple[int, int]]]:
        """Start and last state of each window; the last frame is repeated where the clip is too short."""
        step, state, targets, anchor = length // 2, None, None, None
        for start in window_starts(num_frames, length):
            first = start if targets is None else start + length - step
            new = encoded(first, min(start + length, num_frames))
            known = new.maps if targets is None else torch.cat([targets[:, step:], new.maps], dim=1)
            missing = length - known.shape[1]
            targets = torch.cat([known, known[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1) if missing else known
            anchor = targets[:, 0] if anchor is None else anchor
            begin = self._begin(state, targets, step)
            *_, state = self._refine(anchor, targets, self.times(length), begin, iters)
            yield start, state, new.size

    def _begin(
        self, previous: _State | None, targets: Float[Tensor, "B S C h w"], step: int = WINDOW_FRAMES // 2
    ) -> tuple[Float[Tensor, "R 2 h w"], Float[Tensor, "R 2 h w"]]:
        """Flow and logits that a window starts from: zero, or the previous ones with the last frame repeated."""
        B, S = targets.shape[:2]
        if previous is None:
            zero = targets.new_zeros(B * S, 2, *targets.shape[-2:])
            return zero, zero

        def moved(maps: Tensor) -> Tensor:
            frames = maps.detach().unflatten(0, (B, S))
            last = frames[:, -1:].expand(-1, step, -1, -1, -1)
            return torch.cat([frames[:, step:], last], dim=1).flatten(0, 1)

        return moved(previous.flow), moved(previous.logits)

    def _refine(
        self,
        anchor: Float[Tensor, "B C h w"],
        targets: Float[Tensor, "B S C h w"],
        times: Float[Tensor, "S D"],
        begin: tuple[Float[Tensor, "R 2 h w"], Float[Tensor, "R 2 h w"]],
        iters: int,
    ) -> Iterator[_State]:
        """The states after each refinement of a window, from the flow and the logits that it begins with."""
        num_frames = targets.shape[1]
        correlation = AnchorCorrelation(anchor, targets)
        hidden, context = (anchor, anchor) if self.tiny else anchor.split(CHANNELS, dim=1)
        hidden = hidden.repeat_interleave(num_frames, dim=0)
        context = (context[:, None] + times[:, :, None, None]).flatten(0, 1)  # the state is told no time
        flow, logits = begin
        start = pixel_grid(flow.shape[-2], flow.shape[-1], like=flow)
        for _ in range(iters):
            flow = flow.detach()  # as published: no gradient through the positions that are looked up; logits have one
            motion = torch.cat([self._motion(correlation, row, start, flow) for row in range(flow.shape[0])])
            hidden = self.update_block(hidden, context, motion, logits, num_frames)
            flow = flow + frame_by_frame(self.flow_head, hidden).float()
            logits = logits + frame_by_frame(self.visconf_head, hidden).float()
            yield _State(flow, logits, hidden)

    def _motion(
        self, correlation: AnchorCorrelation, row: int, start: Tensor, flow: Float[Tensor, "R 2 h w"]
    ) -> Float[Tensor, "1 C h w"]:
        windows = correlation.lookup(row, start + flow[row])
        return self.update_block.motion_encoder(flow[row : row + 1], windows[None])

    def _full_size(self, state: _State, num_frames: int, kept: slice, size: tuple[int, int]) -> DenseTracks:
        """Some frames of a window at the size of the clip, one after another: the weights of upsampling are large."""

        def some(maps: Tensor) -> Tensor:
            return maps.unflatten(0, (-1, num_frames))[:, kept].flatten(0, 1)

        rows = zip(*(some(maps).split(1) for maps in (state.flow, state.logits, state.hidden)), strict=True)
        full = torch.cat([_padding(size).unpad(self._upsampled(*row)) for row in rows])
        full = full.unflatten(0, (-1, kept.stop - kept.start))  # [B, n, 4, H, W]
        return DenseTracks(full[:, :, :2].contiguous(), full[:, :, 2:].sigmoid())

    def _upsampled(self, flow: Tensor, logits: Tensor, hidden: Tensor) -> Float[Tensor, "R 4 Hp Wp"]:
        """Flow in pixels, and logits: as published, they too are multiplied by 8 (and so saturate sooner)."""
        maps = STRIDE * torch.cat([flow, logits], dim=1)
        return convex_upsample(maps, self.upsample_weight(hidden), 0.25)


class _Encoder(nn.Module):
    """The encoder of a tracker, whichever it has, as one module; registers nothing."""

    def __init__(self, tracker: AllTracker) -> None:
        super().__init__()
        self.encode = (
            partial(encoded_frames, tracker.fnet) if tracker.tiny else lambda x: tracker.dot_conv(tracker.cnn(x))
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(images)


def _head(channels: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * CHANNELS, channels, kernel, padding=kernel // 2),
    )


def _padding(size: Sequence[int]) -> Padding:
    return padding_for(size[0], size[1], multiple=MULTIPLE, minimum=MIN_SIDE_PX)


def window_starts(num_frames: int, length: int) -> list[int]:
    """First frames of the windows: half a window apart, the last one reaching the end of the clip."""
    starts = [0]
    while starts[-1] + length < num_frames:
        starts.append(starts[-1] + length // 2)
    return starts


def time_table(num_frames: int) -> Float[Tensor, "1 T C"]:
    """Sines, then cosines, of the frame numbers at wavelengths from 2 pi to 10000 times that."""
    frequencies = 10000.0 ** -(torch.arange(CHANNELS // 2, dtype=torch.float64) / (CHANNELS / 2.0))
    angles = torch.arange(num_frames, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[None].float()


def alltracker(
    name: str = "alltracker", pretrained: bool = False, weights: str | Path | None = None, iters: int = 4
) -> AllTracker:
    """AllTracker in eval mode.

    Args:
        name: "alltracker" or "alltracker_tiny"; the shapes of a checkpoint go before it.
        pretrained: take the published weights.
        weights: file or URL of a checkpoint to load instead.
        iters: as of `AllTracker`.
    Raises: ValueError for an unknown name or weights that do not fit.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r} is no AllTracker; use one of {', '.join(NAMES)}")
    if weights is None and pretrained:
        weights = published_file(name)
    if weights is not None:
        weights = download(str(weights)) if "://" in str(weights) else weights
        state = read_state_dict(weights)
        encoders = {encoder for encoder in ("cnn", "fnet") if any(key.startswith(f"{encoder}.") for key in state)}
        if len(encoders) == 1:
            name = "alltracker" if encoders == {"cnn"} else "alltracker_tiny"
    return load_weights(AllTracker(tiny=name == "alltracker_tiny", iters=iters), weights, name).eval()


def alltracker_tiny(pretrained: bool = False, weights: str | Path | None = None, iters: int = 4) -> AllTracker:
    """The tiny one; see `alltracker`."""
    return alltracker("alltracker_tiny", pretrained, weights, iters)


def _check_video(video: Tensor) -> None:
    if video.ndim != 5 or video.shape[2] != 3 or 0 in video.shape:
        raise ValueError(f"video is {list(video.shape)}; AllTracker takes [B, T, 3, H, W] with values in 0..255")
