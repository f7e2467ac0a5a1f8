"""Point tracks by chaining optical flow over several gaps, with occlusion and re-detection; no learned part.

A track steps from frame to frame by the flow at its place. A step counts as seen when the flow back from there undoes
it (the forward-backward check). Of several steps, from the frame before or over longer gaps, the one whose chain has
the smallest round-trip error so far is taken, so a long gap bridges an occlusion and cuts drift. While no step is
seen, the track is hidden: it moves on with the motion of its surface, an affine fit to the pixels around it that go
on moving as the surface did, and it is found again when the flow back at its predicted place agrees with it.

Next to a motion edge, interpolated flow is a mixture that belongs to neither side. So the four pixels around a point
are asked one by one whether their flow back agrees with the track; the agreeing ones are its surface: their flow
carries it on, and it counts as seen when they hold at least half of the bilinear weight.

Source: selection over gaps by accumulated error as in Neoral, Serych, Matas, "MFT", WACV 2024, here with the round
trip as the error; forward-backward check of Sundaram, Brox, Keutzer, ECCV 2010, section 4, made stricter where the
flow is good. Points are (x, y) in pixels of the flow, centres at integers.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Real

ReadFlow = Callable[[int, int], Float32[np.ndarray, "2 H W"]]
"""(t, gap) -> flow from frame t to frame t + gap in pixels; gap is signed."""

_FIT_RADIUS_PX = 24
_FIT_SIGMA_PX = 10.0
_EDGE_RADIUS_PX = 4
_ONSET_SIGMA_PX = 4.0
_FIT_CHUNK = 512
_FEWEST_PIXELS = 6
_RIDGE = 0.02
_FAR_PIXELS = 200
_FAR_WEIGHT = 1e-3
_LINK_COST_PX2 = 0.02**2


@dataclass(frozen=True)
class ChainedTracks:
    """Points in every frame, also where hidden, and whether they are seen there."""

    points_px: Float32[np.ndarray, "T N 2"]
    visible: Bool[np.ndarray, "T N"]


def chain_tracks(
    read_flow: ReadFlow,
    pairs: Collection[tuple[int, int]],
    num_frames: int,
    queries: Real[np.ndarray, "N 3"],
    height: int,
    width: int,
) -> ChainedTracks:
    """Follow points forwards and backwards in time through the flow of one clip.

    Args: read_flow, asked for at most once per pair and direction of time; pairs, the (t, gap) it can give; queries,
        (t, x, y): the frame a point is chosen in (fractions are cut off) and its place there.
    Raises: ValueError when a query lies outside of the clip, or neighbouring frames lack flow in either direction.
    """
    queries = np.asarray(queries, np.float64).reshape(-1, 3)
    _check_queries(queries, num_frames, height, width)
    check_pairs(pairs, num_frames)
    start = queries[:, 0].astype(np.int64)
    points = np.empty((num_frames, len(queries), 2), np.float32)
    visible = np.zeros((num_frames, len(queries)), bool)
    frames = np.arange(num_frames)[:, None]
    for step in (1, -1):
        walk = _Walk(read_flow, set(pairs), num_frames, start, queries[:, 1:], (height, width), step)
        walk.run()
        mine = (frames - start) * step >= 0
        points[mine], visible[mine] = walk.points[mine], walk.visible[mine]
    return ChainedTracks(points, visible)


def grid_queries(num_per_side: int, height: int, width: int, frames: Collection[int]) -> Float32[np.ndarray, "N 3"]:
    """(t, x, y) of the cell centres of a square grid over the picture, row by row, for each of the frames."""
    x = (np.arange(num_per_side) + 0.5) * width / num_per_side - 0.5
    y = (np.arange(num_per_side) + 0.5) * height / num_per_side - 0.5
    t, y, x = np.meshgrid(np.asarray(list(frames), np.float64), y, x, indexing="ij")
    return np.stack([t, x, y], axis=-1).reshape(-1, 3).astype(np.float32)


def check_pairs(pairs: Collection[tuple[int, int]], num_frames: int) -> None:
    """Raises: ValueError when neighbouring frames lack flow in either direction."""
    known = set(pairs)
    for t in range(num_frames - 1):
        for start, gap in ((t, 1), (t + 1, -1)):
            if (start, gap) not in known:
                raise ValueError(
                    f"no flow from frame {start} to {start + gap}: chaining needs gap 1 forward and backward for every "
                    "frame; teach with gaps=[1,...], both directions and stride=1"
                )


def _check_queries(queries: Real[np.ndarray, "N 3"], num_frames: int, height: int, width: int) -> None:
    t, x, y = queries.T
    inside = (x >= -0.5) & (y >= -0.5) & (x <= width - 0.5) & (y <= height - 0.5)
    bad = ~(inside & (t >= 0) & (t < num_frames))  # also where not finite
    if bad.any():
        place = tuple(queries[bad][0].tolist())
        raise ValueError(f"query (t, x, y) = {place} lies outside of {num_frames} frames of {width}x{height}")


@dataclass
class _Corners:
    """The four pixels around each point: flat indices and bilinear weights. Outside the frame: its border."""

    index: Int[np.ndarray, "N 4"]
    weight: Float[np.ndarray, "N 4"]

    @classmethod
    def around(cls, points: Float[np.ndarray, "N 2"], height: int, width: int) -> "_Corners":
        x = np.clip(points[:, 0], 0, width - 1)
        y = np.clip(points[:, 1], 0, height - 1)
        left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
        fx, fy = x - left, y - top
        index = np.stack([top * width + left, top * width + right, bottom * width + left, bottom * width + right], 1)
        weight = np.stack([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy], 1)
        return cls(index, weight)

    def flow(self, flow_px: Float32[np.ndarray, "2 H W"]) -> Float[np.ndarray, "N 4 2"]:
        """Flow at each of the pixels."""
        return flow_px.reshape(2, -1)[:, self.index].transpose(1, 2, 0).astype(np.float64)


@dataclass
class _Step:
    """One pair of frames (from, to): flow there, flow back, and the round trip that still counts as agreement."""

    there: Float32[np.ndarray, "2 H W"]
    back: Float32[np.ndarray, "2 H W"]
    noise_px: float

    def tolerance_px(self, length_px: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """Largest round trip of a point that moved so far: the published bound, or less where the flow is good."""
        published = np.sqrt(0.5 + 0.02 * length_px**2)
        return np.minimum(published, 0.15 + 4 * self.noise_px + 0.02 * length_px)


class _Walk:
    """All tracks in one direction of time, `step` = 1 or -1."""

    def __init__(
        self,
        read_flow: ReadFlow,
        pairs: set[tuple[int, int]],
        num_frames: int,
        start: Int[np.ndarray, "N"],
        start_xy: Float[np.ndarray, "N 2"],
        size: tuple[int, int],
        step: int,
    ):
        self.read_flow, self.pairs, self.step = read_flow, pairs, step
        self.num_frames, self.size = num_frames, size
        self.start = start
        num = len(start)
        rows = np.arange(num)
        self.points = np.zeros((num_frames, num, 2))
        self.points[start, rows] = start_xy
        self.visible = np.zeros((num_frames, num), bool)
        self.visible[start, rows] = True
        self.cost = np.zeros((num_frames, num))
        self.own = np.zeros((num_frames, num, 4), bool)  # which of the four pixels are the track's surface
        self.speed = np.zeros((num, 2))  # affine motion of hidden tracks per frame: speed + slope @ (x - centre)
        self.slope = np.zeros((num, 2, 2))
        self.last_back = np.zeros((2, *size), np.float32)  # flow of the frame before, back to the one before it
        self.gaps = sorted({gap * step for _, gap in pairs if gap * step > 0})

    def run(self) -> None:
        """Fill points and visible from every track's start to the end of the clip."""
        order = range(self.num_frames) if self.step > 0 else range(self.num_frames - 1, -1, -1)
        for t in list(order)[1:]:
            if ((t - self.start) * self.step > 0).any():
                self._advance(t)

    def _advance(self, t: int) -> None:
        steps = {gap: self._load(t, gap) for gap in self.gaps if self._has(t, gap)}
        previous = t - self.step
        self._own_at_start(previous, steps[1].there)
        active = (t - self.start) * self.step > 0
        best = np.full(len(active), np.inf)
        for gap, step in steps.items():
            source = t - gap * self.step
            rows = np.flatnonzero(active & ((source - self.start) * self.step >= 0) & self.visible[source])
            if not len(rows):
                continue
            here = self.points[source, rows]
            target = here + self._carried(source, rows, step.there)
            share, error, own = self._seen(target, here, step)
            cost = self.cost[source, rows] + error**2 + _LINK_COST_PX2
            good = (share >= 0.5) & (cost < best[rows])
            rows = rows[good]
            best[rows] = self.cost[t, rows] = cost[good]
            self.points[t, rows], self.own[t, rows], self.visible[t, rows] = target[good], own[good], True
        hidden = np.flatnonzero(active & ~self.visible[t])
        if len(hidden):
            self._advance_hidden(t, hidden, steps)
        self.last_back = steps[1].back

    def _has(self, t: int, gap: int) -> bool:
        source = t - gap * self.step
        return (source, gap * self.step) in self.pairs and (t, -gap * self.step) in self.pairs

    def _load(self, t: int, gap: int) -> _Step:
        there = self.read_flow(t - gap * self.step, gap * self.step)
        back = self.read_flow(t, -gap * self.step)
        return _Step(there, back, _round_trip_noise(there, back))

    def _own_at_start(self, t: int, there: Float32[np.ndarray, "2 H W"]) -> None:
        """A track begins on the surface of the pixel nearest to it."""
        rows = np.flatnonzero(self.start == t)
        corners = _Corners.around(self.points[t, rows], *self.size)
        flow = corners.flow(there)
        nearest = np.take_along_axis(flow, corners.weight.argmax(1)[:, None, None], 1)
        self.own[t, rows] = np.linalg.norm(flow - nearest, axis=2) < 0.25 + 0.02 * np.linalg.norm(nearest, axis=2)

    def _carried(self, t: int, rows: Int[np.ndarray, "M"], there: np.ndarray) -> Float[np.ndarray, "M 2"]:
        """Flow of the tracks' surface at their places in frame t."""
        points, own = self.points[t, rows], self.own[t, rows]
        corners = _Corners.around(points, *self.size)
        weight = corners.weight * own
        moved = (corners.flow(there) * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)
        edge = ~own.all(1)
        if edge.any():
            moved[edge] = self._carried_beside_edge(points[edge], moved[edge], there)
        return moved

    def _carried_beside_edge(
        self, points: Float[np.ndarray, "M 2"], rough: Float[np.ndarray, "M 2"], there: np.ndarray
    ) -> Float[np.ndarray, "M 2"]:
        """Flow of one side of a motion edge, extrapolated to points from that side's pixels, those that move alike."""
        around = _Around(points, self.size, _EDGE_RADIUS_PX, far=False)
        flow = around.flow(there)
        speed, slope = rough, np.zeros((len(points), 2, 2))
        tolerance = (0.25 + 0.02 * np.linalg.norm(rough, axis=1))[:, None]
        for sigma_px in (1.0, 2.0):
            differs = flow - _affine(speed, slope, around.away)
            member = (_length(differs) < tolerance) & around.inside
            change = _affine_fit(around.away, differs, member, sigma_px, far_weight=0.0)
            speed, slope = speed + change[0], slope + change[1]
        return speed

    def _seen(
        self, target: Float[np.ndarray, "M 2"], source: Float[np.ndarray, "M 2"], step: _Step, slack_px: float = 0.0
    ) -> tuple[Float[np.ndarray, "M"], Float[np.ndarray, "M"], Bool[np.ndarray, "M 4"]]:
        """Share of the bilinear weight whose flow back leads to `source` (0 outside), its error, and which pixels."""
        height, width = self.size
        corners = _Corners.around(target, height, width)
        ends = target[:, None] + corners.flow(step.back)
        error = np.linalg.norm(ends - source[:, None], axis=2)
        tolerance = step.tolerance_px(np.linalg.norm(target - source, axis=1)) + slack_px
        own = error < tolerance[:, None]
        weight = corners.weight * own
        share = weight.sum(1)
        mean_error = (error * weight).sum(1) / np.maximum(share, 1e-9)
        x, y = target.T
        inside = (x >= -0.5) & (y >= -0.5) & (x < width - 0.5) & (y < height - 0.5)
        return share * inside, mean_error, own

    def _advance_hidden(self, t: int, rows: Int[np.ndarray, "M"], steps: dict[int, _Step]) -> None:
        """Move hidden tracks with their surface's motion, and find again those that can be seen."""
        previous = t - self.step
        self._begin_hiding(previous, rows[self.visible[previous, rows]], steps[1])
        for part in _parts(rows):
            self._follow_surface(previous, part, steps[1])
        here = self.points[previous, rows]
        height, width = self.size
        # More than a frame outside nothing is known; bounded, so that a track never runs away.
        target = np.clip(here + self.speed[rows], [1 - width, 1 - height], [2 * (width - 1), 2 * (height - 1)])
        self.points[t, rows] = target
        share, error, own = self._seen(target, here, steps[1], slack_px=0.1)
        found = share >= 0.5
        for gap, step in steps.items():
            if gap == 1:
                continue
            source = t - gap * self.step
            known = (source - self.start[rows]) * self.step >= 0
            agree, _, _ = self._seen(target, self.points[source, rows], step, slack_px=0.1 * gap)
            found &= ~known | (agree >= 0.5)
        self.cost[t, rows] = self.cost[previous, rows] + np.where(found, error, 0.5) ** 2 + _LINK_COST_PX2
        self.visible[t, rows[found]], self.own[t, rows[found]] = True, own[found]

    def _begin_hiding(self, t: int, rows: Int[np.ndarray, "M"], step: _Step) -> None:
        """The affine motion into frame t of the surface of tracks last seen there."""
        moved = self.start[rows] != t
        self.slope[rows] = 0
        new, old = rows[~moved], rows[moved]
        self.speed[new] = self._carried(t, new, step.there)
        before = t - self.step
        for part in _parts(new):  # nothing is known of the time before: the motion that begins stands for it
            around = _Around(self.points[t, part], self.size)
            self._narrow(part, around, around.flow(step.there), step.noise_px)
        self.speed[old] = self.points[t, old] - self.points[before, old] if len(old) else 0
        for part in _parts(old):
            around = _Around(self.points[t, part], self.size)
            self._narrow(part, around, -around.flow(self.last_back), step.noise_px)

    def _narrow(self, rows: Int[np.ndarray, "M"], around: "_Around", motion: np.ndarray, noise_px: float) -> None:
        """Fit speed and slope to the motion of pixels that agree with them, first close by, then farther away."""
        for sigma_px in (_ONSET_SIGMA_PX, _FIT_SIGMA_PX):
            expected = self._expected(rows, around.away)
            agree = _length(motion - expected) < self._agreement_px(rows, noise_px)[:, None]
            self._fit(rows, around, motion - expected, agree, sigma_px)

    def _follow_surface(self, t: int, rows: Int[np.ndarray, "M"], step: _Step) -> None:
        """From the motion into frame t to the motion out of it.

        The surface is where the flow back agrees with the motion so far: no assumption on how it goes on.
        """
        around = _Around(self.points[t, rows], self.size)
        onward = around.flow(step.there)
        begins = (self.start[rows] == t)[:, None]
        came = np.where(begins[..., None], onward, -around.flow(self.last_back))
        tolerance = self._agreement_px(rows, step.noise_px)[:, None]
        member = _length(came - self._expected(rows, around.away)) < tolerance
        self._fit(rows, around, onward - self._expected(rows, around.away), member, _FIT_SIGMA_PX)
        for tighter in (1.0, 0.5):
            differs = onward - self._expected(rows, around.away)
            agree = member & (_length(differs) < tighter * tolerance)
            self._fit(rows, around, differs, agree, _FIT_SIGMA_PX)

    def _agreement_px(self, rows: Int[np.ndarray, "M"], noise_px: float) -> Float[np.ndarray, "M"]:
        return 0.3 + 4 * noise_px + 0.02 * np.linalg.norm(self.speed[rows], axis=1)

    def _expected(self, rows: Int[np.ndarray, "M"], away: Float[np.ndarray, "M K 2"]) -> Float[np.ndarray, "M K 2"]:
        """Motion of the surface at some distance from the track."""
        return _affine(self.speed[rows], self.slope[rows], away)

    def _fit(
        self,
        rows: Int[np.ndarray, "M"],
        around: "_Around",
        differs: Float[np.ndarray, "M K 2"],
        member: Bool[np.ndarray, "M K"],
        sigma_px: float,
    ) -> None:
        """Correct speed and slope by an affine fit to what members differ by."""
        speed, slope = _affine_fit(around.away, differs, member & around.inside, sigma_px, _FAR_WEIGHT)
        self.speed[rows] += speed
        self.slope[rows] += slope


def _affine(
    speed: Float[np.ndarray, "M 2"], slope: Float[np.ndarray, "M 2 2"], away: Float[np.ndarray, "M K 2"]
) -> Float[np.ndarray, "M K 2"]:
    return speed[:, None].astype(np.float32) + away @ slope.transpose(0, 2, 1).astype(np.float32)


def _length(vectors: Float[np.ndarray, "M K 2"]) -> Float[np.ndarray, "M K"]:
    return np.sqrt(vectors[..., 0] ** 2 + vectors[..., 1] ** 2)


def _affine_fit(
    away: Float[np.ndarray, "M K 2"],
    values: Float[np.ndarray, "M K 2"],
    member: Bool[np.ndarray, "M K"],
    sigma_px: float,
    far_weight: float,
) -> tuple[Float[np.ndarray, "M 2"], Float[np.ndarray, "M 2 2"]]:
    """Affine fit to the members' values: that at the middle, and the slope; both 0 where members are too few.

    Near pixels decide; with `far_weight` far ones matter too, where there are no near ones. The slope has a ridge.
    """
    distance2 = (away[..., 0] ** 2 + away[..., 1] ** 2) / sigma_px**2
    weight = (np.exp(-distance2 / 2) + far_weight / (1 + distance2) ** 2) * member
    weight /= np.maximum(weight.sum(1, keepdims=True), 1e-12)
    design = np.concatenate([np.ones_like(distance2)[..., None], away / sigma_px], axis=2)  # [M, K, 3]
    weighted = (design * weight[..., None]).transpose(0, 2, 1)
    solution = np.linalg.solve(
        weighted @ design + np.diag(np.array([1e-9, _RIDGE, _RIDGE], np.float32)), weighted @ values
    )  # [M, 3, 2]
    solution *= (member.sum(1) >= _FEWEST_PIXELS)[:, None, None]
    return solution[:, 0], solution[:, 1:].transpose(0, 2, 1) / sigma_px


class _Around:
    """Pixels around tracks: all that are close, fewer farther away, and (`far`) a thin grid over the whole picture."""

    def __init__(
        self, centre: Float[np.ndarray, "M 2"], size: tuple[int, int], radius_px: int = _FIT_RADIUS_PX, far: bool = True
    ):
        height, width = size
        pixels = np.rint(centre)[:, None] + _disc(radius_px)  # [M, K, 2]
        if far:
            grid = _thin_grid(height, width)
            pixels = np.concatenate([pixels, np.broadcast_to(grid, (len(centre), *grid.shape))], axis=1)
        x, y = pixels[..., 0], pixels[..., 1]
        self.inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
        self.away = (pixels - centre[:, None]).astype(np.float32)
        self._index = np.where(self.inside, y * width + x, 0).astype(np.int64)

    def flow(self, flow_px: Float32[np.ndarray, "2 H W"]) -> Float[np.ndarray, "M K 2"]:
        """Flow at each of the pixels."""
        return np.stack([part.ravel()[self._index] for part in flow_px], axis=-1)


def _parts(rows: Int[np.ndarray, "M"]) -> list[Int[np.ndarray, "m"]]:
    """Pieces that bound the memory of a fit."""
    return [rows[i : i + _FIT_CHUNK] for i in range(0, len(rows), _FIT_CHUNK)]


def _thin_grid(height: int, width: int) -> Float[np.ndarray, "K 2"]:
    stride = max(1, round((height * width / _FAR_PIXELS) ** 0.5))
    y, x = np.mgrid[stride // 2 : height : stride, stride // 2 : width : stride]
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float64)


@lru_cache
def _disc(radius: int) -> Float[np.ndarray, "K 2"]:
    """Offsets of all pixels within five pixels, and of every third one within a radius."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    kept = (x**2 + y**2 <= radius**2) & (((x % 3 == 0) & (y % 3 == 0)) | (x**2 + y**2 <= 25))
    return np.stack([x[kept], y[kept]], axis=1).astype(np.float64)


def _round_trip_noise(there: Float32[np.ndarray, "2 H W"], back: Float32[np.ndarray, "2 H W"]) -> float:
    """Median round trip, in pixels, over a sample of pixels: what the flow's own errors come to."""
    _, height, width = there.shape
    y, x = (part.ravel().astype(np.float64) for part in np.mgrid[0:height:4, 0:width:4])
    target = np.stack([x, y], 1) + there[:, ::4, ::4].reshape(2, -1).T
    inside = (target >= 0).all(1) & (target[:, 0] <= width - 1) & (target[:, 1] <= height - 1)
    if not inside.any():
        return 0.0
    corners = _Corners.around(target[inside], height, width)
    returned = target[inside] + (corners.flow(back) * corners.weight[..., None]).sum(1)
    return float(np.median(np.linalg.norm(returned - np.stack([x, y], 1)[inside], axis=1)))
