"""Planning: shards of like size, none empty; duplicates marked once, in order."""

import numpy as np
import pytest

from kinema.pipelines.shard.plan import Duplicates, PlannedClip, assign_shards, new_rows

MB = 1_000_000


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_clips, min_shards", [(1, 8), (7, 8), (8, 8), (500, 8), (3000, 4)])
def test_shards_are_consecutive_full_and_never_empty(seed, num_clips, min_shards):
    sizes = np.random.default_rng(seed).integers(MB // 10, 9 * MB, num_clips).tolist()
    shards = assign_shards(sizes, first=3, shard_mb=384, min_shards=min_shards + 3)
    assert shards == sorted(shards)
    used = sorted(set(shards))
    assert used == list(range(3, 3 + len(used)))
    assert len(used) >= min(min_shards, num_clips)
    filled = [sum(s for s, shard in zip(sizes, shards, strict=True) if shard == k) for k in used]
    assert max(filled) <= max(512 * MB, max(sizes) * 2)
    if len(used) > min_shards:
        assert min(filled) > 230 * MB


def test_the_minimum_counts_the_whole_artifact():
    assert assign_shards([MB] * 4, first=8, shard_mb=384, min_shards=8) == [8, 8, 8, 8]
    assert assign_shards([MB] * 4, first=6, shard_mb=384, min_shards=8) == [6, 6, 7, 7]


def test_one_huge_clip_leaves_a_clip_for_every_shard():
    shards = assign_shards([1000 * MB, MB, MB, MB], first=0, shard_mb=384, min_shards=4)
    assert shards == [0, 1, 2, 3]


def clip(key: str, source_hash: str, signature: np.ndarray, *, start_s: float = 0.0, end_s: float = 4.0) -> PlannedClip:
    from kinema.pipelines.video.signature import perceptual_hash

    row = {"key": key, "source": key, "source_hash": source_hash, "shot": 0, "clip": 0, "num_frames": 96}
    row |= {"start_s": start_s, "end_s": end_s, "expected_bytes": MB, "phash": perceptual_hash(signature)}
    return PlannedClip({**row, "labels": None}, signature)


def look(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-90, 90, (5, 64)).astype(np.int8)


def nearly(signature: np.ndarray) -> np.ndarray:
    return (
        (signature.astype(int) + np.random.default_rng(0).integers(-1, 2, signature.shape))
        .clip(-127, 127)
        .astype(np.int8)
    )


def test_duplicates_point_to_the_first():
    duplicates = Duplicates(bits=4)
    assert duplicates.add(clip("a", "h1", look(1))) == (None, None)
    assert duplicates.add(clip("b", "h1", look(1))) == ("a", None)
    assert duplicates.add(clip("c", "h1", look(2), start_s=4.0, end_s=8.0)) == (None, None)
    assert duplicates.add(clip("d", "h2", nearly(look(1)))) == (None, "a")
    assert duplicates.add(clip("e", "h3", nearly(look(1)))) == (None, "a")
    assert duplicates.add(clip("f", "h4", look(3))) == (None, None)
    assert duplicates.add(clip("g", "h5", look(3), end_s=8.0)) == (None, None), "another length"


def test_flat_clips_are_not_called_alike():
    duplicates = Duplicates(bits=4)
    flat = np.zeros((5, 64), np.int8)
    assert duplicates.add(clip("a", "h1", flat)) == (None, None)
    assert duplicates.add(clip("b", "h2", flat)) == (None, None)


def test_rows_follow_the_clips():
    table = new_rows(
        [clip("a", "h1", look(1)), clip("b", "h1", look(1))], Duplicates(4), first=0, shard_mb=384, min_shards=2
    )
    assert table["key"].to_pylist() == ["a", "b"]
    assert table["shard"].to_pylist() == [0, 1]
    assert table["duplicate_of"].to_pylist() == [None, "a"]
    assert new_rows([], Duplicates(4), first=0, shard_mb=1, min_shards=1).num_rows == 0
