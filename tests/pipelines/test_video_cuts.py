"""Shot cuts: found where scenes change, not where things move fast or flash."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector

from kinema.configs import ClipConfig
from kinema.pipelines.video import cuts
from kinema.pipelines.video.cuts import CutDetector
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.orient import Orientation
from kinema.pipelines.video.picture import Thumbnails

sys.path.insert(0, str(Path(__file__).parent))

# First frames of shots in tears of steel, found by eye on contact sheets of all frames.
TEARS_CUTS = (52, 122, 158, 221, 309, 715, 788, 872, 901, 987, 1127, 1157, 1203, 1234, 1246, 1284, 1345, 1378)
TEARS_CUTS += (1430, 1472, 1525, 1571, 1618, 1650, 1689)


def detail(seed: int, height: int = 96, width: int = 400) -> np.ndarray:
    """A picture with structure at several scales, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for cell in (4, 8, 16, 32):
        shape = (-(-height // cell), -(-width // cell), 3)
        noise = rng.uniform(-1, 1, shape).repeat(cell, 0).repeat(cell, 1)[:height, :width]
        picture += noise * cell
    return (128 + picture * 2).clip(0, 255).astype(np.uint8)


def cuts_of(frames, **clip) -> list[int]:
    detector = CutDetector(ClipConfig(**clip))
    for frame in frames:
        detector.add(np.ascontiguousarray(frame))
    return detector.finish()


def shot(seed: int, num_frames: int, speed: int = 2) -> list[np.ndarray]:
    wide = detail(seed)
    return [wide[:, speed * i : speed * i + 170] for i in range(num_frames)]


@pytest.mark.parametrize("cuts", ["content", "adaptive"])
def test_scene_changes_are_found_exactly(cuts):
    frames = shot(1, 20) + shot(2, 7) + shot(3, 30) + shot(4, 12)
    assert cuts_of(frames, cuts=cuts) == [20, 27, 57]


def test_none_finds_none():
    assert cuts_of(shot(1, 10) + shot(2, 10), cuts="none") == []


def test_fast_panning_is_no_cut():
    frames = shot(5, 10, speed=22)
    assert cuts_of(frames, cut_threshold=5.0) == []


@pytest.mark.parametrize("length", [1, 2])
def test_flashes_are_no_cuts(length):
    frames = shot(6, 30)
    for i in range(12, 12 + length):
        frames[i] = (frames[i].astype(int) // 4 + 190).astype(np.uint8)
    assert cuts_of(frames) == []


def test_a_cut_right_after_a_flash_is_found():
    frames = shot(6, 15) + shot(7, 15)
    frames[13] = np.full_like(frames[13], 250)
    assert 15 in cuts_of(frames)


@pytest.mark.parametrize("bars", ["letterbox", "pillarbox", "ticker"])
def test_cuts_are_found_inside_of_what_stays(bars):
    """Black bars and a news ticker are the same before and after a cut."""
    frames = [np.ascontiguousarray(frame) for frame in shot(8, 12) + shot(9, 12)]
    for frame in frames:
        if bars == "letterbox":
            frame[:14] = frame[-14:] = 16
        elif bars == "pillarbox":
            frame[:, :20] = frame[:, -20:] = 16
        else:
            frame[-18:] = detail(99)[:18, :170]
    assert cuts_of(frames) == [12]


def dissolve(a: np.ndarray, b: np.ndarray, num_frames: int) -> list[np.ndarray]:
    shares = (np.arange(num_frames) + 1) / (num_frames + 1)
    return [(a * (1 - share) + b * share).astype(np.uint8) for share in shares]


@pytest.mark.parametrize("length", [8, 16, 24, 40])
@pytest.mark.parametrize("target", ["scene", "black"])
def test_dissolves_and_fades_are_divided_in_their_middle(length, target):
    before = shot(1, 40, speed=0)
    after = shot(2, 40, speed=0) if target == "scene" else [np.zeros_like(before[0])] * 40
    frames = before + dissolve(before[-1], after[0], length) + after
    (cut,) = cuts_of(frames)
    assert cut == pytest.approx(40 + length / 2, abs=max(4, length / 8))


def test_a_change_of_light_is_no_dissolve():
    scene = shot(3, 1)[0]
    frames = [(scene * share).astype(np.uint8) for share in np.linspace(0.4, 1.0, 40)]
    assert cuts_of([frames[0]] * 20 + frames + [frames[-1]] * 20) == []


def test_shots_of_one_frame():
    frames = shot(1, 8) + shot(2, 1) + shot(3, 1) + shot(4, 1) + shot(5, 8)
    assert set(cuts_of(frames)) >= {8, 11}


def test_real_cuts_of_a_film(shared_data):
    """No cut is missed, and fast motion, explosions and muzzle flashes add at most two."""
    thumbnails = Thumbnails(Orientation(), 144)
    detector = CutDetector(ClipConfig())
    with VideoFile(str(shared_data / "videos" / "mdn_tears_of_steel.webm")) as video:
        for frame in video.frames():
            detector.add(thumbnails.make(frame))
    found = detector.finish()
    assert set(found) >= set(TEARS_CUTS)
    assert len(found) <= len(TEARS_CUTS) + 2


@pytest.mark.parametrize("plain, quick", [(ContentDetector, cuts._Content), (AdaptiveDetector, cuts._Adaptive)])
def test_scores_are_pyscenedetects(plain, quick):
    rng = np.random.default_rng(0)
    detectors = plain(min_scene_len=1), quick(min_scene_len=1)
    scenes, found = rng.integers(0, 256, (2, 96, 131, 3)), 0
    for index in range(30):
        picture = (scenes[index // 15] + rng.integers(-6, 7, scenes[0].shape)).clip(0, 255).astype(np.uint8)
        a, b = (detector.process_frame(FrameTimecode(index, fps=25.0), picture) for detector in detectors)
        assert a == b and detectors[0]._frame_score == detectors[1]._frame_score
        found += len(a)
    assert found == 1
