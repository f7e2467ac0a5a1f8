"""Shot cuts, found on small frames as they stream by.

PySceneDetect's detectors propose cuts where much changes between two frames. Fast motion, flashes and things that
pass close to the camera change much, too, and would chop the shots that move most into shreds. So each proposal is
checked: within one shot, most blocks of a frame before the place are found again, displaced, in a frame after it.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import UInt8
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector

from kinema.configs.schema import ClipConfig

# PySceneDetect's default for the ratio of a frame's change to its neighbours'; cut_threshold is the content threshold.
_ADAPTIVE_RATIO = 3.0
_ADAPTIVE_CONTENT_SHARE = 15.0 / 27.0
_LAG = 2  # frames by which AdaptiveDetector answers late
_SIDE = 96  # shorter side of the pictures that blocks are matched on
_BLOCKS = (4, 6)  # rows and columns
_REACH = 0.25  # of the picture's sides: how far a block may move between two frames
_FLAT = 4.0  # standard deviation below which a block has nothing to match
_SAME_SHOT = 0.7  # median correlation of blocks; cuts reach 0.66, fast motion stays above 0.72
_BRIDGE = 3  # frames a flash or an occluder may span, counted from the frame before to the frame after


class CutDetector:
    """Feed every frame in order; `finish` returns where new shots start.

    No minimum shot length is enforced: a doubtful cut costs a shorter clip, a missed one puts two scenes in one clip.
    """

    def __init__(self, clip: ClipConfig):
        self._detector: ContentDetector | None = None
        if clip.cuts == "content":
            self._detector = ContentDetector(threshold=clip.cut_threshold, min_scene_len=1)
        elif clip.cuts == "adaptive":
            self._detector = AdaptiveDetector(
                adaptive_threshold=_ADAPTIVE_RATIO,
                min_content_val=clip.cut_threshold * _ADAPTIVE_CONTENT_SHARE,
                min_scene_len=1,
            )
        self._recent: dict[int, np.ndarray] = {}
        self._proposed: list[int] = []
        self._cuts: list[int] = []
        self._num_frames = 0

    def add(self, picture_bgr: UInt8[np.ndarray, "H W 3"]) -> None:
        """The next frame, small."""
        index = self._num_frames
        self._num_frames += 1
        if self._detector is None:
            return
        # the detectors work on frame numbers; the rate is only how they are written
        found = self._detector.process_frame(FrameTimecode(index, fps=25.0), picture_bgr)
        self._proposed.extend(cut.frame_num for cut in found if cut.frame_num > 0)
        self._recent[index] = _matching_picture(picture_bgr)
        self._recent.pop(index - 2 * _BRIDGE - _LAG, None)
        while self._proposed and self._proposed[0] + _BRIDGE <= index:
            self._check(self._proposed.pop(0))

    def finish(self) -> list[int]:
        """Index of the first frame of every shot but the first, ascending."""
        for proposed in self._proposed:
            self._check(proposed)
        self._proposed = []
        return sorted({cut for cut in self._cuts if 0 < cut < self._num_frames})

    def _check(self, cut: int) -> None:
        for span in range(1, _BRIDGE + 1):
            for before in range(cut - span, cut):
                if before in self._recent and before + span in self._recent:
                    if same_shot(self._recent[before], self._recent[before + span]):
                        return
        self._cuts.append(cut)


def _matching_picture(picture_bgr: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w"]:
    grey = cv2.cvtColor(picture_bgr, cv2.COLOR_BGR2GRAY)
    scale = min(1.0, _SIDE / min(grey.shape))
    size = [max(_BLOCKS[1] * 4, round(side * scale)) for side in grey.shape[::-1]]
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def same_shot(a: UInt8[np.ndarray, "h w"], b: UInt8[np.ndarray, "h w"]) -> bool:
    """Whether most blocks of each small grey picture are found again in the other, displaced or not.

    The correlation ignores brightness and contrast, so flashes do not matter. Pictures without texture are the same
    only if their brightness is.
    """
    scores = [*_block_scores(a, b), *_block_scores(b, a)]
    if not scores:
        return abs(float(a.mean()) - float(b.mean())) < 16
    return float(np.median(scores)) >= _SAME_SHOT


def _block_scores(a: UInt8[np.ndarray, "h w"], b: UInt8[np.ndarray, "h w"]) -> list[float]:
    """Best correlation within reach of every textured block of `a` in `b`."""
    height, width = a.shape
    rows, columns = height // _BLOCKS[0], width // _BLOCKS[1]
    reach_y, reach_x = int(height * _REACH), int(width * _REACH)
    scores = []
    for y in range(0, rows * _BLOCKS[0], rows):
        for x in range(0, columns * _BLOCKS[1], columns):
            block = a[y : y + rows, x : x + columns]
            if block.std() < _FLAT:
                continue
            area = b[
                max(0, y - reach_y) : y + rows + reach_y,
                max(0, x - reach_x) : x + columns + reach_x,
            ]
            scores.append(float(cv2.matchTemplate(area, block, cv2.TM_CCOEFF_NORMED).max()))
    return scores
