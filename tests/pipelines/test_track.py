"""`kinema track` over rendered scenes: right tracks through stored flow, bad clips are data, equal bytes again."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.configs import TrackConfig
from kinema.pipelines import track
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.artifacts import store as store_module
from kinema.pipelines.loader import ClipIndex, DamagedClip
from kinema.pipelines.precision import cpu_multiplies_bf16
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.sidecars.tracks_codec import Tracks
from kinema.pipelines.track.shard_tracker import ShardTracker
from kinema.pipelines.track.trackers import ClipFrames, TrackerSpec, starting_frames

HEIGHT, WIDTH = 96, 128
NUM_FRAMES = {920: 24, 921: 9, 922: 2}


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    """No Ray, unless a test asks for it."""
    monkeypatch.setenv("KINEMA_ENGINE", "serial")


def scenes() -> list[Scene]:
    return [Scene(seed, HEIGHT, WIDTH, frames, num_objects=4) for seed, frames in NUM_FRAMES.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """clips/ of two shards and their exact flow, quantised as stored."""
    folder = tmp_path_factory.mktemp("data")
    clips = write_scene_clips(scenes(), folder / "clips", clips_per_shard=2)
    write_scene_flow(scenes(), clips, folder / "flow")
    return folder


def config(data: Path, out: Path | str, **changes) -> TrackConfig:
    settings = TrackConfig(clips=str(data / "clips"), flow=str(data / "flow"), out=str(out), grid=8)
    return dataclasses.replace(settings, **changes)


def stored(data: Path, out: Path | str) -> dict[str, Tracks]:
    """Tracks by source, read through the loader."""
    index = ClipIndex.open(data / "clips", None, out)
    return {clip.row["source"]: clip.tracks() for clip in (index.clip(i) for i in range(len(index)))}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_tracks_through_stored_flow_stay_within_a_pixel(data, tmp_path):
    summary = track.run(config(data, tmp_path / "tracks", grid=12, spread_starts=2))
    assert (summary.clips, summary.tracks, summary.quarantined, summary.exit_status) == (3, 3 * 2 * 144, 0, 0)
    found = stored(data, tmp_path / "tracks")["scene-920"]
    scene = scenes()[0]
    assert (found.size, found.queries.shape) == ((HEIGHT, WIDTH), (288, 3))
    right, seen = [], []
    for start in (0, 23):
        mine = found.queries[:, 0] == start
        points, visible = scene.tracks(found.queries[mine, 1:].astype(np.float64), start)
        error_px = np.linalg.norm(found.points_px[:, mine] - points, axis=2)
        right.append((error_px < 1)[visible].mean())
        seen.append((found.visible[:, mine] == visible).mean())
    assert min(right) > 0.95
    assert min(seen) > 0.9
    assert Artifact.read(tmp_path / "tracks").verify() == []


def test_sidecar_shards_have_the_clips_keys_in_the_clips_order(data, tmp_path):
    track.run(config(data, tmp_path / "tracks"))
    tracks = Artifact.read(tmp_path / "tracks")
    mine = tracks.samples(["shard", "position", "key"])
    assert mine.equals(Artifact.read(data / "clips").samples(["shard", "position", "key"]))
    row = tracks.samples().to_pylist()[0]
    assert (row["height"], row["width"], row["tracker"], row["num_tracks"]) == (HEIGHT, WIDTH, "chain", 64)
    assert 0.3 < row["visible_share"] < 1 and 0.1 < row["mean_step_px"] < 5 and row["num_saturated"] == 0


def test_two_runs_give_equal_bytes_and_a_third_computes_nothing(data, tmp_path, monkeypatch):
    first = track.run(config(data, tmp_path / "one"))
    track.run(config(data, tmp_path / "two"))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    monkeypatch.setattr("kinema.pipelines.engine.run_on_actors", lambda *a, **k: pytest.fail("computed again"))
    again = track.run(config(data, tmp_path / "one"))
    assert again == dataclasses.replace(first, seconds=again.seconds, new_shards=0)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.slow  # actors at work are in the ordinary run with `teach`
def test_ray_actors_write_the_same_bytes(data, tmp_path, monkeypatch, ray_session):
    track.run(config(data, tmp_path / "calm"))
    monkeypatch.setenv("KINEMA_ENGINE", "ray")
    track.run(config(data, tmp_path / "ray", num_actors=2))
    assert tree(tmp_path / "ray") == tree(tmp_path / "calm")


@pytest.mark.parametrize("kill_at", [1, 4, 6, 7, 9, 12])
def test_killed_at_any_step_then_rerun_gives_the_same_bytes(data, tmp_path, monkeypatch, kill_at):
    class Killed(BaseException):
        pass

    count = 0
    with monkeypatch.context() as patch:
        for name in ("publish", "write", "remove"):
            original = getattr(store_module.LocalStore, name)

            def step(self, *args, original=original, **kwargs):
                nonlocal count
                count += 1
                if count == kill_at:
                    raise Killed
                return original(self, *args, **kwargs)

            patch.setattr(store_module.LocalStore, name, step)
        patch.setattr(store_module.TemporaryFile, "discard", lambda self: self.file.close())
        with pytest.raises(Killed):
            track.run(config(data, tmp_path / "killed", grid=2))
    track.run(config(data, tmp_path / "killed", grid=2))
    track.run(config(data, tmp_path / "calm", grid=2))
    assert tree(tmp_path / "killed") == tree(tmp_path / "calm")


def test_a_shard_that_cannot_be_built_is_quarantined_and_tried_again(data, tmp_path, monkeypatch):
    original = ShardTracker.__call__

    def fail_first(self, shard):
        if shard == 0:
            raise MemoryError("out of memory")
        return original(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(ShardTracker, "__call__", fail_first)
        summary = track.run(config(data, tmp_path / "tracks"))
    assert (summary.clips, summary.quarantined, summary.exit_status) == (1, 2, 3)
    entry = Artifact.read(tmp_path / "tracks").quarantined().to_pylist()[0]
    assert entry["stage"] == "track" and entry["message"].startswith("the shard's worker failed: out of memory")
    assert track.run(config(data, tmp_path / "tracks")).quarantined == 0
    track.run(config(data, tmp_path / "calm"))
    assert tree(tmp_path / "tracks") == tree(tmp_path / "calm")


class BadTracker:
    """A tracker whose tracks of the second scene are bad."""

    def __init__(self, value: float):
        self.value = value

    def size(self, clip):
        return clip.height, clip.width

    def __call__(self, clip, queries):
        points = np.broadcast_to(queries[:, 1:], (clip.num_frames, len(queries), 2)).copy()
        if clip.row["source"] == "scene-921":
            points[3, 5] = self.value
        return Tracks(points, np.ones(points.shape[:2], bool), self.size(clip), queries)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(np.nan, "1 of 576 track positions are not finite"), (1e4, "a track reaches .* px from the middle")],
)
def test_bad_tracks_are_quarantined_with_their_reason_and_never_stored(data, tmp_path, monkeypatch, value, reason):
    monkeypatch.setattr(TrackerSpec, "load", lambda self: BadTracker(value))
    summary = track.run(config(data, tmp_path / "tracks"))
    assert (summary.clips, summary.quarantined, summary.exit_status) == (2, 1, 3)
    entry = Artifact.read(tmp_path / "tracks").quarantined().to_pylist()[0]
    assert (entry["source"], entry["error_class"]) == ("scene-921", "BadTracks")
    assert re.search(reason, entry["message"])
    again = track.run(config(data, tmp_path / "tracks"))
    assert again.new_shards == 0  # bad tracks are final until the inputs change
    index = ClipIndex.open(data / "clips", None, tmp_path / "tracks")
    assert len(index) == 2 and index.left_out == {"quarantined by track": 1}


def test_clips_without_flow_are_quarantined_with_that_reason(data, tmp_path):
    flow = write_scene_flow(scenes(), Artifact.read(data / "clips"), tmp_path / "flow")
    rebuild_without(flow, "scene-920")
    summary = track.run(config(data, tmp_path / "tracks", flow=str(tmp_path / "flow")))
    assert (summary.clips, summary.quarantined) == (2, 1)
    entry = Artifact.read(tmp_path / "tracks").quarantined().to_pylist()[0]
    assert (entry["source"], entry["error_class"]) == ("scene-920", "Missing")
    assert "the clip has no flow" in entry["message"]


def test_tracks_follow_flow_that_was_made_anew(data, tmp_path):
    flow = write_scene_flow(scenes(), Artifact.read(data / "clips"), tmp_path / "flow")
    track.run(config(data, tmp_path / "tracks", flow=str(tmp_path / "flow")))
    rebuild_without(flow, "scene-920")
    summary = track.run(config(data, tmp_path / "tracks", flow=str(tmp_path / "flow")))
    assert (summary.clips, summary.new_shards, summary.quarantined) == (2, 1, 1)


def rebuild_without(flow: Artifact, source: str) -> None:
    """Build a flow shard again, with one clip quarantined."""
    rows = flow.rows_of(0).to_pylist()
    tar = Path(flow.shard_url(0)).read_bytes()
    with flow.shard_writer(0) as writer:
        for row in rows:
            if writer.planned[row["key"]] == source:
                writer.quarantine(row["key"], stage="teach", error_class="BadFlow", message="gone bad")
                continue
            blob = tar[row["flow_offset"] : row["flow_offset"] + row["flow_size"]]
            kept = ("height", "width", "teacher", "weights_hash", "num_pairs", "num_saturated")
            writer.add(row["key"], {"flow": blob}, {name: row[name] for name in kept})
        writer.commit()
    flow.finalize()


def test_damaged_flow_costs_its_clip_and_is_tried_again_once_mended(data, tmp_path):
    flow = write_scene_flow(scenes(), Artifact.read(data / "clips"), tmp_path / "flow")
    row = flow.rows_of(0).to_pylist()[1]
    path = Path(flow.shard_url(0))
    good = path.read_bytes()
    middle = row["flow_offset"] + row["flow_size"] // 2
    path.write_bytes(good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :])
    settings = config(data, tmp_path / "tracks", flow=str(tmp_path / "flow"))
    assert track.run(settings).quarantined == 1
    entry = Artifact.read(tmp_path / "tracks").quarantined().to_pylist()[0]
    assert (entry["source"], entry["error_class"]) == ("scene-921", "DamagedClip")
    path.write_bytes(good)
    assert track.run(settings).quarantined == 0


def test_smaller_flow_gives_tracks_in_its_pixels(data, tmp_path):
    write_scene_flow(scenes(), Artifact.read(data / "clips"), tmp_path / "flow", size=(48, 64))
    track.run(config(data, tmp_path / "tracks", flow=str(tmp_path / "flow")))
    found = stored(data, tmp_path / "tracks")["scene-920"]
    assert found.size == (48, 64)
    expected, visible = scenes()[0].tracks((found.queries[:, 1:].astype(np.float64) + 0.5) * 2 - 0.5, 0)
    error_px = np.linalg.norm(found.points_px - ((expected + 0.5) / 2 - 0.5), axis=2)
    assert (error_px < 0.5)[visible].mean() > 0.9  # limbs are two pixels wide here


@pytest.fixture(scope="module")
def cotracker_weights(tmp_path_factory, fill, manifest) -> Path:
    from safetensors.torch import save_file

    from kinema.models.tracks.cotracker3.network import cotracker3

    network = cotracker3()
    fill.fill_(network, 0, manifest("cotracker3_offline"))
    path = tmp_path_factory.mktemp("weights") / "cotracker3.safetensors"
    save_file(network.state_dict(), path)
    return path


def test_cotracker3_stores_what_the_network_gives(data, tmp_path, cotracker_weights, capfd):
    from kinema.models.tracks.cotracker3.network import cotracker3
    from kinema.models.tracks.cotracker3.predictor import CoTracker3Predictor

    small = tmp_path / "small"
    film = Scene(930, 48, 64, 2)
    write_scene_clips([film], small / "clips")
    settings = {"tracker": "cotracker3", "weights": str(cotracker_weights), "flow": "", "grid": 2, "iters": 1}
    summary = track.run(config(small, tmp_path / "tracks", **settings, start_frames=(0, -1)))
    assert (summary.clips, summary.tracks) == (1, 8)
    found = stored(small, tmp_path / "tracks")["scene-930"]
    frames = ClipIndex.open(small / "clips").clip(0).frames(range(2))
    with torch.inference_mode():
        expected = CoTracker3Predictor(cotracker3(weights=cotracker_weights), iters=1)(
            frames, found.queries, backward=True
        )
    assert found.queries[:, 0].tolist() == [0] * 4 + [1] * 4
    assert np.abs(found.points_px - expected.tracks.numpy()).max() <= 1 / 128 + 1e-3
    np.testing.assert_array_equal(found.visible, expected.visible.numpy())
    row = Artifact.read(tmp_path / "tracks").samples().to_pylist()[0]
    assert summary.notices == ("weights of cotracker3_offline: licence CC BY-NC 4.0; not for commercial use",)
    assert summary.notices[0] in capfd.readouterr().err, "said by the process the user looks at"
    assert row["tracker"] == "cotracker3" and len(row["weights_hash"]) == 64


def test_bf16_is_another_artifact_and_float32_keeps_the_name_it_had(data, tmp_path, cotracker_weights):
    small = tmp_path / "small"
    write_scene_clips([Scene(930, 48, 64, 2)], small / "clips")
    settings = {"tracker": "cotracker3", "weights": str(cotracker_weights), "flow": "", "grid": 2, "iters": 1}
    track.run(config(small, tmp_path / "fp32", **settings))
    assert "precision" not in Artifact.read(tmp_path / "fp32").manifest["config"]
    if not cpu_multiplies_bf16():
        pytest.skip("this CPU has no instructions for bf16")
    track.run(config(small, tmp_path / "bf16", **settings, precision="bf16"))
    assert Artifact.read(tmp_path / "bf16").manifest["config"]["precision"] == "bf16"
    exact, rough = (stored(small, tmp_path / name)["scene-930"] for name in ("fp32", "bf16"))
    moved_px = np.linalg.norm(exact.points_px - rough.points_px, axis=2)
    assert moved_px.max() < 0.5  # these weights move nothing by a step of what is stored
    with pytest.raises(ValueError, match="precision"):
        track.run(config(small, tmp_path / "bf16", **settings))


def test_frames_are_decoded_only_when_asked_for(data):
    clip = ClipIndex.open(data / "clips").clip(0)
    frames = ClipFrames(clip)
    before = clip._counter.frames_decoded
    np.testing.assert_array_equal(frames[3:5], clip.frames([3, 4]))
    assert len(frames) == 24 and clip._counter.frames_decoded - before <= 12


@pytest.mark.parametrize(
    ("num_frames", "wanted", "spread", "expected"),
    [
        (24, (0,), 0, [0]),
        (24, (12, 0, -1, 12), 0, [0, 12, 23]),
        (5, (0, 12, -40), 0, [0, 4]),
        (24, (0,), 3, [0, 12, 23]),
        (24, (7,), 1, [0]),
        (2, (0,), 5, [0, 1]),
    ],
)
def test_start_frames(num_frames, wanted, spread, expected):
    assert starting_frames(num_frames, wanted, spread) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": ""}, "clips= is empty"),
        ({"flow": ""}, "flow= is empty; tracker=chain follows the flow"),
        ({"flow": "CLIPS"}, "holds clips, not flow; give the folder that `kinema teach` wrote"),
        ({"weights": "x.pth"}, "the tracker chain has none"),
        ({"tracker": "cotracker3", "weights": "/nowhere/x.pth"}, "weights=/nowhere/x.pth: the file does not exist"),
        ({"device": "cuda"}, "device=cuda, but there is no GPU"),
        ({"grid": 0}, "grid=0 is out of range"),
        ({"start_frames": ()}, r"start_frames=\[\] is out of range"),
        ({"spread_starts": -1}, "spread_starts=-1 is out of range"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(data, tmp_path, changes, message):
    changes = {k: str(data / "clips") if v == "CLIPS" else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message) as error:
        track.run(config(data, tmp_path / "tracks", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tracks").exists()


def test_flow_of_other_clips_or_without_the_needed_pairs_is_refused(data, tmp_path):
    other = write_scene_clips([Scene(940, 48, 64, 4)], tmp_path / "clips")
    write_scene_flow([Scene(940, 48, 64, 4)], other, tmp_path / "flow")
    with pytest.raises(ValueError, match="was made from other clips than"):
        track.run(config(data, tmp_path / "tracks", flow=str(tmp_path / "flow")))
    write_scene_flow([Scene(940, 48, 64, 4)], other, tmp_path / "forward", gaps=(1, 2))
    settings = TrackConfig(clips=other.url, flow=str(tmp_path / "forward"), out=str(tmp_path / "tracks"))
    with pytest.raises(ValueError, match="chaining needs gap 1 forward and backward"):
        track.run(settings)
    assert not (tmp_path / "tracks").exists()


def test_other_settings_are_refused(data, tmp_path):
    track.run(config(data, tmp_path / "tracks", grid=2))
    with pytest.raises(ValueError, match="another config.*grid was 2, is 3"):
        track.run(config(data, tmp_path / "tracks", grid=3))
    flow = write_scene_flow(scenes(), Artifact.read(data / "clips"), tmp_path / "flow", gaps=(1, -1))
    with pytest.raises(ValueError, match="another.*flow"):
        track.run(config(data, tmp_path / "tracks", grid=2, flow=flow.url))


def test_wrong_weights_leave_no_artifact_behind(data, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="unexpected: x"):
        track.run(config(data, tmp_path / "tracks", tracker="cotracker3", weights=str(tmp_path / "wrong.pth")))
    assert not (tmp_path / "tracks").exists()


def test_loader_joins_clips_flow_and_tracks(data, tmp_path):
    track.run(config(data, tmp_path / "tracks"))
    index = ClipIndex.open(data / "clips", data / "flow", tmp_path / "tracks")
    clip = index.clip(0)
    assert clip.flow_pairs and clip.tracks().points_px.shape == (24, 64, 2)
    np.testing.assert_array_equal(clip.track_queries, clip.tracks().queries)
    copy = index.on_disk(tmp_path)
    np.testing.assert_array_equal(copy.clip(0).tracks().points_px, clip.tracks().points_px)
    with pytest.raises(ValueError, match="opened without tracks"):
        ClipIndex.open(data / "clips").clip(0).tracks()
    with pytest.raises(ValueError, match="holds flow, not tracks; give tracks= the output of `kinema track`"):
        ClipIndex.open(data / "clips", None, data / "flow")
    other = write_scene_clips([Scene(941, 48, 64, 4)], tmp_path / "clips")
    with pytest.raises(ValueError, match="1 without tracks; were the tracks made from these clips?"):
        ClipIndex.open(other.url, None, tmp_path / "tracks")


def test_damaged_tracks_are_named(data, tmp_path):
    track.run(config(data, tmp_path / "tracks"))
    artifact = Artifact.read(tmp_path / "tracks")
    row = artifact.samples().to_pylist()[0]
    path = Path(artifact.shard_url(0))
    whole = bytearray(path.read_bytes())
    whole[row["tracks_offset"] + row["tracks_size"] - 9] ^= 255
    path.write_bytes(whole)
    clip = ClipIndex.open(data / "clips", None, tmp_path / "tracks").clip(0)
    with pytest.raises(DamagedClip, match=f"{clip.key}.tracks: .*checksum"):
        clip.tracks()


def test_clips_and_tracks_in_an_object_store(data, tmp_path):
    import fsspec

    base = f"memory://track-{tmp_path.name}"
    film = [Scene(942, 48, 64, 5)]
    clips = write_scene_clips(film, f"{base}/clips")
    write_scene_flow(film, clips, f"{base}/flow")
    summary = track.run(TrackConfig(clips=f"{base}/clips", flow=f"{base}/flow", grid=3))
    assert summary.out == f"{base}/tracks/chain"
    assert Artifact.read(summary.out).verify() == []
    assert ClipIndex.open(f"{base}/clips", None, summary.out).clip(0).tracks().visible.shape == (5, 9)
    fsspec.filesystem("memory").store.clear()


def test_the_command_prints_one_json_object(data, tmp_path, capfd):
    from kinema.pipelines.cli import main

    arguments = [f"clips={data / 'clips'}", f"flow={data / 'flow'}", f"out={tmp_path / 'tracks'}", "grid=2"]
    assert main(["track", *arguments, "start_frames=[0,-1]", "--json"]) == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert summary.keys() >= {"clips", "tracks", "quarantined", "seconds"}
    assert (summary["clips"], summary["tracks"], summary["quarantined"]) == (3, 24, 0)


def test_a_workflow_tracks_after_teaching(tmp_path):
    from kinema.configs import WorkflowConfig
    from kinema.pipelines.stages import STAGES
    from kinema.pipelines.workflow import resolve_stage

    assert list(STAGES).index("track") > list(STAGES).index("teach")
    outputs = {"shard": "CLIPS", "teach": "FLOW"}
    chain = resolve_stage(WorkflowConfig(), "track", tmp_path, outputs)
    assert (chain.clips, chain.flow, chain.out) == ("CLIPS", "FLOW", str(tmp_path / "tracks" / "chain"))
    settings = WorkflowConfig(track=TrackConfig(tracker="cotracker3"))
    cotracker = resolve_stage(settings, "track", tmp_path, outputs)
    assert (cotracker.clips, cotracker.flow) == ("CLIPS", "")
