"""Stream mode: every sample once, the same for any workers and ranks, from any position, whole shards from a bucket."""

import sys
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.configs import LoaderConfig
from kinema.pipelines.artifacts import remote
from kinema.pipelines.errors import StageError
from kinema.pipelines.loader import ClipIndex, Loader
from kinema.pipelines.loader.stream import ShardCache, StreamOrder
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow

sys.path.insert(0, str(Path(__file__).parent))
from loader_readers import read_pair, skip_some
from s3_server import s3_server


def order(num_clips=60, per_shard=5, **settings) -> StreamOrder:
    settings = dict(seed=3, shuffle_window=10, lanes=1, global_batch=4) | settings
    return StreamOrder(num_clips, shards=np.arange(num_clips) // per_shard, **settings)


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("num_clips, samples_per_clip", [(60, 1), (59, 1), (23, 3)])
def test_every_sample_comes_once_in_an_epoch(num_clips, samples_per_clip, lanes):
    stream = order(num_clips, lanes=lanes, samples_per_clip=samples_per_clip)
    number = stream.num_samples
    epochs = [[stream.visit(n) for n in range(epoch * number, (epoch + 1) * number)] for epoch in range(3)]
    for epoch, visits in enumerate(epochs):
        assert {visit.epoch for visit in visits} == {epoch}
        wanted = Counter((clip, draw) for clip in range(num_clips) for draw in range(samples_per_clip))
        assert Counter((visit.clip, visit.draw) for visit in visits) == wanted
    assert len({tuple(visits) for visits in ([v.clip for v in e].__str__() for e in epochs)}) == 3


def test_neighbours_lie_in_few_shards_and_lanes_in_different_ones():
    stream = order(num_clips=400, per_shard=20, shuffle_window=40, lanes=2, global_batch=8)
    lanes = [[], []]
    for n in range(400):
        lanes[n % 8 // 4].append(stream.visit(n).clip // 20)
    for shards in lanes:
        for first in range(0, len(shards) - 40, 20):
            assert len(set(shards[first : first + 40])) <= 6
    assert len(set(lanes[0]) & set(lanes[1])) <= 4  # the mixing window at the border between the lanes
    assert [order(seed=1).visit(n).clip for n in range(60)] != [order(seed=2).visit(n).clip for n in range(60)]


def test_shards_ahead_are_those_that_come_and_no_more_than_asked():
    stream = order(num_clips=400, per_shard=20, shuffle_window=40, lanes=2, global_batch=8)
    for sample in (0, 96, 240):
        for lane, slots in enumerate((range(0, 4), range(4, 8))):
            ahead = stream.shards_ahead(sample, slots, count=3)
            numbers = [n for n in range(sample, sample + 8) if n % 8 // 4 == lane]
            assert {stream.visit(n).clip // 20 for n in numbers} <= set(ahead)
            assert len(ahead) <= 3 + 4


def pack(root: str) -> str:
    """Clips and flow of nine clips in shards of two."""
    scenes = [Scene(seed=s, height=32, width=48, num_frames=8, num_objects=1) for s in range(9)]
    clips = write_scene_clips(scenes, f"{root}/clips", clips_per_shard=2)
    write_scene_flow(scenes, clips, f"{root}/flow", gaps=(1, -2))
    return root


def open_index(root: str) -> ClipIndex:
    return ClipIndex.open(f"{root}/clips", f"{root}/flow")


@pytest.fixture(scope="module")
def packed() -> ClipIndex:
    """In an object store, as far as the loader can tell."""
    return open_index(pack("memory://loader-stream"))


def batches(number, index, rank=0, world_size=1, state=None, read=read_pair, **settings):
    config = LoaderConfig(**({"num_workers": 0, "mode": "stream", "shuffle_window": 4, "lookahead": 1} | settings))
    loader = Loader(index, read, config, 4 // world_size, seed=5, rank=rank, world_size=world_size)
    if state is not None:
        loader.load_state_dict(state)
    running = iter(loader)
    found = [next(running) for _ in range(number)]
    state = loader.state_dict()
    loader.close()
    return found, state


def assert_equal(first, second):
    assert [batch["key"] for batch in first] == [batch["key"] for batch in second]
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[n], b[n]) if isinstance(a[n], torch.Tensor) else a[n] == b[n] for n in a)


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_same_batches_for_any_ranks_and_position(packed, lanes):
    whole, _ = batches(6, packed, lanes=lanes)
    first, state = batches(2, packed, lanes=lanes)
    rest, _ = batches(4, packed, lanes=lanes, state=state)
    assert_equal(whole, first + rest)
    halves = [batches(6, packed, rank=rank, world_size=2, lanes=lanes)[0] for rank in range(2)]
    assert [a["key"] + b["key"] for a, b in zip(*halves, strict=True)] == [batch["key"] for batch in whole]
    random, _ = batches(6, packed, mode="random")
    in_random = {(k, t.item()): f for b in random for k, t, f in zip(b["key"], b["noise"], b["flow"], strict=True)}
    assert not {(k, t.item()) for b in whole for k, t in zip(b["key"], b["noise"], strict=True)}.isdisjoint(in_random)


def test_from_a_bucket_workers_read_the_same_and_share_one_copy_of_each_shard(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    alone, _ = batches(4, packed)
    with s3_server() as faults:
        forkserver._forkserver._stop()  # one that an earlier test started does not know this server's credentials
        index = open_index(pack("s3://kinema"))
        for fault in ("500", "503", "cut"):
            faults.add(fault, 1, r"^GET .*\.tar")
        assert_equal(alone, batches(4, index, num_workers=2, cache_dir=str(tmp_path))[0])
        assert faults.queue == []
        tars = Counter(line for line in faults.log if line.startswith("GET") and ".tar" in line)
        assert sum(tars.values()) <= len(tars) + 3  # each once, but for the faults
        assert not list(tmp_path.glob("*.partial"))
        faults.log.clear()
        assert_equal(alone[:2], batches(2, index, cache_dir=str(tmp_path))[0])
        assert not [line for line in faults.log if ".tar" in line]


def test_the_folder_keeps_its_limit_and_a_shard_above_it_is_said(packed, tmp_path):
    index = packed
    urls = [url for shard in sorted(set(index.table["shard"].to_pylist())) for url in index.urls_of(shard)]
    sizes = {url: Path(ShardCache(tmp_path / "all", 10**9).local(url)).stat().st_size for url in urls}
    limit = max(sizes.values()) * 3
    cache = ShardCache(tmp_path / "some", limit)
    for url in [*urls, *urls]:
        assert Path(cache.local(url)).stat().st_size == sizes[url]
        assert sum(path.stat().st_size for path in (tmp_path / "some").glob("*.tar")) <= limit
    with pytest.raises(StageError, match=r"more than loader.cache_gb=.*loader.mode=random"):
        batches(1, packed, cache_gb=1e-7)


def test_a_skip_is_replaced_from_shards_at_hand(packed):
    whole, state = batches(5, packed, read=skip_some)
    first, state = batches(3, packed, read=skip_some)
    assert_equal(whole, first + batches(2, packed, read=skip_some, state=state)[0])
    stream = order(num_clips=400, per_shard=20, shuffle_window=40)
    here = {stream.visit(n).clip // 20 for n in range(40)}
    assert {stream.replacement(3, attempt).clip // 20 for attempt in range(1, 65)} <= here
    assert len({stream.replacement(3, attempt).clip for attempt in range(1, 41)}) == 40
    assert {stream.replacement(3, attempt).clip // 20 for attempt in range(65, 257)} - here


def test_positions_of_one_mode_are_refused_by_the_other(packed):
    _, state = batches(1, packed)
    with pytest.raises(ValueError, match="lanes=1, this loader 0"):
        batches(1, packed, mode="random", state=state)
    with pytest.raises(ValueError, match=r"loader.lanes=3 does not divide the global batch of 4"):
        batches(1, packed, lanes=3)
