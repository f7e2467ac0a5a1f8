"""Shot cuts, found on small frames as they stream by.

PySceneDetect's detectors propose cuts where much changes between two frames. Fast motion, flashes and things that
pass close to the camera change much, too, and would chop the shots that move most into shreds. So each proposal is
checked: within one shot, most blocks of a frame before the place are found again, displaced, in a frame after it.
Dissolves and fades are divided in their middle.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector

from kinema.configs import ClipConfig
from kinema.pipelines.video.dissolves import SPAN as DISSOLVE_SPAN
from kinema.pipelines.video.dissolves import DissolveDetector

# PySceneDetect's default for the ratio of a frame's change to its neighbours'; cut_threshold is the content threshold.
_ADAPTIVE_RATIO = 3.0
_ADAPTIVE_CONTENT_SHARE = 15.0 / 27.0
_SIDE = 96  # shorter side of the pictures that blocks are matched on
_BLOCKS = (4, 6)  # rows and columns
_REACH = 0.25  # of the picture's sides: how far a block may move between two frames
_FLAT = 4.0  # standard deviation below which a block has nothing to match
_FINE = 4.0  # px: coarser structure is taken out, since it matches by chance
_SAME_SHOT = 0.42  # median correlation of blocks; between shots of a film it stays below 0.40
_ALIKE = 0.15  # share of blocks that move like two neighbours; between shots of a film it stays below 0.03
_NEIGHBOURS_PX = 3
_BAR = 24  # brightness of what counts as a dark bar
_SAME_BRIGHTNESS = 16
_RATE = FrameTimecode(0, fps=25.0)
_BRIDGE = 3  # frames a flash or an occluder may span, counted from the frame before to the frame after


class _QuickScore(ContentDetector):
    """PySceneDetect's score in half the time: the same sums of differences, taken by OpenCV."""

    _last_hsv: np.ndarray | None = None

    def _calculate_frame_score(self, timecode: FrameTimecode, frame_img: np.ndarray) -> float:
        hsv = cv2.cvtColor(frame_img, cv2.COLOR_BGR2HSV)
        before, self._last_hsv = self._last_hsv, hsv
        if before is None:
            return 0.0
        num_pixels = float(hsv.shape[0] * hsv.shape[1])
        hue, saturation, value, _ = cv2.sumElems(cv2.absdiff(hsv, before))
        return (hue / num_pixels + saturation / num_pixels + value / num_pixels) / 3.0


class _Content(_QuickScore):
    """ContentDetector."""


class _Adaptive(AdaptiveDetector, _QuickScore):
    """AdaptiveDetector, with the score above."""


class CutDetector:
    """Feed every frame in order; `finish` returns where new shots start.

    No minimum shot length is enforced: a doubtful cut costs a shorter clip, a missed one puts two scenes in one clip.
    """

    def __init__(self, clip: ClipConfig):
        self._detector: ContentDetector | None = None
        if clip.cuts == "content":
            self._detector = _Content(threshold=clip.cut_threshold, min_scene_len=0)
        elif clip.cuts == "adaptive":
            self._detector = _Adaptive(
                adaptive_threshold=_ADAPTIVE_RATIO,
                min_content_val=clip.cut_threshold * _ADAPTIVE_CONTENT_SHARE,
                min_scene_len=0,
            )
        self._dissolves = DissolveDetector()
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
        found = self._detector.process_frame(FrameTimecode(index, fps=_RATE), picture_bgr)
        self._proposed.extend(cut.frame_num for cut in found if cut.frame_num > 0)
        self._recent[index] = grey = _matching_picture(picture_bgr)
        self._recent.pop(index - DISSOLVE_SPAN - 1, None)
        if self._dissolves.add(grey) and same_shot(self._recent[index - DISSOLVE_SPAN], grey):
            self._dissolves.drop_last()  # the light changed, not the scene
        while self._proposed and self._proposed[0] + _BRIDGE <= index:
            self._check(self._proposed.pop(0))

    def finish(self) -> list[int]:
        """Index of the first frame of every shot but the first, ascending."""
        for proposed in self._proposed:
            self._check(proposed)
        self._proposed = []
        slow = [
            middle
            for middle in self._dissolves.finish()
            if not any(abs(middle - cut) <= DISSOLVE_SPAN // 2 for cut in self._cuts)
        ]
        return sorted({cut for cut in [*self._cuts, *slow] if 0 < cut < self._num_frames})

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
    """Whether most blocks of each small grey picture are found again in the other, moved like their neighbours.

    The correlation ignores brightness and contrast, so flashes do not matter. That neighbours move alike tells true
    matches from chance. Pictures without texture are the same only if their brightness is.
    """
    rows, columns = _without_bars(a, b)
    pair = [np.ascontiguousarray(picture[rows, columns]) for picture in (a, b)]
    fine = [_fine_structure(picture) for picture in pair]
    there, there_alike = _match_blocks(pair[0], fine[0], fine[1])
    back, back_alike = _match_blocks(pair[1], fine[1], fine[0])
    if not there and not back:
        return abs(float(pair[0].mean()) - float(pair[1].mean())) < _SAME_BRIGHTNESS
    if not there or not back:
        return False
    return float(np.median(there + back)) >= _SAME_SHOT and (there_alike + back_alike) / 2 >= _ALIKE


def _fine_structure(picture: UInt8[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    exact = picture.astype(np.float32)
    return exact - cv2.GaussianBlur(exact, (0, 0), _FINE)


def _without_bars(a: UInt8[np.ndarray, "h w"], b: UInt8[np.ndarray, "h w"]) -> tuple[slice, slice]:
    """The part inside of the dark bars both pictures have (their edges would match in any two shots)."""
    bright = np.maximum(a, b) > _BAR
    inside = []
    for axis, side in ((1, a.shape[0]), (0, a.shape[1])):
        lines = np.flatnonzero(bright.any(axis))
        first, last = (int(lines[0]), int(lines[-1]) + 1) if len(lines) else (0, side)
        inside.append(slice(first, last) if last - first >= side // 3 else slice(0, side))
    return inside[0], inside[1]


def _match_blocks(
    a: UInt8[np.ndarray, "h w"], fine_a: Float32[np.ndarray, "h w"], fine_b: Float32[np.ndarray, "h w"]
) -> tuple[list[float], float]:
    """Best correlation of every textured block of `a`, and the share of them that move like two neighbours."""
    height, width = a.shape[0] // _BLOCKS[0], a.shape[1] // _BLOCKS[1]
    reach_y, reach_x = int(a.shape[0] * _REACH), int(a.shape[1] * _REACH)
    moves = np.full((_BLOCKS[0] + 2, _BLOCKS[1] + 2, 2), np.inf)
    scores = []
    for row, column in np.ndindex(_BLOCKS):
        y, x = row * height, column * width
        if a[y : y + height, x : x + width].std() < _FLAT:
            continue
        top, left = max(0, y - reach_y), max(0, x - reach_x)
        area = fine_b[top : y + height + reach_y, left : x + width + reach_x]
        found = cv2.matchTemplate(area, fine_a[y : y + height, x : x + width], cv2.TM_CCOEFF_NORMED)
        _, score, _, (best_x, best_y) = cv2.minMaxLoc(found)
        scores.append(float(score))
        moves[row + 1, column + 1] = top + best_y - y, left + best_x - x
    alike = sum(_moves_like_neighbours(moves, row, column) for row, column in np.ndindex(_BLOCKS))
    return scores, alike / max(1, len(scores))


def _moves_like_neighbours(moves: np.ndarray, row: int, column: int) -> bool:
    own = moves[row + 1, column + 1]
    if not np.isfinite(own).all():
        return False
    around = moves[[row, row + 2, row + 1, row + 1], [column + 1, column + 1, column, column + 2]]
    return int((np.abs(around - own).max(1) <= _NEIGHBOURS_PX).sum()) >= 2
