"""AllTracker as a teacher: one pass from a frame gives its flow over every gap, with what is hidden.

Each frame is encoded once per clip. A pass holds one window of the network; besides, the features of max(gaps) + 1
frames are held, however long the clip is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kinema.configs.models.table import MODELS
from kinema.models.tracks.alltracker.network import AllTracker, FrameMaps
from kinema.models.tracks.alltracker.predictor import VISIBLE_ABOVE
from kinema.pipelines.precision import autocast
from kinema.pipelines.teach.protocol import ClipEstimate, FlowEstimate, Pairing
from kinema.pipelines.teach.teachers import TeacherSpec, to_image


@dataclass(frozen=True)
class _Frame:
    index: int
    encoded: FrameMaps
    picture: UInt8[np.ndarray, "H W 3"]


class DenseTracksTeacher:
    """AllTracker, full or tiny. See `protocol.ClipTeacher`; pairs without the frames between them work too."""

    def __init__(self, spec: TeacherSpec):
        self.spec = spec
        self.network: AllTracker = MODELS[spec.name].make(weights=spec.weights).to(spec.device).eval()

    @torch.inference_mode()
    def features(self, frame: UInt8[np.ndarray, "H W 3"]) -> FrameMaps:
        """The encoded frame."""
        image = 255 * to_image(frame, self.spec.flow_size(*frame.shape[:2]), self.spec.device)
        with autocast(self.spec.precision, self.spec.device):
            return self.network.encode(image[None])

    @torch.inference_mode()
    def flow(self, pairs: Sequence[tuple[FrameMaps, FrameMaps]]) -> FlowEstimate:
        """Each pair as a clip of two frames."""
        with autocast(self.spec.precision, self.spec.device):
            return FlowEstimate(torch.stack([self._pair(FrameMaps.join(pair)).float() for pair in pairs]))

    def estimates(self, frames: Iterable[UInt8[np.ndarray, "H W 3"]], pairing: Pairing) -> Iterator[ClipEstimate]:
        """For each frame of the clip, one pass to later frames and one to earlier ones."""
        longest = max(pairing.gaps)
        window: deque[_Frame] = deque(maxlen=longest + 1)
        for index, picture in enumerate(frames):
            window.append(_Frame(index, self.features(picture), picture))
            if pairing.forward and len(window) > longest:
                yield from self._pass(list(window), pairing, 1)
            if pairing.backward:
                yield from self._pass(list(window)[::-1], pairing, -1)
        if pairing.forward:
            late = list(window)
            for start in range(1 if len(late) > longest else 0, len(late)):
                yield from self._pass(late[start:], pairing, 1)

    @torch.inference_mode()
    def _pass(self, clip: list[_Frame], pairing: Pairing, sign: int) -> Iterator[ClipEstimate]:
        """The pairs that begin in the first of these frames; `sign` is the direction in which they go."""
        anchor = clip[0]
        gaps = [
            gap
            for gap in pairing.gaps
            if gap < len(clip) and min(anchor.index, anchor.index + sign * gap) % pairing.stride == 0
        ]
        if not gaps:
            return
        with autocast(self.spec.precision, self.spec.device):
            encoded = FrameMaps.join([frame.encoded for frame in clip[: max(gaps) + 1]])
            parts = self.network.stream_encoded(
                lambda start, end: encoded[start:end], max(gaps) + 1, self.spec.iters or None, overwrite=True
            )
            for start, (flow, visconf) in parts:
                for gap in gaps:
                    if start <= gap < start + flow.shape[1]:
                        seen = visconf[0, gap - start].float().prod(dim=0) > VISIBLE_ABOVE
                        pictures = (anchor.picture, clip[gap].picture)
                        yield ClipEstimate(anchor.index, sign * gap, flow[0, gap - start].float(), ~seen, pictures)

    def _pair(self, encoded: FrameMaps) -> Float[Tensor, "2 h w"]:
        """Flow between two frames."""
        (part,) = self.network.stream_encoded(lambda start, end: encoded[start:end], 2, self.spec.iters or None)
        return part.tracks.flow[0, 1]
