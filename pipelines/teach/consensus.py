"""`teacher=consensus`: several teachers' stored flow of a clip, and at each pixel the best supported of it.

Estimates of a pair are each member's own flow and, over gaps above 1, its shorter gaps one after another where it
stores them: direct flow over a long gap and chained flow fail in different places. The rule: models/flow/consensus.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinema.models.flow.consensus import consensus
from kinema.models.flow.geometry import resize_flow, warp
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.sidecars.flow_codec import FlowBlob
from kinema.pipelines.sidecars.sidecar import fullest_flow, open_input
from kinema.pipelines.teach.protocol import FlowEstimate, Pairing, Teacher
from kinema.pipelines.teach.teachers import TeacherSpec, to_image
from kinema.pipelines.video.errors import Missing


@dataclass(frozen=True)
class _Seen:
    """A frame of the clip: its number and its picture at the size of the flow."""

    index: int
    image: Float[Tensor, "3 h w"]


class ConsensusTeacher:
    """Judges clips one at a time: `of_clip` gives the teacher of one."""

    def __init__(self, spec: TeacherSpec):
        self.spec = spec

    def of_clip(self, members: Sequence[FlowBlob]) -> Teacher:
        """The teacher of a clip, whose frames must come in order, each once."""
        return _ClipConsensus(members)


class _ClipConsensus:
    def __init__(self, members: Sequence[FlowBlob]):
        self.members = members
        self.stored = [frozenset(member.pairs) for member in members]
        self.size = members[0].header.height, members[0].header.width
        self.num_frames = 0

    def features(self, frame: UInt8[np.ndarray, "H W 3"]) -> _Seen:
        """The frame, numbered."""
        self.num_frames += 1
        return _Seen(self.num_frames - 1, to_image(frame, self.size, "cpu")[0])

    def flow(self, pairs: Sequence[tuple[_Seen, _Seen]]) -> FlowEstimate:
        """Each pair's best supported flow, and what speaks against it. Raises: Missing for a pair no member has."""
        flows, errors = [], []
        for first, second in pairs:
            t, gap = first.index, second.index - first.index
            there, back = [], []
            for forward, backward in self._estimates(t, gap):
                there.append(forward)
                back.append(backward)
            if not there:
                raise Missing(f"no member holds flow between frames {t} and {t + gap} in both directions")
            found = consensus(first.image, second.image, there, back)
            flows.append(found.flow_px)
            errors.append(found.expected_error_px)
        return FlowEstimate(torch.stack(flows), torch.stack(errors))

    def _estimates(self, t: int, gap: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(there, back) of every estimate."""
        for number, stored in enumerate(self.stored):
            if {(t, gap), (t + gap, -gap)} <= stored:
                yield self._flow(number, t, gap), self._flow(number, t + gap, -gap)
            there, back = self._chained(number, t, gap), self._chained(number, t + gap, -gap)
            if there is not None and back is not None:
                yield there, back

    def _chained(self, number: int, t: int, gap: int) -> Tensor | None:
        """Stored flow over shorter gaps, as long ones as there are, one after another; None where some is missing."""
        sign, done = (1 if gap > 0 else -1), 0
        whole: Tensor | None = None
        while done != gap:
            steps = [step for _, step in self.stored[number] if step * sign > 0 and abs(step) <= abs(gap - done)]
            fitting = {step for step in steps if step != gap and (t + done, step) in self.stored[number]}
            if not fitting:
                return None
            step = max(fitting, key=abs)
            part = self._flow(number, t + done, step)
            whole = part if whole is None else whole + warp(part[None], whole[None])[0][0]
            done += step
        return whole

    def _flow(self, number: int, t: int, gap: int) -> Float[Tensor, "2 h w"]:
        flow = torch.from_numpy(self.members[number].flow(t, gap))
        return flow if flow.shape[1:] == self.size else resize_flow(flow, *self.size)


def open_members(urls: Sequence[str], clips: Artifact, pairing: Pairing) -> dict[str, Artifact]:
    """The judged flow artifacts by the names under which commits tell their hashes.

    Raises: ValueError for fewer than two, for flow of other clips, or for flow that lacks a direction.
    """
    if len(urls) < 2:
        raise ValueError(f"from={list(urls)}: a consensus needs two or more flow artifacts: from=[flow/a,flow/b]")
    found = {f"from_{number}": open_input(url, "flow", setting="from") for number, url in enumerate(urls)}
    for url, flow in zip(urls, found.values(), strict=True):
        if flow.manifest["inputs"].get("clips") != clips.plan8:
            raise ValueError(f"from: {url} was made from other clips than {clips.url}; teach it on these")
        gaps = {gap for _, gap in fullest_flow(flow).pairs}
        lacking = [gap for gap in pairing.gaps if not {gap, -gap} <= gaps]
        if lacking:
            raise ValueError(
                f"from: {url} holds flow over {sorted(gaps)} frames; a consensus needs gap {lacking[0]} in both "
                "directions: teach it with such gaps and directions, or leave the gap out"
            )
    return found
