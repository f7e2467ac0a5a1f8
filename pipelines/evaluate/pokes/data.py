"""Samples of the `pokes` benchmark from clips with stored tracks.

Queries and pokes are tracks seen at both ends of the time gap, drawn at random: where an end is hidden, its place is
the tracker's guess and not something to measure against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from kinema.models.fpt.data_rules import (
    Motion,
    NoTrainingSample,
    SamplingRule,
    camera_static,
    extract_motion,
    frame_to_image,
    gap_in_frames,
    points_in_square,
)
from kinema.pipelines.evaluate.pokes.scores import PokeSample, stable_seed
from kinema.pipelines.loader import Clip, ClipIndex, DamagedClip
from kinema.pipelines.progress import Progress
from kinema.pipelines.report.sections import spread


@dataclass(frozen=True)
class DrawnMotion:
    """The tracks of one sample; its frame is decoded when it is needed."""

    clip: int
    """Number in the index."""
    draw: int
    """Which of the clip's samples."""
    start: int
    """Frame that is shown."""
    end: int
    """Frame where the motion ends."""
    pos: Float[np.ndarray, "L 2"]
    """Tracks in units of the square, in random order, no more than are needed."""
    flow: Float[np.ndarray, "L 2"]
    """Their motion."""
    camera_static: bool
    """Whether most of all tracks stand still."""


class TrackSamples:
    """Samples of an index of clips with tracks, the same for the same arguments; images are read on iteration.

    Args: counts, numbers of pokes wanted; num_queries, draws_per_clip, max_clips, seed, as in `PokesConfig`; gap_s,
        seconds; image_px, side of the images.
    Attributes: `counts`, those that at least half of the samples have tracks for; all samples kept have enough for
        each. `left_out`, clips and samples that are not evaluated, by reason.
    Raises: ValueError with the reasons counted when no clip gives a sample.
    """

    def __init__(
        self,
        index: ClipIndex,
        counts: tuple[int, ...],
        *,
        num_queries: int,
        gap_s: float,
        image_px: int = 512,
        draws_per_clip: int = 1,
        max_clips: int = 0,
        seed: int = 0,
        rule: SamplingRule | None = None,
    ):
        self.index, self.num_queries, self.image_px, self.seed = index, num_queries, image_px, seed
        self.rule = rule or SamplingRule()
        self.left_out: dict[str, int] = {}
        wanted = spread(len(index), max_clips or len(index))
        progress = Progress("tracks", len(wanted), "clips")
        drawn: list[DrawnMotion] = []
        for done, number in enumerate(wanted, 1):
            drawn += self._draw(number, counts, gap_s, draws_per_clip)
            progress.update(done)
        progress.close()
        if not drawn:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
            raise ValueError(
                f"no clip gives {num_queries} queries and a poke {gap_s} s apart ({reasons}); use a smaller "
                "pokes.num_queries or pokes.gap_s, or track with a larger grid"
            )
        room = np.array([len(one.pos) for one in drawn]) - num_queries
        self.counts = tuple(count for count in counts if 2 * (room >= count).sum() >= len(drawn))
        short = int((room < self.counts[-1]).sum())
        if short:
            self._leave_out("too few tracks for the largest number of pokes", short)
        self.drawn = [one for one, space in zip(drawn, room, strict=True) if space >= self.counts[-1]]

    def __len__(self) -> int:
        return len(self.drawn)

    def __iter__(self) -> Iterator[PokeSample]:
        for one in self.drawn:
            clip = self.index.clip(one.clip)
            try:
                frame = clip.frames([one.start])[0]
            except DamagedClip:
                self._leave_out("damaged clip", 1)
                continue
            queries, pokes = slice(self.num_queries), slice(self.num_queries, self.num_queries + self.counts[-1])
            pos, flow = (torch.from_numpy(x) for x in (one.pos, one.flow))
            yield PokeSample(
                f"{clip.key}/{one.draw}",
                frame_to_image(frame, self.image_px),
                pos[pokes],
                flow[pokes],
                pos[queries],
                flow[queries],
                one.camera_static,
            )

    def _draw(self, number: int, counts: tuple[int, ...], gap_s: float, draws: int) -> list[DrawnMotion]:
        """Motions of a clip, from start frames with room for as many pokes as its tracks allow."""
        clip = self.index.clip(number)
        try:
            pos, visible = _tracks_in_square(clip)
            gap = gap_in_frames(gap_s, clip.fps)
            motions = [self._motion(clip, draw, pos, visible, gap, counts) for draw in range(draws)]
            return [self._kept(number, draw, motion, counts[-1]) for draw, motion in enumerate(motions)]
        except DamagedClip:
            self._leave_out("damaged clip", 1)
        except NoTrainingSample as error:
            self._leave_out(error.reason, 1)
        return []

    def _kept(self, number: int, draw: int, motion: Motion, num_pokes: int) -> DrawnMotion:
        """What is needed of a motion: thousands of clips are held at a time."""
        needed = slice(self.num_queries + num_pokes)
        pos, flow = (points[needed].astype(np.float32) for points in (motion.pos, motion.flow))
        return DrawnMotion(number, draw, motion.start, motion.end, pos, flow, camera_static(motion.flow, self.rule))

    def _motion(
        self, clip: Clip, draw: int, pos: np.ndarray, visible: np.ndarray, gap: int, counts: tuple[int, ...]
    ) -> Motion:
        smallest = next(count for count in counts if count)
        for count in (c for c in reversed(counts) if c):
            rule = SamplingRule(
                num_pokes=1, queries_per_poke=1, min_num_tracks=self.num_queries + count, allow_invisible_ends=False
            )
            rng = np.random.default_rng(stable_seed(self.seed, clip.key, draw))
            try:
                return extract_motion(pos, visible, gap, rule, rng)
            except NoTrainingSample:
                if count == smallest:
                    raise
        raise AssertionError("counts hold a number above 0")

    def _leave_out(self, reason: str, count: int) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + count


def _tracks_in_square(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """Positions [T, N, 2] in units of the central square, and visibility [T, N]."""
    tracks = clip.tracks()
    return points_in_square(tracks.points_px, *tracks.size), tracks.visible
