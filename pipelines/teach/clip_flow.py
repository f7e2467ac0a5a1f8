"""Flow of one clip as a stream: frames come one by one, pairs go out as soon as both of their frames are known.

At most max(gaps) + 1 frames and one batch of pairs are held, however long the clip is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from kinema.models.flow_geometry import occlusion
from kinema.pipelines.flow_codec import FlowPair
from kinema.pipelines.sidecar import BadResult
from kinema.pipelines.teach.teachers import Teacher

ABSURD_DIAGONALS = 2.0


class BadFlow(BadResult):
    """The teacher's flow is not finite, or longer than the picture allows; the clip is quarantined."""


@dataclass(frozen=True)
class Pairing:
    """Which pairs of frames are computed. `gaps` ascending; `stride` counts the earlier frame of a pair."""

    gaps: tuple[int, ...]
    forward: bool = True
    backward: bool = True
    stride: int = 1
    occlusion: bool = True
    batch_pairs: int = 4

    @property
    def stores_occlusion(self) -> bool:
        """Occlusion needs both directions."""
        return self.occlusion and self.forward and self.backward

    def num_pairs(self, num_frames: int) -> int:
        """Directed pairs of a clip with so many frames."""
        starts = sum(len(range(0, num_frames - gap, self.stride)) for gap in self.gaps)
        return starts * (self.forward + self.backward)


def clip_flow(frames: Iterable[UInt8[np.ndarray, "H W 3"]], teacher: Teacher, pairing: Pairing) -> Iterator[FlowPair]:
    """Flow pairs of a clip, in an order that depends on the pairing alone.

    Raises: BadFlow for values that are not finite or longer than twice the diagonal.
    """
    window: deque[Any] = deque(maxlen=max(pairing.gaps) + 1)
    waiting: list[tuple[int, int, Any, Any]] = []
    per_unit = pairing.forward + pairing.backward
    units_per_batch = max(1, pairing.batch_pairs // per_unit)
    for index, frame in enumerate(frames):
        window.append(teacher.features(frame))
        for gap in pairing.gaps:
            start = index - gap
            if start >= 0 and start % pairing.stride == 0:
                waiting.append((start, gap, window[-1 - gap], window[-1]))
        while len(waiting) >= units_per_batch:
            yield from _unit_flows(waiting[:units_per_batch], teacher, pairing)
            del waiting[:units_per_batch]
    if waiting:
        yield from _unit_flows(waiting, teacher, pairing)


def _unit_flows(units: Sequence[tuple[int, int, Any, Any]], teacher: Teacher, pairing: Pairing) -> Iterator[FlowPair]:
    """Both directions of some (start, gap) in network calls of at most `batch_pairs`."""
    directed = []
    for _, _, early, late in units:
        directed += [(early, late)] if pairing.forward else []
        directed += [(late, early)] if pairing.backward else []
    step = max(1, pairing.batch_pairs)
    flow = torch.cat([teacher.flow(directed[i : i + step]) for i in range(0, len(directed), step)])
    per_unit = pairing.forward + pairing.backward
    for number, (start, gap, _, _) in enumerate(units):
        flows = flow[number * per_unit : (number + 1) * per_unit]
        ends = [(start, gap)] if pairing.forward else []
        ends += [(start + gap, -gap)] if pairing.backward else []
        for (t, signed_gap), one in zip(ends, flows, strict=True):
            _check(one, t, signed_gap)
        hidden: list[np.ndarray | None] = [None] * per_unit
        if pairing.stores_occlusion:
            hidden = list(occlusion(flows, flows.flip(0)).cpu().numpy())
        for (t, signed_gap), one, covered in zip(ends, flows, hidden, strict=True):
            yield FlowPair(t, signed_gap, one.cpu().numpy(), covered)


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


class FlowStatistics:
    """Counts over the pairs that pass through."""

    def __init__(self) -> None:
        self.num_pairs = 0
        self.length_px = 0.0
        self.hidden_share = 0.0
        self.num_hidden = 0

    def watch(self, pairs: Iterable[FlowPair]) -> Iterator[FlowPair]:
        """The same pairs, counted."""
        for pair in pairs:
            self.num_pairs += 1
            self.length_px += float(np.sqrt(np.square(pair.flow_px).sum(0)).mean(dtype=np.float64))
            if pair.occlusion is not None:
                self.num_hidden += 1
                self.hidden_share += float(pair.occlusion.mean(dtype=np.float64))
            yield pair

    @property
    def mean_flow_px(self) -> float | None:
        """Mean length over pixels and pairs; None without pairs."""
        return self.length_px / self.num_pairs if self.num_pairs else None

    @property
    def occluded_share(self) -> float | None:
        """Mean share of hidden pixels; None where no occlusion was computed."""
        return self.hidden_share / self.num_hidden if self.num_hidden else None
