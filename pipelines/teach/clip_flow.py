"""Flow of one clip as a stream: frames come one by one, pairs go out as soon as both of their frames are known.

At most max(gaps) + 1 frames and one batch of pairs are held, however long the clip is.

What can be said about each pair (`quality.PairQuality`) is collected on the way, while pictures and flow are at hand.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from kinema.models.flow.geometry import RoundTrip, round_trip
from kinema.pipelines.sidecars.flow_codec import FlowPair
from kinema.pipelines.sidecars.sidecar import BadResult
from kinema.pipelines.teach.protocol import ClipTeacher, FlowEstimate, Pairing, Teacher
from kinema.pipelines.teach.quality import PairQuality, pair_quality

OtherFlow = Callable[[int, int], Float32[np.ndarray, "2 H W"] | None]
"""Another teacher's flow of a pair (t, gap) at the same size; None for a pair it did not store."""

ABSURD_DIAGONALS = 2.0


class BadFlow(BadResult):
    """The teacher's flow is not finite, or longer than the picture allows; the clip is quarantined."""


@dataclass(frozen=True)
class _Frame:
    """A frame in the window: what the teacher and the quality signals need of it."""

    features: Any
    picture: UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class _Unit:
    """Two frames whose flow is computed in every direction asked for."""

    start: int
    gap: int
    early: _Frame
    late: _Frame


def clip_flow(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    teacher: Teacher,
    pairing: Pairing,
    qualities: list[PairQuality] | None = None,
    other: OtherFlow | None = None,
) -> Iterator[FlowPair]:
    """Flow pairs of a clip, in an order that depends on the pairing alone.

    Args: qualities, a list to which the signals of every pair are appended; other, flow to compare with.
    Raises: BadFlow for values that are not finite or longer than twice the diagonal.
    """
    if isinstance(teacher, ClipTeacher):
        yield from _clip_estimates(frames, teacher, pairing, qualities, other)
        return
    window: deque[_Frame] = deque(maxlen=max(pairing.gaps) + 1)
    waiting: list[_Unit] = []
    per_unit = pairing.forward + pairing.backward
    units_per_batch = max(1, pairing.batch_pairs // per_unit)
    for index, picture in enumerate(frames):
        window.append(_Frame(teacher.features(picture), picture))
        for gap in pairing.gaps:
            start = index - gap
            if start >= 0 and start % pairing.stride == 0:
                waiting.append(_Unit(start, gap, window[-1 - gap], window[-1]))
        while len(waiting) >= units_per_batch:
            yield from _unit_flows(waiting[:units_per_batch], teacher, pairing, qualities, other)
            del waiting[:units_per_batch]
    if waiting:
        yield from _unit_flows(waiting, teacher, pairing, qualities, other)


def _clip_estimates(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    teacher: ClipTeacher,
    pairing: Pairing,
    qualities: list[PairQuality] | None,
    other: OtherFlow | None,
) -> Iterator[FlowPair]:
    """Pairs of a teacher that looks at whole clips; what is hidden is what it says."""
    for t, gap, flow, hidden, pictures in teacher.estimates(frames, pairing):
        _check(flow, t, gap)
        if qualities is not None:
            first, second = (_grey(picture, flow[None]) for picture in pictures)
            compared = None if other is None else other(t, gap)
            known = None if compared is None else torch.from_numpy(compared).to(flow)
            qualities.append(pair_quality(t, gap, first, second, flow, hidden=hidden, other_px=known))
        yield FlowPair(t, gap, flow.cpu().numpy(), hidden.cpu().numpy() if pairing.occlusion else None)


def _unit_flows(
    units: Sequence[_Unit],
    teacher: Teacher,
    pairing: Pairing,
    qualities: list[PairQuality] | None,
    other: OtherFlow | None,
) -> Iterator[FlowPair]:
    """The directions of some units, in network calls of at most `batch_pairs`."""
    directed = []
    for unit in units:
        directed += [(unit.early.features, unit.late.features)] if pairing.forward else []
        directed += [(unit.late.features, unit.early.features)] if pairing.backward else []
    estimate = _in_batches(directed, teacher, pairing.batch_pairs)
    per_unit = pairing.forward + pairing.backward
    for number, unit in enumerate(units):
        rows = slice(number * per_unit, (number + 1) * per_unit)
        flows = estimate.flow_px[rows]
        uncertain = [None] * per_unit if estimate.uncertainty_px is None else list(estimate.uncertainty_px[rows])
        ends = [(unit.start, unit.gap)] if pairing.forward else []
        ends += [(unit.start + unit.gap, -unit.gap)] if pairing.backward else []
        for (t, signed_gap), flow in zip(ends, flows, strict=True):
            _check(flow, t, signed_gap)
        hidden: list[np.ndarray | None] = [None] * per_unit
        trip = round_trip(flows, flows.flip(0)) if per_unit == 2 else None
        if trip is not None and pairing.occlusion:
            hidden = list(trip.occluded().cpu().numpy())
        if qualities is not None:
            qualities += _qualities(unit, ends, flows, trip, uncertain, other)
        for (t, gap), flow, covered, sigma in zip(ends, flows, hidden, uncertain, strict=True):
            yield FlowPair(t, gap, flow.cpu().numpy(), covered, None if sigma is None else sigma.cpu().numpy())


def _in_batches(directed: list[tuple[Any, Any]], teacher: Teacher, batch_pairs: int) -> FlowEstimate:
    step = max(1, batch_pairs)
    parts = [teacher.flow(directed[i : i + step]) for i in range(0, len(directed), step)]
    uncertain = [part.uncertainty_px for part in parts if part.uncertainty_px is not None]
    return FlowEstimate(torch.cat([part.flow_px for part in parts]), torch.cat(uncertain) if uncertain else None)


def _qualities(
    unit: _Unit,
    ends: Sequence[tuple[int, int]],
    flows: Float[Tensor, "D 2 H W"],
    trip: RoundTrip | None,
    uncertain: Sequence[Tensor | None],
    other: OtherFlow | None,
) -> Iterator[PairQuality]:
    """Signals of the directions of one unit."""
    early, late = (_grey(frame.picture, flows) for frame in (unit.early, unit.late))
    for number, (t, gap) in enumerate(ends):
        first, second = (early, late) if gap > 0 else (late, early)
        compared = None if other is None else other(t, gap)
        yield pair_quality(
            *(t, gap, first, second, flows[number]),
            trip=None if trip is None else RoundTrip(*(part[number : number + 1] for part in trip)),
            uncertainty_px=uncertain[number],
            other_px=None if compared is None else torch.from_numpy(compared).to(flows),
        )


def _grey(picture: UInt8[np.ndarray, "H W 3"], flows: Float[Tensor, "D 2 h w"]) -> Float[Tensor, "1 h w"]:
    """The picture as grey values in 0..1, at the size of the flow."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    height, width = flows.shape[-2:]
    if grey.shape != (height, width):
        grey = cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(grey)[None].to(flows) / 255


def _check(flow_px: Float[torch.Tensor, "2 H W"], t: int, gap: int) -> None:
    lengths = flow_px.square().sum(0).sqrt()
    bad = int((~torch.isfinite(lengths)).sum())
    if bad:
        raise BadFlow(f"flow of frame {t} to {t + gap} has {bad} pixels that are not finite")
    limit_px = ABSURD_DIAGONALS * math.hypot(*flow_px.shape[-2:])
    longest_px = float(lengths.max())
    if longest_px > limit_px:
        raise BadFlow(
            f"flow of frame {t} to {t + gap} reaches {longest_px:.0f} px, more than {limit_px:.0f} px "
            "(twice the picture's diagonal)"
        )
