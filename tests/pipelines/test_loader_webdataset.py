"""Our artifacts through plain WebDataset: the same frames, flow and tracks as our own loader gives."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.loader.webdataset import decoders, read_shard, shard_urls, with_sidecars
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow, write_scene_tracks

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "read_with_webdataset.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Clips of five scenes in three shards, with flow and tracks."""
    folder = tmp_path_factory.mktemp("data")
    scenes = [Scene(seed=seed, height=48, width=64, num_frames=5) for seed in range(5)]
    clips = write_scene_clips(scenes, folder / "clips", clips_per_shard=2)
    write_scene_flow(scenes, clips, folder / "flow")
    write_scene_tracks(scenes, clips, folder / "tracks", grid=4)
    return folder


def dataset(folder, *sidecars, **options):
    reader = wds.WebDataset(shard_urls(str(folder / "clips")), shardshuffle=False)
    return reader.compose(with_sidecars(*(str(folder / name) for name in sidecars))).decode(*decoders(**options))


def test_frames_flow_and_tracks_are_those_of_our_loader(data):
    index = ClipIndex.open(data / "clips", data / "flow", data / "tracks")
    ours = {index.clip(i).key: index.clip(i) for i in range(len(index))}
    samples = list(dataset(data, "flow", "tracks"))
    assert [sample["__key__"] for sample in samples] == Artifact.read(data / "clips").plan["key"].to_pylist()
    for sample in samples:
        clip = ours[sample["__key__"]]
        np.testing.assert_array_equal(sample["mp4"], clip.frames(range(5)))
        np.testing.assert_array_equal(sample["flow"].flow(1, -1), clip.flow(1, -1))
        np.testing.assert_array_equal(sample["tracks"].points_px, clip.tracks().points_px)
        assert sample["json"]["num_frames"] == 5
    few = next(iter(dataset(data, "flow", frames=slice(0, None, 2))))
    np.testing.assert_array_equal(few["mp4"], samples[0]["mp4"][::2])


def test_shards_may_come_in_any_order_and_through_any_filesystem(data):
    urls = shard_urls(str(data / "clips"))
    assert len(urls) == 3
    backwards = wds.WebDataset(urls[::-1], shardshuffle=False).compose(with_sidecars(str(data / "flow")))
    assert {s["__key__"] for s in backwards} == set(Artifact.read(data / "clips").plan["key"].to_pylist())
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(data / "clips"), "/copied", recursive=True)
    copied = wds.WebDataset(shard_urls("memory://copied"), shardshuffle=False).decode(*decoders())
    assert sum(1 for sample in copied if sample["mp4"].shape == (5, 48, 64, 3)) == 5
    memory.rm("/copied", recursive=True)


def test_a_clip_without_flow_is_left_out_aloud(data, tmp_path, capsys):
    clips, flow = Artifact.read(data / "clips"), Artifact.read(data / "flow")
    part = Artifact.open(tmp_path / "part", kind="flow", config={}, inputs={"clips": clips.plan8})
    part.append_plan(flow.plan)
    for shard in part.planned_shards()[:2]:
        stored = {sample["__key__"]: sample["flow"] for sample in read_shard(flow.shard_url(shard))}
        with part.shard_writer(shard) as writer:
            for place, key in enumerate(writer.planned):
                if place:
                    writer.add(key, {"flow": stored[key]}, {})
                else:
                    writer.quarantine(key, stage="teach", error_class="BadFlow", message="a test")
            writer.commit()
    joined = wds.WebDataset(shard_urls(clips.url), shardshuffle=False).compose(with_sidecars(part.url))
    expected = [keys[1] for keys in (clips.plan_of(shard)["key"].to_pylist() for shard in (0, 1))]
    assert [sample["__key__"] for sample in joined] == expected
    assert capsys.readouterr().err.count("are in a sidecar's quarantine and left out") == 3


def test_refusals_name_the_fix(data, tmp_path):
    with pytest.raises(ValueError, match="manifest"):
        shard_urls(str(tmp_path))
    other = write_scene_clips([Scene(seed=9, height=48, width=64, num_frames=5)], tmp_path / "other")
    joined = wds.WebDataset(shard_urls(other.url), shardshuffle=False).compose(with_sidecars(str(data / "flow")))
    with pytest.raises(ValueError, match="made from other clips"):
        list(joined)


def test_the_example_runs(data):
    command = [sys.executable, str(EXAMPLE), *(str(data / name) for name in ("clips", "flow", "tracks"))]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 5 and all("(3, 48, 64)" in line and line.endswith("px") for line in lines), done.stderr


def test_our_tars_are_those_of_webdatasets_writer(tmp_path):
    """Up to the two zero blocks that end a tar; TarWriter fills its last record of 10 KiB with more zeros."""
    from kinema.pipelines.artifacts.tar import TarBuilder

    samples = [(f"{i:032x}", {"mp4": bytes([i]) * (700 * i + 1), "json": json.dumps(i).encode()}) for i in range(4)]
    with wds.TarWriter(str(tmp_path / "theirs.tar"), user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    written = bytearray()
    builder = TarBuilder(written.extend)
    for key, members in samples:
        added = builder.add(key, members)
        assert all(len(members[ext]) == member.size for ext, member in added.items())
    builder.finish()
    theirs = (tmp_path / "theirs.tar").read_bytes()
    assert bytes(written) == theirs[: len(written)] and not any(theirs[len(written) :])
    for member in builder.members:
        payload = samples[int(member.key, 16)][1][member.extension]
        assert bytes(written[member.offset : member.offset + member.size]) == payload
