"""Motion score of a clip: mean displacement per frame as a share of the frame's diagonal.

0.01 means that the picture moves by one hundredth of its diagonal from one frame to the next, on average over pixels
and frames. `vectors` takes the displacement from H.264 motion vectors. They come from our own encode of small frames
with fixed settings (one reference, no B frames), not from the source's: VP8, VP9, HEVC and AV1 decoders export none,
and the vectors of other people's encoders are not comparable. `flow` takes it from DIS optical flow.

Three frames of every seven are looked at. Films repeat frames every second, third or fifth time, and seven has no
factor with these: a sample takes part in all phases of such a rhythm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import cv2
import numpy as np
from av.video.frame import PictureType
from jaxtyping import UInt8

from kinema.pipelines.video.side_data import side_data

WINDOW, _PERIOD = 3, 7  # frames looked at, out of
_BLOCK = 16  # macroblock: sizes are cropped to multiples so that no vector describes padding
_LONGEST = 16384  # what x264 takes; more is left out of the measure


def is_measured(index: int) -> bool:
    """Whether a measure is to be given this frame of a clip."""
    return index % _PERIOD < WINDOW


class VectorMotion:
    """Motion from the vectors of an H.264 encode of small frames. Every third frame begins a new window."""

    def __init__(self) -> None:
        self._encoder: av.VideoCodecContext | None = None
        self._decoder = av.CodecContext.create("h264", "r")
        self._decoder.thread_count = 1
        self._decoder.options = {"flags2": "+export_mvs", "skip_loop_filter": "all"}  # vectors do not depend on pixels
        self._shares: list[float] = []
        self._num_frames = 0

    def add(self, picture_bgr: UInt8[np.ndarray, "H W 3"]) -> None:
        """The clip's next frame that `is_measured`, small; all frames of a clip have one size."""
        height, width = (max(_BLOCK, min(side, _LONGEST) // _BLOCK * _BLOCK) for side in picture_bgr.shape[:2])
        if picture_bgr.shape[0] < height or picture_bgr.shape[1] < width:
            picture_bgr = cv2.resize(picture_bgr, (width, height), interpolation=cv2.INTER_LINEAR)
        if self._encoder is None:
            self._encoder = _vector_encoder(width, height)
            self._diagonal = float(np.hypot(width, height))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_bgr[:height, :width]), format="bgr24")
        frame = frame.reformat(format="yuv420p", threads=1)
        frame.pts = self._num_frames
        frame.time_base = self._encoder.time_base
        if self._num_frames % WINDOW == 0:
            frame.pict_type = PictureType.I  # its vectors would tell what happened since the window before
        self._num_frames += 1
        self._read(self._encoder.encode(frame))

    def _read(self, packets: Sequence[av.Packet | None]) -> None:
        for packet in packets:
            for frame in self._decoder.decode(packet):
                vectors = side_data(frame).get("MOTION_VECTORS")
                if vectors is not None:
                    self._shares.append(_mean_length(vectors.to_ndarray()) / self._diagonal)

    def score(self) -> float:
        """Of the frames so far; 0 for fewer than two."""
        if self._encoder is None:
            return 0.0
        self._read([*self._encoder.encode(None), None])
        return float(np.mean(self._shares)) if self._shares else 0.0


def _vector_encoder(width: int, height: int) -> av.VideoCodecContext:
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base = Fraction(1, 25)
    encoder.framerate = Fraction(25)
    encoder.thread_count = 1
    # cabac=0 codes the same decisions in less time; whole macroblocks take a third less than their parts
    params = "keyint=infinite:scenecut=0:bframes=0:ref=1:rc-lookahead=0:mbtree=0:threads=1:weightp=0:partitions=none"
    params += ":cabac=0"
    encoder.options = {"preset": "superfast", "crf": "18", "x264-params": params}
    return encoder


def _mean_length(vectors: np.ndarray) -> float:
    """Mean displacement in px over the area the vectors cover; blocks coded without reference say nothing."""
    if len(vectors) == 0:
        return 0.0
    area = vectors["w"].astype(np.float64) * vectors["h"]
    scale = np.maximum(vectors["motion_scale"], 1).astype(np.float64)
    length = np.hypot(vectors["motion_x"] / scale, vectors["motion_y"] / scale)
    return float((length * area).sum() / area.sum())


class FlowMotion:
    """Motion from DIS optical flow between small frames. Every third frame begins a new window."""

    def __init__(self) -> None:
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_FAST)
        self._last: np.ndarray | None = None
        self._shares: list[float] = []
        self._num_frames = 0

    def add(self, picture_bgr: UInt8[np.ndarray, "H W 3"]) -> None:
        """The clip's next frame that `is_measured`, small; all frames of a clip have one size."""
        grey = cv2.cvtColor(picture_bgr, cv2.COLOR_BGR2GRAY)
        if min(grey.shape) < _BLOCK:
            grey = cv2.resize(grey, None, fx=_BLOCK / min(grey.shape), fy=_BLOCK / min(grey.shape))
        begins = self._num_frames % WINDOW == 0
        self._num_frames += 1
        if not begins and self._last is not None:
            flow = self._flow.calc(self._last, grey, None)  # type: ignore[call-overload]  # stubs omit None
            self._shares.append(float(np.hypot(flow[..., 0], flow[..., 1]).mean() / np.hypot(*grey.shape)))
        self._last = grey

    def score(self) -> float:
        """Of the frames so far; 0 for fewer than two."""
        return float(np.mean(self._shares)) if self._shares else 0.0


class NoMotion:
    """Motion is not measured."""

    def add(self, picture_bgr: UInt8[np.ndarray, "H W 3"]) -> None:
        """Nothing to do."""

    def score(self) -> None:
        return None


MOTION: dict[str, Callable[[], VectorMotion | FlowMotion | NoMotion]] = {
    "vectors": VectorMotion,
    "flow": FlowMotion,
    "none": NoMotion,
}
"""Measure for each value of `shard.motion`."""
