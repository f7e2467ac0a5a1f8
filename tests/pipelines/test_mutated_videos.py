"""Damaged videos by the hundred, and the memory that decoding one may take."""

from __future__ import annotations

import secrets
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kinema.configs import ClipConfig, ShardConfig
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.shard import run, scan
from kinema.pipelines.shard.limits import memory_limited

sys.path.insert(0, str(Path(__file__).parent))
from chaos import note
from made_videos import numbered
from mutated_videos import originals, table, try_batch


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_every_mutated_video_is_accounted_for(shared_data, tmp_path):
    """160 of the 5,000 a night may try (mutated_videos.py), of another seed each time."""
    seed = secrets.randbits(32)
    print(f"chaos seed {seed}")
    found = try_batch(tmp_path / "batch", originals(shared_data), 0, 160, seed)
    assert found["status"] == 0, found
    assert found["lost"] == [] and sum(found["counts"].values()) == 160
    print(table([found]))
    by_kind = Counter()
    for name, number in found["counts"].items():
        by_kind[name.partition(":")[0]] += number
    for kind, number in by_kind.items():
        note("serial", "shard", f"mutated video: {kind}", "clips or quarantine, with the reason", number)


def test_memory_beyond_the_limit_is_refused_and_the_limit_ends_with_the_block():
    with memory_limited(64 << 20):
        np.ones(1 << 20)
        with pytest.raises(MemoryError):
            np.ones(64 << 20)
    assert len(np.ones(32 << 20)) == 32 << 20
    with memory_limited(0):
        np.ones(32 << 20)


def test_a_source_that_needs_too_much_is_quarantined_and_the_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    for name in ("a", "greedy"):
        numbered(tmp_path / "v" / f"{name}.mp4", 12, seed=len(name))
    decode = scan._decode

    def greedy(video, source_id, *rest):
        if source_id == "greedy.mp4":
            np.ones(512 << 20)
        return decode(video, source_id, *rest)

    monkeypatch.setattr(scan, "_decode", greedy)
    clip = ClipConfig(seconds=1, preset="ultrafast")
    config = ShardConfig(str(tmp_path / "v"), str(tmp_path / "out"), clip=clip, source_memory_gb=0.5)
    assert run(config, report=lambda line: None).quarantined == 1
    (row,) = Artifact.read(tmp_path / "out").quarantined().to_pylist()
    assert (row["source"], row["error_class"]) == ("greedy.mp4", "TooMuchMemory")
    assert "needs more memory than source_memory_gb=0.5" in row["message"]
