"""The loader: order, resume, ranks, skips, damage, workers."""

import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from kinema.configs import LoaderConfig
from kinema.pipelines.errors import StageError
from kinema.pipelines.loader import ClipIndex, Loader, Skip
from kinema.pipelines.loader.clip import DamagedClip
from kinema.pipelines.loader.reader import MAX_FAILED_TRIES, stack
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow

sys.path.insert(0, str(Path(__file__).parent))
from loader_readers import read_pair, skip_some, skip_some_together

NUM_CLIPS = 7


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[str, str]:
    """URLs of clips and flow of seven short clips."""
    folder = tmp_path_factory.mktemp("packed")
    scenes = [Scene(seed=s, height=48, width=64, num_frames=14, num_objects=1, cuts=(9,)) for s in range(3)]
    scenes.append(Scene(seed=9, height=48, width=64, num_frames=5, num_objects=1))
    clips = write_scene_clips(scenes, folder / "clips")
    flow = write_scene_flow(scenes, clips, folder / "flow", gaps=(1, -2))
    return clips.url, flow.url


@pytest.fixture
def index(packed) -> ClipIndex:
    return ClipIndex.open(*packed)


def make(
    index, read=read_pair, batch_size=3, seed=4, rank=0, world_size=1, warn_after_s=30.0, together=None, **config
) -> Loader:
    config = LoaderConfig(**{"num_workers": 0, **config})
    return Loader(index, read, config, batch_size, seed, rank, world_size, warn_after_s, read_samples=together)


def take(loader: Loader, number: int) -> list[dict]:
    batches = iter(loader)
    return [next(batches) for _ in range(number)]


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name
            else:
                assert value == b[name]


def merged(ranks: list[list[dict]]) -> list[dict]:
    """Global batches from those of all ranks."""
    joined = []
    for parts in zip(*ranks, strict=True):
        whole = {}
        for name, value in parts[0].items():
            values = [part[name] for part in parts]
            whole[name] = torch.cat(values) if isinstance(value, torch.Tensor) else sum(values, [])
        joined.append(whole)
    return joined


def test_batches_hold_stacked_tensors_numbers_strings_and_keys(index):
    loader = make(index)
    [batch] = take(loader, 1)
    assert batch["frame"].shape == (3, 48, 64, 3) and batch["frame"].dtype == torch.uint8
    assert batch["flow"].shape == (3, 2, 48, 64) and batch["flow"].dtype == torch.float32
    assert batch["t"].dtype == torch.int64 and batch["noise"].dtype == torch.float32
    assert isinstance(batch["name"][0], str) and set(batch["key"]) <= set(index.keys)


def test_an_epoch_visits_every_clip_once_and_the_next_in_another_order(index):
    keys = [key for batch in take(make(index, batch_size=1), 3 * NUM_CLIPS) for key in batch["key"]]
    epochs = [keys[i : i + NUM_CLIPS] for i in range(0, len(keys), NUM_CLIPS)]
    assert all(sorted(epoch) == sorted(index.keys) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_larger_than_the_data_are_full(index):
    loader = make(index, batch_size=2 * NUM_CLIPS + 1)
    [batch] = take(loader, 1)
    assert len(batch["key"]) == 2 * NUM_CLIPS + 1
    assert loader.state_dict()["epoch"] == 2 and loader.state_dict()["samples_consumed"] == 1


def test_another_seed_gives_another_order_and_other_samples(index):
    first, second = (take(make(index, seed=seed), 4) for seed in (1, 2))
    assert [b["key"] for b in first] != [b["key"] for b in second]
    assert not torch.equal(first[0]["noise"], second[0]["noise"])


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("samples_per_clip", [1, 3])
def test_batches_do_not_depend_on_the_workers(index, num_workers, samples_per_clip):
    settings = {"samples_per_clip": samples_per_clip, "shuffle_window": 4, "read": skip_some}
    here = take(make(index, **settings), 9)
    loader = make(index, num_workers=num_workers, **settings)
    assert_same(here, take(loader, 9))
    loader.close()


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 1), (1, 0)])
def test_resume_in_the_middle_of_an_epoch_equals_going_on(index, before, after):
    whole = take(make(index, batch_size=2), 10)
    first = make(index, batch_size=2, num_workers=before)
    head = take(first, 5)
    state = first.state_dict()
    first.close()
    assert (state["epoch"], state["samples_consumed"]) == (1, 3)
    second = make(index, batch_size=2, num_workers=after)
    second.load_state_dict(state)
    assert_same(whole, head + take(second, 5))
    second.close()


def test_ranks_share_each_global_batch_without_overlap(index):
    alone = take(make(index, batch_size=4), 7)
    for world_size in (2, 4):
        ranks = [
            take(make(index, batch_size=4 // world_size, rank=rank, world_size=world_size), 7)
            for rank in range(world_size)
        ]
        assert_same(alone, merged(ranks))


def test_resume_with_another_number_of_ranks(index):
    whole = take(make(index, batch_size=4), 6)
    loaders = [make(index, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    head = merged([take(loader, 3) for loader in loaders])
    assert loaders[0].state_dict() == loaders[1].state_dict()
    rest = make(index, batch_size=4)
    rest.load_state_dict(loaders[0].state_dict())
    assert_same(whole, head + take(rest, 3))


def test_state_of_other_data_is_refused(index):
    state = make(index).state_dict()
    with pytest.raises(ValueError, match="num_clips=8, this loader 7"):
        make(index).load_state_dict({**state, "num_clips": 8})
    with pytest.raises(ValueError, match="seed=4, this loader 5"):
        make(index, seed=5).load_state_dict(state)


def test_samples_of_one_clip_are_spread_over_the_window(index):
    batches = take(make(index, batch_size=1, samples_per_clip=4, shuffle_window=3), 4 * NUM_CLIPS)
    keys = [batch["key"][0] for batch in batches]
    assert all(keys.count(key) == 4 for key in index.keys)
    assert len(set(keys[:12])) == 3 and len(set(keys[12:24])) == 3 and not set(keys[:12]) & set(keys[12:])
    assert any(a != b for a, b in zip(keys, keys[1:], strict=False))
    noises = [batch["noise"].item() for batch in batches]
    assert len(set(noises)) == len(noises)


@pytest.mark.parametrize(("num_workers", "world_size", "window"), [(0, 1, 3), (2, 1, 4), (0, 2, 256), (1, 2, 2)])
def test_samples_read_together_are_those_read_alone(index, num_workers, world_size, window):
    """Also when going on in the middle of a window, of an epoch, and over windows that no batch fits."""
    settings = {"read": skip_some, "samples_per_clip": 3, "shuffle_window": window}
    alone = take(make(index, batch_size=4, **settings), 12)
    ranks = []
    for rank in range(world_size):
        place = {"batch_size": 4 // world_size, "rank": rank, "world_size": world_size, "num_workers": num_workers}
        first = make(index, together=skip_some_together, **place, **settings)
        head = take(first, 5)
        second = make(index, together=skip_some_together, **place, **settings)
        second.load_state_dict(first.state_dict())
        first.close()
        ranks.append(head + take(second, 7))
        second.close()
    assert_same(alone, merged(ranks))


def test_a_clip_is_opened_once_for_all_its_samples_of_a_window(index):
    opened = []

    def read_together(clip, rngs):
        opened.append((clip.key, len(rngs)))
        return [read_pair(clip, rng) for rng in rngs]

    for rank in range(2):
        settings = {"batch_size": 2, "rank": rank, "world_size": 2, "samples_per_clip": 3, "shuffle_window": 4}
        take(make(index, together=read_together, **settings), 3)
    assert sorted(number for _, number in opened) == [3, 3, 3, 3] and len({key for key, _ in opened}) == 4


def test_damage_and_skips_are_replaced_when_samples_are_read_together(index):
    def read_together(clip, rngs):
        if clip.key == index.keys[0]:
            raise DamagedClip(f"{clip.key}: cut off")
        return [Skip("still") if clip.key == index.keys[1] else read_pair(clip, rng) for rng in rngs]

    def read(clip, rng):
        return read_together(clip, [rng])[0]

    loader = make(index, read=read, together=read_together, samples_per_clip=2, shuffle_window=NUM_CLIPS)
    keys = [key for batch in take(loader, 4) for key in batch["key"]]
    assert not {*index.keys[:2]} & {*keys}
    assert set(loader.stats()["skipped"]) == {"damaged", "still"} and list(loader.stats()["damaged"]) == [index.keys[0]]


def test_skipped_samples_are_counted_and_replaced(index):
    loader = make(index, read=skip_some, batch_size=5)
    batches = take(loader, 8)
    assert all(len(batch["key"]) == 5 for batch in batches)
    skipped = loader.stats()["skipped"]
    assert set(skipped) <= {"still", "constant flow"} and skipped["constant flow"] > 0
    still = {key for key in index.keys if key[0] in "0123"}
    assert not still.intersection(key for batch in batches for key in batch["key"])
    if still:
        assert skipped["still"] >= len(still)
    assert_same(batches, take(make(index, read=skip_some, batch_size=5), 8))
    ranks = [take(make(index, read=skip_some, batch_size=1, rank=r, world_size=5), 8) for r in range(5)]
    assert_same(batches, merged(ranks))


def test_data_without_a_usable_sample_is_a_loud_error_with_counts(index):
    seen = set()

    def read(clip, rng):
        seen.add(clip.key)
        return Skip("still" if clip.key == min(index.keys) else "constant flow")

    loader = make(index, read=read)
    with pytest.raises(
        StageError, match=rf"{MAX_FAILED_TRIES} tries in a row over 7 clips.* x constant flow, .* x still"
    ):
        take(loader, 1)
    assert seen == set(index.keys)
    assert sum(loader.stats()["skipped"].values()) == MAX_FAILED_TRIES


def test_errors_of_read_sample_are_not_hidden(index):
    def read(clip, rng):
        raise KeyError("flwo")

    with pytest.raises(KeyError, match="flwo"):
        take(make(index, read=read), 1)


@pytest.mark.parametrize("member", ["flow", "mp4"])
def test_damaged_bytes_cost_that_sample_not_the_run(packed, tmp_path, capsys, member):
    index = ClipIndex.open(*packed)
    victim = index.clip(2)
    url = victim._flow_shard_url if member == "flow" else victim._shard_url
    copy = tmp_path / Path(url).name
    data = bytearray(Path(url).read_bytes())
    start, size = victim.row[f"{member}_offset"], victim.row[f"{member}_size"]
    data[start : start + size] = bytes(size)
    copy.write_bytes(data)
    for urls in (index._shard_urls, index._flow_shard_urls):
        for shard, place in urls.items():
            urls[shard] = str(copy) if place == url else place
    index._cache.clear()
    loader = make(index, batch_size=NUM_CLIPS)
    batches = take(loader, 3)
    assert victim.key not in {key for batch in batches for key in batch["key"]}
    stats = loader.stats()
    assert stats["skipped"]["damaged"] >= 3 and set(stats["damaged"]) == {victim.key}
    warnings = capsys.readouterr().err
    assert warnings.count(f"{victim.key}.{member}") == 1
    clean = take(make(ClipIndex.open(*packed), batch_size=NUM_CLIPS), 3)
    same = [
        torch.equal(a["flow"][i], b["flow"][i])
        for a, b in zip(batches, clean, strict=True)
        for i in range(NUM_CLIPS)
        if b["key"][i] != victim.key
    ]
    assert all(same) and len(same) == 3 * (NUM_CLIPS - 1)


def test_every_clip_damaged_names_one(packed, tmp_path):
    index = ClipIndex.open(*packed)
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    index._flow_shard_urls = {shard: str(empty) for shard in index._flow_shard_urls}
    with pytest.raises(StageError, match=r"256 x damaged.*ends early"):
        take(make(index), 1)


def test_a_long_wait_is_reported(index, capsys):
    def read(clip, rng):
        time.sleep(0.5)
        return {"x": 1}

    take(make(index, read=read, batch_size=1, warn_after_s=0.15), 1)
    warning = capsys.readouterr().err
    assert warning.count("rank 0 has waited") >= 2
    assert "sample 0 of epoch 0" in warning and index.clips_url in warning
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_stats_count_what_was_read(index):
    loader = make(index, batch_size=2)
    take(loader, 3)
    stats = loader.stats()
    assert (stats["batches"], stats["samples"], stats["skipped"]) == (3, 6, {})
    assert 6 <= stats["frames_decoded"] <= 6 * 9
    assert stats["bytes_read"] > 1000 and stats["wait_s"] > 0


def worker_processes() -> list[psutil.Process]:
    """Living children of multiprocessing's fork server."""
    server = forkserver._forkserver._forkserver_pid
    children = psutil.Process(server).children() if server else []
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]


def test_a_dead_worker_is_a_loud_error(index):
    loader = make(index, num_workers=2, batch_size=1)
    batches = iter(loader)
    next(batches)
    worker_processes()[0].kill()
    with pytest.raises(StageError, match=r"loader worker of rank 0 died .*Lower loader.num_workers"):
        for _ in range(50):
            next(batches)
    loader.close()
    assert not worker_processes()


def test_workers_live_through_epochs_and_end_with_close(index):
    loader = make(index, num_workers=2, batch_size=NUM_CLIPS)
    batches = iter(loader)
    next(batches)
    first = {process.pid for process in worker_processes()}
    for _ in range(5):
        next(batches)
    assert {process.pid for process in worker_processes()} == first and len(first) == 2
    loader.close()
    assert not worker_processes()
    assert loader.state_dict()["epoch"] == 6
    assert len(next(iter(loader))["key"]) == NUM_CLIPS
    loader.close()


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from kinema.configs import LoaderConfig
from kinema.pipelines.loader import ClipIndex, Loader
from loader_readers import read_pair
import psutil

if __name__ == "__main__":
    index = ClipIndex.open({clips!r}, {flow!r})
    batches = iter(Loader(index, read_pair, LoaderConfig(num_workers=2), 2, seed=0))
    print(len(next(batches)["key"]), *[c.pid for c in psutil.Process().children(recursive=True)], flush=True)
    time.sleep({sleep_s})
"""


def start_script(packed, sleep_s: float) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A program in the middle of an iteration with two workers, and the processes it has started."""
    script = SCRIPT.format(tests=str(Path(__file__).parent), clips=packed[0], flow=packed[1], sleep_s=sleep_s)
    program = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    num_samples, *pids = program.stdout.readline().split()
    assert num_samples == "2" and len(pids) == 4
    return program, [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]


def test_leaving_without_close_does_not_hang(packed):
    program, _ = start_script(packed, sleep_s=0)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 0 and "Traceback" not in errors


@pytest.mark.slow
def test_workers_end_when_their_program_is_killed(packed):
    program, started = start_script(packed, sleep_s=100)
    program.kill()
    program.communicate(timeout=60)
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive


def test_an_index_shared_as_a_file_gives_the_same_batches(index, monkeypatch):
    expected = take(make(index), 3)
    monkeypatch.setattr("kinema.pipelines.loader.loader._SHARE_ABOVE_BYTES", 0)
    loader = make(index, num_workers=2)
    assert_same(expected, take(loader, 3))


def test_an_iteration_that_nobody_holds_ends_its_workers(index):
    batches = iter(make(index, num_workers=1))
    next(batches)
    assert len(worker_processes()) == 1
    del batches
    assert not worker_processes()


def test_the_training_random_numbers_are_left_alone(index):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    loader = make(index, num_workers=1)
    take(loader, 2)
    loader.close()
    take(make(index), 2)
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(index, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(index, **arguments)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"x": torch.zeros(2)}, {"x": torch.zeros(3)}], r"shapes of `x`: \[\(2,\), \(3,\)\]"),
        ([{"x": 1}, {"y": 1}], "different names"),
        ([{"x": 1}, {"x": 1, "y": 1}], "different names"),
        ([{"key": "a"}], "must not hold `key`"),
    ],
)
def test_samples_that_do_not_stack_are_named(samples, message):
    with pytest.raises(ValueError, match=message):
        stack(samples, ["a"] * len(samples))


def test_numbers_and_arrays_become_tensors():
    batch = stack([{"a": np.arange(4)[::2], "b": True, "c": 2, "d": np.float64(0.5)} for _ in range(2)], ["k", "l"])
    assert batch["a"].tolist() == [[0, 2], [0, 2]] and batch["b"].dtype == torch.bool
    assert batch["c"].dtype == torch.int64 and batch["d"].dtype == torch.float32 and batch["key"] == ["k", "l"]
