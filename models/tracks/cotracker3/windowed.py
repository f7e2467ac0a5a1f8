"""CoTracker3 through a clip of any length: overlapping windows, each going on where the last one ended.

The policy follows the published online variant (Karaev et al., arXiv:2410.11831): a window starts
half its length after the one before; in the overlap a point starts from its positions and logits there, behind it
from the last of them; a query joins with the first window that holds its frame. A query keeps the template of its
own frame throughout. Different here: the last window is moved back to end with the clip instead of repeating
frames, queries of later windows are absent instead of present with an empty template, and every window has a
support grid of its own, from its first frame, because the points of an old one leave the picture.

Memory depends on the window and the number of points, not on the clip: about 8.4 MB of features a frame at
384 x 512 and 0.1 MB of templates a point.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kinema.models.tracks.cotracker3.correlation import STRIDE, ClipFeatures
from kinema.models.tracks.cotracker3.network import CoTracker3, TrackState


def window_spans(num_frames: int, window_frames: int) -> Iterator[tuple[int, int]]:
    """(first frame, frame after the last) of each window; all have `window_frames` unless the clip is shorter."""
    step = max(window_frames // 2, 1)
    start = 0
    while start + window_frames < num_frames:
        yield start, start + window_frames
        start += step
    yield max(num_frames - window_frames, 0), num_frames


@dataclass(frozen=True)
class WindowedPass:
    """Tracks queries forwards in time through windows.

    Calling it with a function from (first frame, frame after the last) to features, the number of frames, and
    queries [N, 3] (t, x, y in pixels of the frames that were encoded) gives the state of every frame from the
    first window that holds the query's frame on; earlier frames are zero.
    """

    model: CoTracker3
    window_frames: int
    iters: int
    support_xy: Float[Tensor, "S 2"]
    """Points that are tracked along from each window's first frame, for context."""
    points_at_once: int
    """Queries that are refined together; more than these do not see one another."""

    def __call__(
        self, read: Callable[[int, int], ClipFeatures], num_frames: int, queries: Float[Tensor, "N 3"]
    ) -> TrackState:
        N = len(queries)
        query_frames = queries[:, 0].long()
        whole = _state(queries.new_zeros(1, N, num_frames, 2))
        begun = torch.zeros(N, dtype=torch.bool, device=queries.device)
        templates: list[Tensor] = []
        features, end = None, 0
        for start, stop in window_spans(num_frames, self.window_frames):
            fresh = ~begun & (query_frames < stop)
            begun |= fresh
            if not bool(begun.any()):
                continue
            features = _advance(features, read, start, stop, end)
            anchors = queries - queries.new_tensor([start, 0, 0])
            templates = self._add_templates(templates, features, anchors, fresh)
            active = begun.nonzero()[:, 0]
            for rows in active.split(self.points_at_once):
                state = _start(whole, queries, rows, fresh[rows], (start, stop, end))
                state = self._refine(features, [t[:, rows] for t in templates], state)
                for kept, found in zip(_fields(whole), _fields(state), strict=True):
                    kept[:, rows, start:stop] = found[:, : len(rows)]
            end = stop
        return whole

    def _add_templates(
        self, templates: list[Tensor], features: ClipFeatures, anchors: Tensor, fresh: Tensor
    ) -> list[Tensor]:
        """The templates of all queries, with those of the fresh ones filled in."""
        if not bool(fresh.any()):
            return templates
        found = self.model.templates(features, anchors[fresh][None])
        if not templates:
            templates = [level.new_zeros(1, len(anchors), *level.shape[2:]) for level in found]
        for level, filled in zip(templates, found, strict=True):
            level[:, fresh] = filled
        return templates

    def _refine(self, features: ClipFeatures, templates: list[Tensor], state: TrackState) -> TrackState:
        """The state after all refinements, support points last."""
        if len(self.support_xy):
            support = torch.nn.functional.pad(self.support_xy, (1, 0))[None]  # at frame 0 of the window
            templates = [
                torch.cat(pair, dim=1) for pair in zip(templates, self.model.templates(features, support), strict=True)
            ]
            xy = (self.support_xy / STRIDE)[None, :, None].expand(-1, -1, features.num_frames, -1)
            pairs = zip(_fields(state), _fields(_state(xy)), strict=True)
            state = TrackState(*(torch.cat(pair, dim=1) for pair in pairs))
        *_, state = self.model.refine(features, templates, state, self.iters)
        return state


def _advance(
    features: ClipFeatures | None, read: Callable[[int, int], ClipFeatures], start: int, stop: int, end: int
) -> ClipFeatures:
    """Features of start..stop, given those of a window that ended at `end`."""
    if features is None or end <= start:
        return read(start, stop)
    return features.last(end - start).followed_by(read(end, stop))


def _start(whole: TrackState, queries: Tensor, rows: Tensor, fresh: Tensor, span: tuple[int, int, int]) -> TrackState:
    """Where the points `rows` start in a window (start, stop) behind one that ended at `end`."""
    start, stop, end = span
    known = max(end - start, 0)
    fields = []
    for stored in _fields(whole):
        values = stored[:, rows, start:stop].clone()
        if known:
            values[:, :, known:] = values[:, :, known - 1 : known]
        fields.append(values)
    xy, visibility, confidence = fields
    xy[:, fresh] = queries[rows][fresh][:, None, 1:] / STRIDE
    visibility[:, fresh], confidence[:, fresh] = 0.0, 0.0
    return TrackState(xy, visibility, confidence)


def _state(xy: Float[Tensor, "B N T 2"]) -> TrackState:
    """Positions with logits 0."""
    return TrackState(xy, torch.zeros_like(xy[..., 0]), torch.zeros_like(xy[..., 0]))


def _fields(state: TrackState) -> tuple[Tensor, Tensor, Tensor]:
    return state.xy, state.visibility, state.confidence
