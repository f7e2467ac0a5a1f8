"""The rule for the default preset, and structural similarity."""

import sys
from pathlib import Path

import numpy as np

from kinema.pipelines.bench.presets import PRESETS, Encoded, best, measure, ssim

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import numbered


def test_similarity_is_one_for_equal_pictures_and_falls_with_noise():
    rng = np.random.default_rng(0)
    picture = np.add.outer(np.arange(64) * 2, np.arange(48)).astype(np.uint8)
    noisy = [(picture + rng.integers(0, spread, picture.shape)).astype(np.uint8) for spread in (3, 30)]
    assert ssim(picture, picture) == 1
    assert 1 > ssim(picture, noisy[0]) > ssim(picture, noisy[1]) > 0


def test_the_fastest_preset_within_both_bounds_is_chosen():
    good = Encoded(100, 45.0, 0.99, 1.0)
    own = dict.fromkeys(PRESETS, Encoded(103, 45.0, 0.99, 0.1))  # too many bytes
    own |= {"medium": good, "faster": Encoded(90, 44.8, 0.99, 0.2), "fast": Encoded(102, 44.95, 0.99, 0.5)}
    assert best({"a": own}) == "fast"
    assert best({"a": own, "b": own | {"fast": Encoded(110, 46.0, 0.99, 0.5)}}) == "medium"


def test_every_preset_is_measured(tmp_path):
    found = measure(numbered(tmp_path / "a.mp4", 6), 4, ("superfast", "medium"))
    assert list(found) == ["superfast", "medium"]
    assert all(e.num_bytes > 500 and e.psnr_db > 30 and 0.9 < e.ssim <= 1 and e.cpu_s > 0 for e in found.values())
