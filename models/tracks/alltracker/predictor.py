"""Point tracks out of AllTracker's dense ones: any queries, clips of any length, one window in memory at a time.

A query in frame q is followed through the frames from q on, and through the reversed frames from q back. All queries
of one frame share their passes, so a grid may be as dense as the picture.

Source: Harley et al., arXiv:2506.07310; which of two estimates of a frame counts is as in its evaluation.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kinema.models.flow.geometry import points_norm_to_px, points_px_to_norm
from kinema.models.tracks.alltracker.network import AllTracker, DenseTracks
from kinema.models.tracks.cotracker3.network import check_query_frames
from kinema.models.tracks.cotracker3.predictor import Frames, Tracks

VISIBLE_ABOVE = 0.6
"""Least product of the two probabilities with which a point counts as seen, as in the published evaluation."""
OVERWRITE_UP_TO_FRAMES = 128
"""Clips up to this long take the later of two estimates where windows overlap, longer ones the earlier."""


class AllTrackerPredictor:
    """`predictor(frames, queries)` gives tracks, visible flags and confidence.

    Args:
        model: the network, on the device it is to run on.
        iters: refinements of each window.
        visible_above: see `VISIBLE_ABOVE`.
        size: (height, width) to which frames are resized; None keeps theirs.
        nearest: read positions at the pixel nearest to the query, as the published evaluation does, instead of adding
            the interpolated flow to it.
    """

    def __init__(
        self,
        model: AllTracker,
        iters: int = 4,
        visible_above: float = VISIBLE_ABOVE,
        size: tuple[int, int] | None = None,
        nearest: bool = False,
    ) -> None:
        if iters < 1:
            raise ValueError(f"iters={iters} must be at least 1")
        self.model, self.iters, self.visible_above = model.eval(), iters, visible_above
        self.size, self.nearest = size, nearest

    @torch.no_grad()
    def __call__(self, frames: Frames, queries: Tensor | np.ndarray) -> Tracks:
        """Track query points through a clip, forwards and backwards in time.

        Args:
            frames: uint8 [T, H, W, 3]; anything with these slices and a length will do, and is read a window at a time.
            queries: [N, 3]: frame (truncated to an integer), x, y in pixels.

        Returns: on the model's device. A point is at its query, and visible, in the query's frame.
        Raises: ValueError for frames or queries of another form, or query frames outside the clip.
        """
        num_frames, size = _checked(frames)
        points = torch.as_tensor(queries).to(self.model.time_emb.device, torch.float32)
        if points.ndim != 2 or points.shape[1] != 3:
            raise ValueError(f"queries are {list(points.shape)}; they must be [N, 3]: frame, x, y")
        check_query_frames(points, num_frames)
        tracks = points[:, 1:].expand(num_frames, -1, -1).clone()
        score = points.new_ones(num_frames, len(points))
        starts = points[:, 0].long()
        for start in starts.unique().tolist():
            rows = (starts == start).nonzero()[:, 0]
            for order in (range(start, num_frames), range(start, -1, -1)):
                self._follow(frames, order, size, points[rows, 1:], rows, tracks, score)
        return Tracks(tracks, score > self.visible_above, score)

    def _follow(
        self,
        frames: Frames,
        order: range,
        size: tuple[int, int],
        start_xy: Float[Tensor, "n 2"],
        rows: Tensor,
        tracks: Float[Tensor, "T N 2"],
        score: Float[Tensor, "T N"],
    ) -> None:
        """Fill in what becomes of points of the first frame of `order` in the others."""
        if len(order) < 2:
            return
        seen_size = self.size or size
        start = _resized(start_xy, size, seen_size)
        overwrite = len(order) <= OVERWRITE_UP_TO_FRAMES
        for part in self.model.stream(self._reader(frames, order, seen_size), len(order), self.iters, overwrite):
            xy, probability = _read(part.tracks, start, self.nearest)
            for offset, frame in enumerate(order[part.start : part.start + len(xy)]):
                if frame != order[0]:
                    tracks[frame, rows] = _resized(xy[offset], seen_size, size)
                    score[frame, rows] = probability[offset]

    def _reader(self, frames: Frames, order: range, size: tuple[int, int]) -> Callable[[int, int], Tensor]:
        def read(start: int, end: int) -> Float[Tensor, "1 n 3 H W"]:
            wanted = order[start:end]
            first, last = min(wanted), max(wanted)
            found = torch.as_tensor(frames[first : last + 1]).to(self.model.time_emb.device)
            images = found.permute(0, 3, 1, 2).float()
            images = images if order.step > 0 else images.flip(0)
            if tuple(images.shape[-2:]) != size:
                images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
            return images[None]

        return read


def _read(
    tracks: DenseTracks, start_xy: Float[Tensor, "n 2"], nearest: bool
) -> tuple[Float[Tensor, "S n 2"], Float[Tensor, "S n"]]:
    """Positions of points of the anchor in each frame, and the product of the two probabilities."""
    flow, visconf = tracks.flow[0], tracks.visconf[0]  # [S, 2, H, W]
    height, width = flow.shape[-2:]
    x, y = start_xy.round().long().unbind(-1)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    probability = visconf[:, 0, y, x] * visconf[:, 1, y, x]
    if nearest:
        return torch.stack([x, y], dim=-1).float() + flow[:, :, y, x].transpose(1, 2), probability
    grid = points_px_to_norm(start_xy, height, width) * 2 - 1
    moved = F.grid_sample(flow, grid.expand(len(flow), 1, -1, -1), padding_mode="border", align_corners=False)
    return start_xy + moved[:, :, 0].transpose(1, 2), probability


def _resized(xy: Float[Tensor, "n 2"], size: tuple[int, int], wanted: tuple[int, int]) -> Float[Tensor, "n 2"]:
    """Pixel positions in a picture of another size."""
    return xy if size == wanted else points_norm_to_px(points_px_to_norm(xy, *size), *wanted)


def _checked(frames: Frames) -> tuple[int, tuple[int, int]]:
    """Number of frames and their size."""
    num_frames = len(frames)
    if not num_frames:
        raise ValueError("the clip has no frames")
    first = torch.as_tensor(frames[:1])
    if first.ndim != 4 or first.dtype != torch.uint8 or first.shape[-1] != 3:
        raise ValueError(
            f"frames are {first.dtype} with slices of {list(first.shape)}; they must be uint8 [T, H, W, 3]"
        )
    return num_frames, (first.shape[1], first.shape[2])


class BenchmarkAllTracker:
    """Tracks as the published benchmark figures were made: `tracker(frames, queries) -> (tracks, visible)`.

    Frames are resized to 384 x 512; positions are those of the nearest pixel. The published code runs from the query on
    only; frames before it ("strided" queries) come from the reversed clip here.
    """

    def __init__(self, model: AllTracker, iters: int = 4, size: tuple[int, int] = (384, 512)) -> None:
        self.predict = AllTrackerPredictor(model, iters, size=size, nearest=True)

    def __call__(
        self, frames: Frames, queries: Tensor | np.ndarray
    ) -> tuple[Float[Tensor, "T N 2"], Bool[Tensor, "T N"]]:
        """Positions in pixels of the frames, and visible flags."""
        found = self.predict(frames, queries)
        return found.tracks, found.visible
