"""What the Flow Poke Transformer is shown: which tracks become pokes and queries, and how a frame becomes its image.

Two rules draw the queries. The published one slides a window over the shuffled tracks that shrinks as pokes are
revealed, so that late queries mostly ask for points already known (76 % of the last ones at 128 pokes of 300 tracks).
The unbiased one, the default, draws every group's queries evenly from all tracks (42 %).

Positions are (x, y) in 0..1 over the central square of a frame, which is all that the model sees; flow has that unit.

Source: Baumann et al., arXiv:2510.12777, and its published loader.

Shape legend: T frames, N tracks, L tracks that count, P pokes, n queries per poke.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

from kinema.models.flow.geometry import Points, points_px_to_norm, xy_like

Reason = Literal["clip shorter than the time gap", "too few visible tracks", "too few tracks with a usable end"]


class NoTrainingSample(ValueError):
    """A clip gives no sample under the rule; the message has the numbers, `reason` is fit for counting."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class SamplingRule:
    """How pokes and queries are drawn from the tracks of a clip."""

    num_pokes: int = 128
    """P, pokes per sample."""
    queries_per_poke: int = 15
    """n, queries predicted from each number of known pokes, 0 to P - 1."""
    min_num_tracks: int = 128
    """Fewest usable tracks; at least P + n are needed in any case."""
    unbiased: bool = True
    """Draw queries evenly; otherwise by the published rule."""
    allow_overlap: bool = True
    """Whether a query may ask for a point whose motion is already known."""
    allow_invisible_ends: bool = True
    """Whether tracks count that are hidden at the end."""
    allow_out_of_frame_ends: bool = True
    """Whether tracks count that have left the square at the end."""
    static_flow: float = 0.01
    """Tracks that move less stand still, in units of the square's side."""
    static_share: float = 0.4
    """The camera is called static when more than this share of the tracks stands still."""

    def __post_init__(self) -> None:
        if self.num_pokes < 1 or self.queries_per_poke < 1:
            raise ValueError(
                f"num_pokes={self.num_pokes}, queries_per_poke={self.queries_per_poke}: both must be at least 1"
            )

    @property
    def num_needed(self) -> int:
        """Usable tracks that a sample takes."""
        pokes, queries = self.num_pokes, self.queries_per_poke
        sliding_apart = not (self.unbiased or self.allow_overlap)
        return max(self.min_num_tracks, (2 * pokes - 1 if sliding_apart else pokes) + queries)


@dataclass(frozen=True)
class Motion:
    """The usable tracks between two frames, shuffled."""

    start: int
    """Frame that is shown."""
    end: int
    """Frame where the flow ends."""
    tracks: np.ndarray
    """[L] int64, indices of the tracks."""
    pos: Float[np.ndarray, "L 2"]
    """Positions in the shown frame."""
    flow: Float[np.ndarray, "L 2"]
    """Way from there to the end."""


@dataclass(frozen=True)
class TrainingPoints:
    """One training sample without its image."""

    poke_pos: Float[np.ndarray, "P 2"]
    poke_flow: Float[np.ndarray, "P 2"]
    query_pos: Float[np.ndarray, "P n 2"]
    query_flow: Float[np.ndarray, "P n 2"]
    camera_static: bool


def gap_in_frames(gap_s: float, fps: float) -> int:
    """The time gap in whole frames, at least one.

    Raises: ValueError unless both are positive.
    """
    if not (gap_s > 0 and fps > 0):
        raise ValueError(f"gap_s={gap_s}, fps={fps}: the time gap and the frame rate must be positive")
    return max(1, round(gap_s * fps))


def extract_motion(
    tracks: Float[np.ndarray, "T N 2"],
    visible: Bool[np.ndarray, "T N"],
    gap_frames: int,
    rule: SamplingRule,
    rng: np.random.Generator,
) -> Motion:
    """A start frame drawn evenly from those that give enough tracks, and the motion from there.

    Args:
        tracks: positions; visible: whether they are seen.
        gap_frames: frames from start to end.
    Raises: NoTrainingSample if there is no such frame.
    """
    num_frames = len(tracks)
    if num_frames <= gap_frames:
        raise NoTrainingSample(
            "clip shorter than the time gap", f"{num_frames} frames for a gap of {gap_frames}; use a smaller gap"
        )
    inside = _both((tracks >= 0) & (tracks <= 1))  # False for positions that are not finite
    seen = visible & inside
    usable = seen[:-gap_frames] & _usable_ends(tracks, visible, inside, rule)[gap_frames:]
    if rule.unbiased:
        counts, needed = usable.sum(1), rule.num_needed
    else:
        # The published rule looks at the start only, and gives the clip up if the frame it drew fails at the end.
        counts, needed = seen[:-gap_frames].sum(1), rule.min_num_tracks
    eligible = np.flatnonzero(counts >= needed)
    if len(eligible) == 0:
        too_few_seen = seen[:-gap_frames].sum(1).max() < needed
        raise NoTrainingSample(
            "too few visible tracks" if too_few_seen else "too few tracks with a usable end",
            f"at most {counts.max()} of {tracks.shape[1]} at any start, {needed} are needed",
        )
    start = int(eligible[rng.integers(0, len(eligible))])
    index = np.flatnonzero(usable[start])
    if len(index) < rule.num_needed:
        raise NoTrainingSample(
            "too few tracks with a usable end", f"{len(index)} from frame {start}, {rule.num_needed} are needed"
        )
    index = index[rng.permutation(len(index))]
    end = start + gap_frames
    pos = tracks[start].take(index, axis=0)
    return Motion(start, end, index, pos, tracks[end].take(index, axis=0) - pos)


def build_targets(motion: Motion, rule: SamplingRule, rng: np.random.Generator) -> TrainingPoints:
    """Pokes and queries from a motion: the first P tracks are the pokes, in order of being revealed."""
    num_tracks = len(motion.pos)
    if num_tracks < rule.num_needed:
        raise NoTrainingSample("too few visible tracks", f"{num_tracks}, {rule.num_needed} are needed")
    draw = unbiased_queries if rule.unbiased else published_queries
    queries = draw(num_tracks, rule, rng)
    return TrainingPoints(
        motion.pos[: rule.num_pokes],
        motion.flow[: rule.num_pokes],
        motion.pos.take(queries, axis=0),  # a tenth of the time of motion.pos[queries]
        motion.flow.take(queries, axis=0),
        camera_static(motion.flow, rule),
    )


def camera_static(flow: Float[np.ndarray, "L 2"], rule: SamplingRule) -> bool:
    """Whether so many tracks stand still that the camera does."""
    still = np.sqrt(flow[:, 0] ** 2 + flow[:, 1] ** 2) < rule.static_flow
    return bool(np.count_nonzero(still) / len(still) > rule.static_share)


def unbiased_queries(num_tracks: int, rule: SamplingRule, rng: np.random.Generator) -> np.ndarray:
    """Indices [P, n] into the shuffled tracks: every group's are distinct and drawn evenly.

    Without overlap, group g draws from the tracks that are not among its g known pokes.
    """
    num, length = rule.num_pokes, rule.queries_per_poke
    first = np.zeros(num, np.int64) if rule.allow_overlap else np.arange(num)
    if length**2 > num_tracks - first[-1]:
        ranks = rng.random((num, num_tracks))
        ranks[np.arange(num_tracks) < first[:, None]] = np.inf
        return np.argpartition(ranks, length - 1, axis=1)[:, :length]
    # With many tracks hardly a group of free draws holds one twice: those are drawn anew as a whole, which is even.
    room = (num_tracks - first)[:, None]
    queries = (rng.random((num, length)) * room).astype(np.int64) + first[:, None]
    again = np.flatnonzero(_holds_one_twice(queries))
    while len(again):
        drawn = (rng.random((len(again), length)) * room[again]).astype(np.int64) + first[again][:, None]
        queries[again] = drawn
        again = again[_holds_one_twice(drawn)]
    return queries


def _holds_one_twice(queries: Int64[np.ndarray, "P n"]) -> Bool[np.ndarray, "P"]:
    ordered = np.sort(queries, axis=1)
    return (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)


def published_queries(num_tracks: int, rule: SamplingRule, rng: np.random.Generator) -> np.ndarray:
    """Indices [P, n] into the shuffled tracks: for group g, n consecutive ones from a drawn offset on."""
    length = rule.queries_per_poke
    offsets = [
        rng.integers(0 if rule.allow_overlap else group, num_tracks - group - length) for group in range(rule.num_pokes)
    ]
    return np.asarray(offsets)[:, None] + np.arange(length)


def central_square(height: int, width: int) -> tuple[int, int, int]:
    """Top, left and side of the square that the model sees of a frame."""
    side = min(height, width)
    # Python rounds halves to even, as the published crop does.
    return round((height - side) / 2), round((width - side) / 2), side


def points_in_square(points_px: Points, height: int, width: int) -> Points:
    """Pixel positions in a frame (centres at integers) to 0..1 over its central square; beyond it outside 0..1.

    Of a tensor or an array, to which it gives the same numbers.
    """
    top, left, side = central_square(height, width)
    return points_px_to_norm(points_px - xy_like(points_px, left, top), side, side)


def square_image(image: Float[Tensor, "B 3 H W"], size: int = 512) -> Float32[Tensor, "B 3 size size"]:
    """The central square of images in 0..1, resized bicubically with antialiasing and mapped to -1..1."""
    top, left, side = central_square(*image.shape[-2:])
    square = image[..., top : top + side, left : left + side].float()
    resized = F.interpolate(square, (size, size), mode="bicubic", antialias=True)
    return (resized * 2 - 1).clamp(-1, 1)  # cubic overshoot


def frame_to_image(frame: UInt8[np.ndarray, "H W 3"], size: int = 512) -> Float32[Tensor, "3 size size"]:
    """A decoded frame as the model's input."""
    return square_image(torch.from_numpy(frame).permute(2, 0, 1)[None] / 255, size)[0]


def _both(xy: Bool[np.ndarray, "T N 2"]) -> Bool[np.ndarray, "T N"]:
    """`all` over the last axis, a third of its time."""
    return xy[..., 0] & xy[..., 1]


def _usable_ends(tracks: np.ndarray, visible: np.ndarray, inside: np.ndarray, rule: SamplingRule) -> np.ndarray:
    """[T, N]: where a track may end."""
    usable = _both(np.isfinite(tracks))
    if not rule.allow_invisible_ends:
        usable &= visible
    if not rule.allow_out_of_frame_ends:
        usable &= inside
    return usable
