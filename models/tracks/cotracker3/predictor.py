"""CoTracker3 for clips as they come: any size, any length, uint8 or float; and the benchmark's way of asking.

Positions are (x, y) in pixels of the given frames, centres at integers. Inside, frames are resized to the model's
resolution (bilinear, aligned corners, aspect not kept) and the corner pixels' centres correspond, as published.

Clips of up to `whole_frames` frames are one pass, as published; longer ones go through overlapping windows
(`cotracker3_windowed`). Every frame is encoded once for a pass, also for the pass backwards in time.
Source: Karaev et al., arXiv:2410.11831.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kinema.models.tracks.cotracker3.correlation import ClipFeatures, gather
from kinema.models.tracks.cotracker3.network import CoTracker3, PointTracks, TrackState, check_query_frames
from kinema.models.tracks.cotracker3.windowed import WindowedPass

FRAMES_AT_ONCE = 8


@runtime_checkable
class Frames(Protocol):
    """What a clip may come as: an array, a tensor, or anything that gives such slices of itself."""

    def __len__(self) -> int: ...

    def __getitem__(self, frames: Any, /) -> Any: ...


class Tracks(NamedTuple):
    """Tracks of one clip, or of several with an axis in front."""

    tracks: Float[Tensor, "*B T N 2"]
    """(x, y) in pixels of the given frames."""
    visible: Bool[Tensor, "*B T N"]
    """Whether the point is seen."""
    confidence: Float[Tensor, "*B T N"]
    """Probability that the position is right; the visible flag does not depend on it."""


class CoTracker3Predictor:
    """`predictor(frames, queries)` gives tracks, visible flags and confidence; see `__call__`.

    Args:
        model: the network, on the device it is to run on.
        iters: refinements.
        support_grid: N x N points tracked along for context (from frame 0), and dropped.
        visible_above: visibility from which a point counts as seen.
        whole_frames: longest clip that is tracked in one pass (8.4 MB of features a frame at 384 x 512).
        window_frames: length of a window for longer clips; windows overlap by half.
        max_positions: points x frames refined together, which bounds the memory (about 15 kB each); queries
            beyond that are tracked in groups that do not see one another, each with its own support grid.
    """

    def __init__(
        self,
        model: CoTracker3,
        iters: int = 6,
        support_grid: int = 6,
        visible_above: float = 0.9,
        whole_frames: int = 200,
        window_frames: int = 60,
        max_positions: int = 2**17,
    ) -> None:
        lowest = {"iters": (iters, 1), "support_grid": (support_grid, 0), "whole_frames": (whole_frames, 1)}
        lowest |= {"window_frames": (window_frames, 2), "max_positions": (max_positions, 1)}
        for name, (value, minimum) in lowest.items():
            if value < minimum:
                raise ValueError(f"{name}={value} must be at least {minimum}")
        self.model, self.iters, self.support_grid = model.eval(), iters, support_grid
        self.visible_above, self.max_positions = visible_above, max_positions
        self.whole_frames, self.window_frames = whole_frames, window_frames

    @torch.no_grad()
    def __call__(
        self,
        frames: Frames,
        queries: Tensor | np.ndarray | None = None,
        *,
        grid: int = 0,
        grid_frame: int = 0,
        mask: Tensor | np.ndarray | None = None,
        backward: bool = False,
    ) -> Tracks:
        """Track query points, or a regular grid, through a clip.

        Args:
            frames: uint8 [T, H, W, 3] or float [T, 3, H, W] in 0..1; anything with these slices and a length
                will do, and is read a few frames at a time. With one more axis in front, a batch of clips.
            queries: [N, 3]: frame (truncated to an integer), x, y in pixels. With a batch, [B, N, 3].
            grid: instead of queries, grid x grid points over the frame, at frame `grid_frame`.
            mask: [H, W]; only the grid points where it is not 0 are kept.
            backward: frames before a point's query are tracked backwards from it. Otherwise they hold what the
                pass forwards makes of them. Clips that need windows are always tracked backwards too.

        Returns: on the model's device. A point is at its query, and visible, in the query's frame.
        Raises: ValueError for frames, queries or masks of another form, or query frames outside the clip.
        """
        if (queries is None) == (grid == 0):
            raise ValueError("give queries [N, 3] or grid=N, and not both")
        if mask is not None and grid == 0:
            raise ValueError("mask chooses points of a grid: give grid=N too")
        if getattr(frames, "ndim", 4) == 5:
            return self._batch(frames, queries, grid=grid, grid_frame=grid_frame, mask=mask, backward=backward)
        clip = _Clip(frames, self.model)
        if queries is not None:
            points = clip.to_model(_queries(queries, clip))
        else:
            points = self._grid(clip, grid, grid_frame, mask)
        # As published: a full grid is context enough.
        support = self.support_grid if queries is not None or mask is not None else 0
        found = self._track(clip, points, grid_points(support, clip.height, clip.width).to(points.device), backward)
        return self._finish(clip, points, found)

    def _batch(self, frames: Frames, queries: Tensor | np.ndarray | None, **options) -> Tracks:
        if queries is not None and (queries.ndim != 3 or len(queries) != len(frames)):
            raise ValueError(f"queries are {list(queries.shape)}; a batch of {len(frames)} clips takes [B, N, 3]")
        clips = [frames[i] for i in range(len(frames))]
        each = [self(clip, None if queries is None else queries[i], **options) for i, clip in enumerate(clips)]
        return Tracks(*(torch.stack(parts) for parts in zip(*each, strict=True)))

    def _grid(self, clip: "_Clip", num: int, frame: int, mask: Tensor | np.ndarray | None) -> Float[Tensor, "N 3"]:
        xy = grid_points(num, clip.height, clip.width).to(clip.device)
        if mask is not None:
            wanted = torch.as_tensor(mask).squeeze()
            if wanted.shape != clip.size:
                raise ValueError(f"mask is {list(wanted.shape)}; frames are {clip.size[0]}x{clip.size[1]}")
            resized = F.interpolate(wanted[None, None].float(), (clip.height, clip.width), mode="nearest")[0, 0]
            column = xy[:, 0].round().long().clamp(max=clip.width - 1).cpu()
            row = xy[:, 1].round().long().clamp(max=clip.height - 1).cpu()
            xy = xy[resized.cpu()[row, column] != 0]
        points = F.pad(xy, (1, 0), value=float(frame))
        check_query_frames(points, clip.num_frames)
        return points

    def _track(self, clip: "_Clip", points: Tensor, support_xy: Tensor, backward: bool) -> PointTracks:
        """Tracks [1, T, N] of points in model pixels."""
        T = clip.num_frames
        if not len(points):
            none = points.new_zeros(1, T, 0)
            return PointTracks(none[..., None].expand(-1, -1, -1, 2), none, none)
        later = points[:, 0] >= 1
        if T <= self.whole_frames:
            features = clip.features(0, T)
            found = self._whole_pass(features, points, F.pad(support_xy, (1, 0)))
            if backward and bool(later.any()):
                support = F.pad(support_xy, (1, 0), value=float(T - 1))  # it stays where it is in the clip
                reverse = self._whole_pass(features.reversed(), _mirrored(points, T), support)
                found = _join(found, reverse, points)
            return found
        at_once = max(self.max_positions // self.window_frames - len(support_xy), 1)
        windowed = WindowedPass(self.model, self.window_frames, self.iters, support_xy, at_once)
        found = windowed(clip.features, T, points).published()
        if bool(later.any()):

            def reversed_features(start: int, stop: int) -> ClipFeatures:
                return clip.features(T - stop, T - start).reversed()

            state = windowed(reversed_features, T, _mirrored(points[later], T))
            whole = TrackState(*(_spread(x, later) for x in (state.xy, state.visibility, state.confidence)))
            found = _join(found, whole.published(), points)
        return found

    def _whole_pass(self, features: ClipFeatures, points: Tensor, support: Tensor) -> PointTracks:
        """One pass over the whole clip, for groups of points that are refined together."""
        at_once = max(self.max_positions // features.num_frames - len(support), 1)
        groups = []
        for part in points.split(at_once):
            found = self.model.track(features, torch.cat([part, support])[None], self.iters)
            groups.append([x[:, :, : len(part)] for x in found])
        return PointTracks(*(torch.cat(parts, dim=2) for parts in zip(*groups, strict=True)))

    def _finish(self, clip: "_Clip", points: Tensor, found: PointTracks) -> Tracks:
        tracks, visible = found.tracks[0].clone(), found.visibility[0] > self.visible_above
        rows = torch.arange(len(points), device=points.device)
        frames = points[:, 0].long()
        tracks[frames, rows] = points[:, 1:]
        visible[frames, rows] = True
        return Tracks(clip.to_frames(tracks), visible, found.confidence[0])


class _Clip:
    """A clip's frames at the model's resolution."""

    def __init__(self, frames: Frames, model: CoTracker3) -> None:
        self.frames, self.model, self.num_frames = frames, model, len(frames)
        self.device = model.time_emb.device
        self.height, self.width = model.model_resolution
        if not self.num_frames:
            raise ValueError("the clip has no frames")
        first = torch.as_tensor(frames[:1])
        wanted = "uint8 [T, H, W, 3] or float [T, 3, H, W] in 0..1"
        if first.ndim != 4 or not (first.dtype == torch.uint8 or first.is_floating_point()):
            raise ValueError(f"frames are {first.dtype} with slices of {list(first.shape)}; they must be {wanted}")
        channels, size = (-1, first.shape[1:3]) if first.dtype == torch.uint8 else (1, first.shape[2:4])
        if first.shape[channels] != 3 or min(size) < 2:
            raise ValueError(f"frames have slices of {list(first.shape)}; they must be {wanted}, 2 pixels or more")
        self.size = torch.Size(size)

    def features(self, start: int, stop: int) -> ClipFeatures:
        """Features of the frames start to stop - 1."""
        starts = range(start, stop, FRAMES_AT_ONCE)
        parts = (self.model.encode(self._read(t, min(t + FRAMES_AT_ONCE, stop))) for t in starts)
        return gather(parts, stop - start)

    def to_model(self, queries: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Queries in pixels of the frames to pixels of the model."""
        return torch.cat([queries[:, :1], queries[:, 1:] * self._scale()], dim=1)

    def to_frames(self, xy: Float[Tensor, "*B 2"]) -> Float[Tensor, "*B 2"]:
        """Positions in pixels of the model to pixels of the frames."""
        height, width = self.size
        return xy * xy.new_tensor([(width - 1) / (self.width - 1), (height - 1) / (self.height - 1)])

    def _scale(self) -> Tensor:
        height, width = self.size
        scale = [(self.width - 1) / (width - 1), (self.height - 1) / (height - 1)]
        return torch.tensor(scale, dtype=torch.float32, device=self.device)

    def _read(self, start: int, stop: int) -> Float[Tensor, "1 T 3 H W"]:
        frames = torch.as_tensor(self.frames[start:stop]).to(self.device)
        if frames.dtype == torch.uint8:
            frames = frames.permute(0, 3, 1, 2).float()
        else:
            if float(frames.max()) > 2.0:
                raise ValueError(f"float frames reach {float(frames.max()):g}; they must be in 0..1 (uint8 in 0..255)")
            frames = 255.0 * frames.float()
        return F.interpolate(frames, (self.height, self.width), mode="bilinear", align_corners=True)[None]


class BenchmarkTracker:
    """Tracks as the published benchmark figures were made: `tracker(frames, queries) -> (tracks, visible)`.

    Grids of context points start at frame 0 whatever the query's frame; positions are not corrected at the query;
    a point counts as seen where visibility x confidence exceeds 0.6. The whole clip is one pass.

    Args:
        single: every query in a run of its own, with a `local_grid` squared grid in a 50 pixel box (of the model's
            resolution) around it and a `grid` squared one over the frame; otherwise all queries in one run with
            the latter only.
        both_directions: frames before a query come from a pass over the reversed clip ("strided" queries).
    """

    def __init__(
        self,
        model: CoTracker3,
        single: bool = True,
        both_directions: bool = False,
        grid: int = 5,
        local_grid: int = 8,
        iters: int = 6,
    ) -> None:
        self.model, self.single, self.both_directions = model.eval(), single, both_directions
        self.grid, self.local_grid, self.iters = grid, local_grid, iters
        self.local_extent_px, self.visible_above = 50.0, 0.6

    def __call__(
        self, frames: Frames, queries: Tensor | np.ndarray
    ) -> tuple[Float[Tensor, "T N 2"], Bool[Tensor, "T N"]]:
        """Positions in pixels of the frames, and visible flags; arguments as for `CoTracker3Predictor`."""
        tracks, score = self.scores(frames, queries)
        return tracks, score > self.visible_above

    @torch.no_grad()
    def scores(
        self, frames: Frames, queries: Tensor | np.ndarray
    ) -> tuple[Float[Tensor, "T N 2"], Float[Tensor, "T N"]]:
        """Positions in pixels of the frames, and visibility x confidence."""
        clip = _Clip(frames, self.model)
        points = clip.to_model(_queries(queries, clip))
        if not len(points):
            return points.new_zeros(clip.num_frames, 0, 2), points.new_zeros(clip.num_frames, 0)
        features = clip.features(0, clip.num_frames)
        found = self._pass(clip, features, points)
        if self.both_directions and bool((points[:, 0] >= 1).any()):
            reverse = self._pass(clip, features.reversed(), _mirrored(points, clip.num_frames))
            found = _join(found, reverse, points)
        return clip.to_frames(found.tracks[0]), (found.visibility * found.confidence)[0]

    def _pass(self, clip: _Clip, features: ClipFeatures, points: Tensor) -> PointTracks:
        everywhere = grid_points(self.grid, clip.height, clip.width).to(points.device)
        if not self.single:
            return self._run(features, points, [everywhere])
        each = []
        for point in points.split(1):
            centre = (float(point[0, 2]), float(point[0, 1]))
            around = grid_points(self.local_grid, self.local_extent_px, self.local_extent_px, centre)
            each.append(self._run(features, point, [around.to(points.device), everywhere]))
        return PointTracks(*(torch.cat(parts, dim=2) for parts in zip(*each, strict=True)))

    def _run(self, features: ClipFeatures, points: Tensor, support: list[Tensor]) -> PointTracks:
        queries = torch.cat([points, *(F.pad(xy, (1, 0)) for xy in support)])[None]
        found = self.model.track(features, queries, self.iters)
        return PointTracks(*(x[:, :, : len(points)] for x in found))


def grid_points(
    num: int, height: float, width: float, centre: tuple[float, float] | None = None
) -> Float[Tensor, "N 2"]:
    """num x num points (x, y) over a rectangle, row by row, with a margin of width / 64 on all four sides.

    Args: centre, (y, x) of the rectangle; by default it starts at the origin.
    """
    if num < 2:
        return torch.tensor([[width / 2, height / 2]] * num, dtype=torch.float32).view(num, 2)
    middle_y, middle_x = centre if centre is not None else (height / 2, width / 2)
    margin = width / 64
    y = torch.linspace(margin - height / 2 + middle_y, height / 2 + middle_y - margin, num)
    x = torch.linspace(margin - width / 2 + middle_x, width / 2 + middle_x - margin, num)
    return torch.stack([x.expand(num, num), y[:, None].expand(num, num)], dim=-1).flatten(0, 1)


def _queries(queries: Tensor | np.ndarray, clip: _Clip) -> Float[Tensor, "N 3"]:
    points = torch.as_tensor(queries).to(clip.device, torch.float32)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"queries are {list(points.shape)}; they must be [N, 3]: frame, x, y")
    check_query_frames(points, clip.num_frames)
    return points


def _mirrored(points: Float[Tensor, "N 3"], num_frames: int) -> Float[Tensor, "N 3"]:
    """The queries in the reversed clip; a fraction of a frame goes, so that truncation hits the same frame."""
    return torch.cat([num_frames - 1 - points[:, :1].floor(), points[:, 1:]], dim=1)


def _join(forward: PointTracks, reverse: PointTracks, points: Float[Tensor, "N 3"]) -> PointTracks:
    """The forward pass from each query's frame on, and before it the reversed pass, turned round."""
    frames = torch.arange(forward.tracks.shape[1], device=points.device)[None, :, None]
    earlier = frames < points[:, 0].long()
    return PointTracks(
        torch.where(earlier[..., None], reverse.tracks.flip(1), forward.tracks),
        torch.where(earlier, reverse.visibility.flip(1), forward.visibility),
        torch.where(earlier, reverse.confidence.flip(1), forward.confidence),
    )


def _spread(values: Tensor, rows: Bool[Tensor, "N"]) -> Tensor:
    """Values of some points [1, n, ...] among all [1, N, ...], zero elsewhere."""
    whole = values.new_zeros(1, len(rows), *values.shape[2:])
    whole[:, rows] = values
    return whole
