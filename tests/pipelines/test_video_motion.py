"""Motion scores against known motion, and perceptual signatures."""

import cv2
import numpy as np
import pytest

from kinema.pipelines.video import motion
from kinema.pipelines.video.motion import MOTION
from kinema.pipelines.video.signature import (
    clip_signature,
    frame_signature,
    is_flat,
    looks_alike,
    perceptual_hash,
)

HEIGHT, WIDTH = 144, 256


def texture(seed: int, height: int = 300, width: int = 500) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (height // 6, width // 6, 3)).astype(np.float32)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)


def moving(seed: int, dx: int, dy: int, num_frames: int = 12, height: int = HEIGHT, width: int = WIDTH):
    wide = texture(seed)
    return [
        np.ascontiguousarray(wide[10 + i * dy : 10 + i * dy + height, 10 + i * dx : 10 + i * dx + width])
        for i in range(num_frames)
    ]


def score(frames, kind: str) -> float:
    measure = MOTION[kind]()
    for frame in frames:
        measure.add(frame)
    return measure.score()


@pytest.mark.parametrize("kind", ["vectors", "flow"])
@pytest.mark.parametrize("dx, dy", [(3, 0), (0, 5), (6, 4)])
def test_a_moving_picture_has_its_displacement(kind, dx, dy):
    expected = np.hypot(dx, dy) / np.hypot(HEIGHT, WIDTH)
    assert score(moving(1, dx, dy), kind) == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("kind", ["vectors", "flow"])
def test_a_still_picture_has_none(kind):
    assert score(moving(1, 0, 0), kind) < 1e-4
    assert score(moving(1, 0, 0)[:1], kind) == 0
    assert score([], kind) == 0


def test_the_share_of_the_diagonal_does_not_depend_on_the_size():
    large = moving(2, 6, 4)
    small = [cv2.resize(frame, (128, 72), interpolation=cv2.INTER_AREA) for frame in large]
    assert score(small, "vectors") == pytest.approx(score(large, "vectors"), rel=0.2)


def test_the_end_of_a_strip_longer_than_x264_takes_is_left_out():
    frames = [np.tile(frame[:16], (1, 80, 1)) for frame in moving(3, 1, 0, height=32, width=260)]
    assert frames[0].shape == (16, 20800, 3)
    assert 0 < score(frames, "vectors") < 0.01


@pytest.mark.parametrize("size", [(9, 11), (16, 16), (145, 257)])
@pytest.mark.parametrize("kind", ["vectors", "flow"])
def test_any_size(kind, size):
    frames = [frame[: size[0], : size[1]] for frame in moving(3, 1, 0, height=160, width=260)]
    assert 0 <= score([np.ascontiguousarray(f) for f in frames], kind) < 0.5


def test_scores_are_repeatable_and_can_be_left_out():
    frames = moving(4, 2, 1)
    assert score(frames, "vectors") == score(frames, "vectors")
    assert score(frames, "none") is None


def signature(frames) -> np.ndarray:
    return clip_signature(np.stack([frame_signature(frame) for frame in frames]))


def walking(seed: int, phase: int, num_frames: int = 24) -> list[np.ndarray]:
    """A steady background before which a square walks around."""
    background = texture(seed, 150, 270)[:HEIGHT, :WIDTH]
    frames = []
    for i in range(num_frames):
        frame = background.copy()
        angle = (phase + 2 * i) / 12
        x, y = int(110 + 80 * np.cos(angle)), int(55 + 40 * np.sin(angle))
        frame[y : y + 35, x : x + 35] = (20, 240, 30)
        frames.append(frame)
    return frames


def test_a_copy_of_lower_quality_and_size_looks_alike():
    frames = moving(5, 3, 1, num_frames=30)
    copies = [cv2.resize(frame, (130, 74), interpolation=cv2.INTER_AREA) for frame in frames]
    copies = [cv2.imdecode(cv2.imencode(".jpg", frame, [1, 30])[1], 1) for frame in copies]
    a, b = signature(frames), signature(copies)
    assert looks_alike(a, b, bits=4)
    assert (perceptual_hash(a) ^ perceptual_hash(b)).bit_count() <= 4


def test_other_footage_does_not():
    signatures = [signature(moving(seed, 3, 1)) for seed in range(10, 20)]
    pairs = [(a, b) for i, a in enumerate(signatures) for b in signatures[:i]]
    assert not any(looks_alike(a, b, bits=4) for a, b in pairs)
    assert min((perceptual_hash(a) ^ perceptual_hash(b)).bit_count() for a, b in pairs) > 12


def test_two_stretches_of_one_steady_camera_are_not_copies():
    a, b = signature(walking(6, 0)), signature(walking(6, 40))
    assert looks_alike(a, signature(walking(6, 0)), bits=16)
    assert not looks_alike(a, b, bits=16)


def test_flat_pictures_are_recognised_as_such():
    assert is_flat(signature([np.full((90, 160, 3), value, np.uint8) for value in (0, 0, 0)]))
    assert not is_flat(signature(moving(7, 1, 0)))


def test_what_saves_time_does_not_change_the_vectors(monkeypatch):
    """Entropy coding and the decoder's loop filter come after the encoder's decisions."""
    rng = np.random.default_rng(3)
    frames = [np.clip(f.astype(int) + rng.integers(-9, 10, f.shape), 0, 255).astype(np.uint8) for f in moving(2, 3, 1)]
    quick = score(frames, "vectors")
    make = motion._vector_encoder

    def with_cabac(width, height):
        encoder = make(width, height)
        params = encoder.options["x264-params"]
        assert ":cabac=0" in params
        encoder.options = {**encoder.options, "x264-params": params.replace(":cabac=0", ":cabac=1")}
        return encoder

    monkeypatch.setattr(motion, "_vector_encoder", with_cabac)
    measure = MOTION["vectors"]()
    measure._decoder.options = {"flags2": "+export_mvs"}
    for frame in frames:
        measure.add(frame)
    assert measure.score() == quick > 0
