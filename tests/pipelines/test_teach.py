"""`kinema teach` over small clips: stored flow equals the network's, bad clips are data, reruns give equal bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
import torch

from kinema.configs import TeachConfig
from kinema.models.flow.dis import DIS
from kinema.models.flow.geometry import occlusion
from kinema.models.flow.networks import flow_network
from kinema.models.flow.raft.network import raft_small
from kinema.pipelines import teach
from kinema.pipelines.artifacts import Artifact, read_range, sample_key
from kinema.pipelines.artifacts import store as store_module
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips
from kinema.pipelines.sidecars.flow_codec import FlowBlob
from kinema.pipelines.sidecars.sidecar import clip_frames
from kinema.pipelines.teach import clip_flow
from kinema.pipelines.teach.protocol import FlowEstimate
from kinema.pipelines.teach.shard_teacher import ShardTeacher
from kinema.pipelines.teach.teachers import use_threads

HEIGHT, WIDTH = 72, 96
SHARDS = {0: ["pan.mp4", "zoom.mp4"], 1: ["turn.mp4"]}
NUM_FRAMES = {"pan.mp4": 6, "zoom.mp4": 5, "turn.mp4": 2}
STEP_PX = 1 / 128 + 1e-6


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    """No Ray, unless a test asks for it."""
    monkeypatch.setenv("KINEMA_ENGINE", "serial")


def film(source: str) -> list[np.ndarray]:
    """Rendered frames; every source has its own scene."""
    seed = sum(source.encode())
    return list(Scene(seed=seed, height=HEIGHT, width=WIDTH, num_frames=NUM_FRAMES.get(source, 3)).frames())


def mp4_of(frames: list[np.ndarray]) -> bytes:
    """H.264 without loss in RGB."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(24), options={"qp": "0", "preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return target.getvalue()


def write_clips(url: Path | str, shards: dict[int, list[str]], clips: dict[str, bytes] | None = None) -> Artifact:
    """A clips artifact as `kinema shard` lays it out; `clips` replaces the mp4 of some sources."""
    artifact = Artifact.open(url, kind="clips", config={"gop": 12})
    rows = [{"shard": s, "key": sample_key(name), "source": name} for s, names in shards.items() for name in names]
    schema = pa.schema([("shard", pa.int32()), ("key", pa.string()), ("source", pa.string())])
    artifact.append_plan(pa.concat_tables([artifact.plan.cast(schema), new_rows(artifact, rows, schema)]))
    for shard in artifact.pending():
        with artifact.shard_writer(shard) as writer:
            for row in artifact.plan_of(shard).to_pylist():
                mp4 = (clips or {}).get(row["source"]) or mp4_of(film(row["source"]))
                meta = {"key": row["key"], "sha256": hashlib.sha256(mp4).hexdigest()}
                size = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES.get(row["source"], 3)}
                members = {"mp4": mp4, "json": json.dumps(meta).encode()}
                writer.add(row["key"], members, row={"source": row["source"], **size})
            writer.commit()
    artifact.finalize()
    return artifact


def new_rows(artifact: Artifact, rows: list[dict], schema: pa.Schema) -> pa.Table:
    known = set(artifact.plan["key"].to_pylist())
    return pa.Table.from_pylist([row for row in rows if row["key"] not in known], schema=schema)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clips"
    write_clips(folder, SHARDS)
    return folder


def config(clips: Path, out: Path, **changes) -> TeachConfig:
    return dataclasses.replace(TeachConfig(clips=str(clips), out=str(out)), **changes)


def blobs(folder: Path | str) -> dict[str, FlowBlob]:
    """The blob of every source, read by ranges."""
    flow = Artifact.read(folder)
    found = {}
    for row in flow.samples().to_pylist():
        url, start = flow.shard_url(row["shard"]), row["flow_offset"]
        found[row["source"]] = FlowBlob(lambda o, n, url=url, start=start: read_range(url, start + o, n))
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def image(frame: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255


def test_stored_flow_is_the_teachers_for_every_gap_and_direction(clips, tmp_path):
    summary = teach.run(config(clips, tmp_path / "flow"))
    assert (summary.clips, summary.quarantined, summary.exit_status) == (3, 0, 0)
    assert summary.pairs == 2 * (5 + 4) + 2 * (4 + 3) + 2 * 1
    stored = blobs(tmp_path / "flow")
    for source in NUM_FRAMES:
        frames, blob = film(source), stored[source]
        count = len(frames)
        expected = {(t, g) for g in (1, 2) for t in range(count - g)} | {
            (t + g, -g) for g in (1, 2) for t in range(count - g)
        }
        assert set(blob.pairs) == expected
        for t, gap in blob.pairs:
            forward = DIS()(image(frames[t]), image(frames[t + gap]))
            backward = DIS()(image(frames[t + gap]), image(frames[t]))
            assert np.abs(blob.flow(t, gap) - forward[0].numpy()).max() <= STEP_PX
            assert np.array_equal(blob.occlusion(t, gap), occlusion(forward, backward)[0].numpy())
    assert Artifact.read(tmp_path / "flow").verify() == []


def test_sidecar_shards_have_the_clips_keys_in_the_clips_order(clips, tmp_path):
    teach.run(config(clips, tmp_path / "flow"))
    mine = Artifact.read(tmp_path / "flow").samples(["shard", "position", "key"])
    assert mine.equals(Artifact.read(clips).samples(["shard", "position", "key"]))
    row = Artifact.read(tmp_path / "flow").samples().to_pylist()[0]
    assert (row["height"], row["width"], row["teacher"], row["num_saturated"]) == (HEIGHT, WIDTH, "dis", 0)
    assert 0.05 < row["mean_flow_px"] < 20 and 0 <= row["occluded_share"] < 0.5


def test_flow_of_known_motion_is_found(tmp_path, clips):
    teach.run(config(clips, tmp_path / "flow", gaps=(1,)))
    scene = Scene(seed=sum(b"pan.mp4"), height=HEIGHT, width=WIDTH, num_frames=6)
    truth = scene.flow_px(2, 3)
    blob = blobs(tmp_path / "flow")["pan.mp4"]
    seen = ~scene.occluded(2, 3)
    error_px = np.sqrt(((blob.flow(2, 1) - truth) ** 2).sum(0))[seen].mean()
    assert error_px < 0.5 * np.sqrt((truth**2).sum(0))[seen].mean()


@pytest.mark.parametrize(
    "changes, pairs",
    [
        ({"gaps": (3,), "directions": ("forward",)}, {(0, 3), (1, 3), (2, 3)}),
        ({"gaps": (2, 1), "stride": 3, "directions": ("backward",)}, {(1, -1), (2, -2), (4, -1), (5, -2)}),
        ({"gaps": (5, 1), "stride": 4}, {(0, 1), (1, -1), (0, 5), (5, -5), (4, 1), (5, -1)}),
    ],
)
def test_gaps_directions_and_stride_choose_the_pairs(clips, tmp_path, changes, pairs):
    summary = teach.run(config(clips, tmp_path / "flow", **changes))
    found = blobs(tmp_path / "flow")
    assert set(found["pan.mp4"].pairs) == pairs
    assert summary.pairs == sum(len(blob.pairs) for blob in found.values())
    if len(changes.get("directions", "ab")) == 1:
        assert found["pan.mp4"].occlusion(*min(pairs)) is None


def test_raft_stores_what_the_network_gives_and_encodes_each_frame_once(clips, tmp_path, monkeypatch, fill, manifest):
    weights = tmp_path / "weights.safetensors"
    save_filled_raft(weights, fill, manifest)
    from kinema.models.flow.raft.network import RAFT

    encoded = []
    original = RAFT.encode
    monkeypatch.setattr(RAFT, "encode", lambda self, *a, **k: encoded.append(1) or original(self, *a, **k))
    settings = {"teacher": "raft_small", "weights": str(weights), "iters": 1, "batch_pairs": 3}
    teach.run(config(clips, tmp_path / "flow", **settings))
    assert len(encoded) == sum(NUM_FRAMES.values())
    monkeypatch.undo()
    network = raft_small(weights=weights)
    frames, blob = film("zoom.mp4"), blobs(tmp_path / "flow")["zoom.mp4"]
    assert blob.header.weights_hash == hashlib.sha256(weights.read_bytes()).hexdigest()
    with torch.inference_mode(), use_threads(1):
        for t, gap in [(0, 1), (3, -2), (4, -1)]:
            expected = network(image(frames[t]), image(frames[t + gap]), iters=1)[0].numpy()
            assert np.abs(blob.flow(t, gap) - expected).max() <= STEP_PX + 2e-5  # another batch size


def save_filled_raft(path: Path, fill, manifest, seed: int = 0) -> None:
    from safetensors.torch import save_file

    network = raft_small()
    fill.fill_(network, seed, manifest("raft_small"))
    save_file(network.state_dict(), path)


def test_short_side_stores_flow_at_the_reduced_size(clips, tmp_path):
    teach.run(config(clips, tmp_path / "small", short_side=48, gaps=(1,)))
    blob = blobs(tmp_path / "small")["pan.mp4"]
    assert (blob.header.height, blob.header.width) == (48, 64)
    assert blob.flow(0, 1).shape == (2, 48, 64)
    teach.run(config(clips, tmp_path / "large", short_side=500, gaps=(1,)))
    assert blobs(tmp_path / "large")["pan.mp4"].header.height == HEIGHT


def test_two_runs_and_other_batches_give_equal_bytes(clips, tmp_path):
    teach.run(config(clips, tmp_path / "one"))
    teach.run(config(clips, tmp_path / "two", batch_pairs=7))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_second_run_computes_nothing(clips, tmp_path, monkeypatch):
    first = teach.run(config(clips, tmp_path / "flow"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "flow").rglob("*")}
    monkeypatch.setattr("kinema.pipelines.engine.run_on_actors", lambda *a, **k: pytest.fail("computed again"))
    second = teach.run(config(clips, tmp_path / "flow"))
    assert second.new_shards == 0
    ignored = {"seconds": 0, "new_shards": 0}
    assert dataclasses.replace(first, **ignored) == dataclasses.replace(second, **ignored)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "flow").rglob("*")} == before


def test_new_clips_add_shards_and_leave_the_old_ones(tmp_path):
    write_clips(tmp_path / "clips", SHARDS)
    teach.run(config(tmp_path / "clips", tmp_path / "flow", gaps=(1,)))
    before = {name: data for name, data in tree(tmp_path / "flow").items() if "000" in name}
    write_clips(tmp_path / "clips", {**SHARDS, 2: ["new.mp4"]})
    summary = teach.run(config(tmp_path / "clips", tmp_path / "flow", gaps=(1,)))
    assert (summary.clips, summary.new_shards) == (4, 1)
    after = tree(tmp_path / "flow")
    assert {name: after[name] for name in before} == before
    assert Artifact.read(tmp_path / "flow").verify() == []


class NaNTeacher:
    """A teacher whose flow from the fourth frame of zoom.mp4 is bad."""

    def __init__(self, value: float):
        self.value = value
        self.bad_frame = film("zoom.mp4")[3].tobytes()

    def features(self, frame):
        return image(frame), frame.tobytes() == self.bad_frame

    def flow(self, pairs):
        flow = torch.zeros(len(pairs), 2, HEIGHT, WIDTH)
        for number, ((_, bad), _) in enumerate(pairs):
            flow[number, 0, 3, 4] = self.value if bad else 0.0
        return FlowEstimate(flow)


@pytest.mark.parametrize(
    "value, reason", [(float("nan"), "1 pixels that are not finite"), (1e4, "reaches 10000 px, more than 240 px")]
)
def test_bad_flow_is_quarantined_with_its_reason_and_never_stored(clips, tmp_path, monkeypatch, value, reason):
    monkeypatch.setattr(teach.TeacherSpec, "load", lambda self: NaNTeacher(value))
    said: list[str] = []
    summary = teach.run(config(clips, tmp_path / "flow"), report=said.append)
    assert (summary.clips, summary.quarantined, summary.exit_status) == (2, 1, 3)
    assert "1 of 3 clips quarantined (1 BadFlow; the first: " in said[-1] and reason in said[-1]
    entry = Artifact.read(tmp_path / "flow").quarantined().to_pylist()[0]
    assert (entry["source"], entry["stage"], entry["error_class"]) == ("zoom.mp4", "teach", "BadFlow")
    assert reason in entry["message"]
    assert set(blobs(tmp_path / "flow")) == {"pan.mp4", "turn.mp4"}
    assert Artifact.read(tmp_path / "flow").verify() == []


def test_every_pair_has_its_signals_in_the_order_of_the_blob(clips, tmp_path):
    teach.run(config(clips, tmp_path / "flow"))
    stored = blobs(tmp_path / "flow")
    for row in Artifact.read(tmp_path / "flow").samples().to_pylist():
        blob = stored[row["source"]]
        assert list(zip(row["pair_t"], row["pair_gap"], strict=True)) == blob.pairs
        lengths = [np.hypot(*blob.flow(*pair)).mean() for pair in blob.pairs]
        np.testing.assert_allclose(row["pair_motion_px"], lengths, atol=2 * STEP_PX)
        hidden = [blob.occlusion(*pair).mean() for pair in blob.pairs]
        np.testing.assert_allclose(row["pair_occluded_share"], hidden, atol=1e-6)
        assert row["mean_flow_px"] == pytest.approx(np.mean(row["pair_motion_px"]), rel=1e-6)
        assert not any(row["pair_cut"]) and row["pair_disagreement_px"] == [None] * len(blob.pairs)


def test_two_teachers_are_compared(clips, tmp_path):
    teach.run(config(clips, tmp_path / "first"))
    summary = teach.run(config(clips, tmp_path / "second", iters=4, compare=str(tmp_path / "first")))
    assert summary.quarantined == 0
    first, second = blobs(tmp_path / "first"), blobs(tmp_path / "second")
    for row in Artifact.read(tmp_path / "second").samples().to_pylist():
        a, b = first[row["source"]], second[row["source"]]
        expected = [np.hypot(*(a.flow(*pair) - b.flow(*pair))).mean() for pair in b.pairs]
        np.testing.assert_allclose(row["pair_disagreement_px"], expected, atol=2 * STEP_PX)
    write_clips(tmp_path / "others", {0: ["turn.mp4"]})
    with pytest.raises(ValueError, match="another teacher's flow of the same clips"):
        teach.run(config(tmp_path / "others", tmp_path / "third", compare=str(tmp_path / "first")))


def test_frames_too_large_are_reduced_or_tiled_and_the_artifact_says_so(clips, tmp_path):
    scene = Scene(seed=4, height=216, width=288, num_frames=3, speed_px=3.0)
    write_scene_clips([scene], str(tmp_path / "large"))
    whole, reduced, tiled = tmp_path / "whole", tmp_path / "reduced", tmp_path / "tiled"
    teach.run(config(tmp_path / "large", whole))
    teach.run(config(tmp_path / "large", reduced, max_megapixels=0.02))
    teach.run(config(tmp_path / "large", tiled, max_megapixels=0.04, too_large="tile"))
    header = next(iter(blobs(reduced).values())).header
    assert 0.95 * 20000 <= header.height * header.width <= 20000
    assert abs(header.width / header.height - 4 / 3) < 0.02
    assert Artifact.read(reduced).manifest["config"]["too_large"] == "downscale"
    stated = Artifact.read(tiled).manifest["config"]
    assert (stated["too_large"], stated["max_pixels"]) == ("tile", 40000)
    (one,), (other,) = blobs(whole).values(), blobs(tiled).values()
    assert other.header.height == 216 and other.header.width == 288
    truth, hidden = scene.motion(0, 1)
    errors = [np.hypot(*(blob.flow(0, 1) - truth))[~hidden].mean() for blob in (one, other)]
    assert errors[1] < errors[0] + 0.05


def test_uncertainty_is_asked_of_teachers_that_state_it(clips, tmp_path):
    with pytest.raises(ValueError, match="sea_raft"):
        teach.run(config(clips, tmp_path / "flow", uncertainty=True))
    assert not (tmp_path / "flow").exists()


def test_a_clip_that_is_not_what_its_row_says_is_quarantined(tmp_path):
    short = mp4_of(film("pan.mp4")[:4])
    write_clips(tmp_path / "clips", SHARDS, {"pan.mp4": short, "turn.mp4": b"not a video at all"})
    summary = teach.run(config(tmp_path / "clips", tmp_path / "flow", allowed_quarantine=0.9))
    assert (summary.clips, summary.quarantined, summary.exit_status) == (1, 2, 0)
    rows = Artifact.read(tmp_path / "flow").quarantined().to_pylist()
    found = {row["source"]: (row["error_class"], row["message"]) for row in rows}
    assert found["pan.mp4"] == ("Truncated", "the clip ends after 4 of 6 frames")
    assert found["turn.mp4"][0] == "Undecodable"


def test_damaged_clip_bytes_are_quarantined_and_taught_once_mended(clips, tmp_path):
    write_clips(tmp_path / "clips", SHARDS)
    artifact = Artifact.read(tmp_path / "clips")
    row = artifact.samples().to_pylist()[1]
    path = Path(artifact.shard_url(0))
    good = path.read_bytes()
    middle = row["mp4_offset"] + row["mp4_size"] // 2
    path.write_bytes(good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :])
    summary = teach.run(config(tmp_path / "clips", tmp_path / "flow"))
    assert summary.quarantined == 1
    entry = Artifact.read(tmp_path / "flow").quarantined().to_pylist()[0]
    assert entry["error_class"] == "DamagedStorage" and "kinema verify" in entry["message"]
    path.write_bytes(good)
    assert teach.run(config(tmp_path / "clips", tmp_path / "flow")).quarantined == 0
    teach.run(config(clips, tmp_path / "calm"))
    assert tree(tmp_path / "flow") == tree(tmp_path / "calm")


def test_clips_made_anew_with_fewer_clips_are_taught_anew_and_with_more_refused(tmp_path):
    write_clips(tmp_path / "clips", SHARDS)
    teach.run(config(tmp_path / "clips", tmp_path / "flow", gaps=(1,)))
    artifact = Artifact.read(tmp_path / "clips")
    gone = sample_key("zoom.mp4")
    rebuild(artifact, 0, leave_out=gone)
    summary = teach.run(config(tmp_path / "clips", tmp_path / "flow", gaps=(1,)))
    assert (summary.clips, summary.quarantined, summary.new_shards) == (2, 1, 1)
    entry = Artifact.read(tmp_path / "flow").quarantined().to_pylist()[0]
    assert (entry["key"], entry["error_class"]) == (gone, "Missing")
    assert Artifact.read(tmp_path / "flow").verify() == []
    teach.run(config(tmp_path / "clips", tmp_path / "late", gaps=(1,)))
    rebuild(artifact, 0)
    assert teach.run(config(tmp_path / "clips", tmp_path / "flow", gaps=(1,))).clips == 3
    with pytest.raises(ValueError, match="has 1 clips in shards that .*late was planned for without them"):
        teach.run(config(tmp_path / "clips", tmp_path / "late", gaps=(1,)))


def rebuild(artifact: Artifact, shard: int, leave_out: str = "") -> None:
    """Build a clip shard again, perhaps with a clip quarantined."""
    with artifact.shard_writer(shard) as writer:
        for row in artifact.plan_of(shard).to_pylist():
            if row["key"] == leave_out:
                writer.quarantine(row["key"], stage="shard", error_class="Corrupt", message="gone bad")
                continue
            mp4 = mp4_of(film(row["source"]))
            size = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES[row["source"]]}
            writer.add(row["key"], {"mp4": mp4, "json": b"{}"}, row={"source": row["source"], **size})
        writer.commit()
    artifact.finalize()


def test_a_shard_that_cannot_be_built_is_quarantined_and_tried_again(clips, tmp_path, monkeypatch):
    original = ShardTeacher.__call__

    def fail_first(self, shard):
        if shard == 0:
            raise MemoryError("out of memory")
        return original(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(ShardTeacher, "__call__", fail_first)
        summary = teach.run(config(clips, tmp_path / "flow"))
    assert (summary.clips, summary.quarantined, summary.exit_status) == (1, 2, 3)
    message = Artifact.read(tmp_path / "flow").quarantined().to_pylist()[0]["message"]
    assert message.startswith("the shard's worker failed: out of memory (test_teach.py:")
    assert teach.run(config(clips, tmp_path / "flow")).quarantined == 0
    teach.run(config(clips, tmp_path / "calm"))
    assert tree(tmp_path / "flow") == tree(tmp_path / "calm")


@pytest.mark.parametrize("kill_at", [1, 2, 3, 5, 6, 7, 8, 10, 12])
def test_killed_at_any_step_then_rerun_gives_the_same_bytes(clips, tmp_path, monkeypatch, kill_at):
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
            teach.run(config(clips, tmp_path / "killed", gaps=(1,)))
    teach.run(config(clips, tmp_path / "killed", gaps=(1,)))
    teach.run(config(clips, tmp_path / "calm", gaps=(1,)))
    assert tree(tmp_path / "killed") == tree(tmp_path / "calm")


def test_other_settings_and_weights_are_refused(clips, tmp_path, fill, manifest):
    teach.run(config(clips, tmp_path / "flow", gaps=(1,)))
    with pytest.raises(ValueError, match=r"another config.*gaps was \[1\], is \[1, 2\]"):
        teach.run(config(clips, tmp_path / "flow"))
    for seed in (0, 1):
        save_filled_raft(tmp_path / f"{seed}.safetensors", fill, manifest, seed)
    settings = {"teacher": "raft_small", "iters": 1, "gaps": (1,)}
    teach.run(config(clips, tmp_path / "raft", weights=str(tmp_path / "0.safetensors"), **settings))
    with pytest.raises(ValueError, match="another config.*weights_hash was"):
        teach.run(config(clips, tmp_path / "raft", weights=str(tmp_path / "1.safetensors"), **settings))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clips": ""}, "clips= is empty"),
        ({"clips": "/nowhere/clips"}, "holds no artifact"),
        ({"gaps": (0, 1)}, r"gaps=\[0, 1\] is out of range"),
        ({"directions": ()}, r"directions=\[\] is out of range"),
        ({"short_side": -1}, "short_side=-1 is out of range"),
        ({"threads_per_actor": 0}, "threads_per_actor=0 is out of range"),
        ({"weights": "x.pth"}, "dis has no weights"),
        ({"teacher": "raft", "weights": "/nowhere/x.pth"}, "weights=/nowhere/x.pth: the file does not exist"),
        ({"device": "cuda", "teacher": "dis"}, "device=cuda"),
        ({"precision": "bf16"}, "precision=bf16: dis is no network"),
    ],
)
def test_bad_arguments_are_one_line(clips, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        teach.run(dataclasses.replace(config(clips, tmp_path / "flow"), **changes))
    assert "\n" not in str(error.value)


def test_missing_published_weights_name_the_fix(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_CACHE", str(tmp_path / "cache"))
    from kinema.models import weights

    def offline(*_, **__):
        raise weights.urllib.error.URLError("no network")

    monkeypatch.setattr(weights.urllib.request, "urlopen", offline)
    with pytest.raises(ValueError, match="weights=FILE") as error:
        teach.run(config(clips, tmp_path / "flow", teacher="raft"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "flow").exists()


def test_wrong_weights_leave_no_artifact_behind(clips, tmp_path):
    torch.save({"module.x": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="missing: .*unexpected: x"):
        teach.run(config(clips, tmp_path / "flow", teacher="raft_small", weights=str(tmp_path / "wrong.pth")))
    assert not (tmp_path / "flow").exists()


def test_unfinished_clips_are_refused(tmp_path):
    Artifact.open(tmp_path / "clips", kind="clips", config={})
    with pytest.raises(ValueError, match="no commits yet: run `kinema shard`"):
        teach.run(config(tmp_path / "clips", tmp_path / "flow"))
    assert not (tmp_path / "flow").exists()


def test_clips_without_any_clip_are_refused(tmp_path):
    clips = Artifact.open(tmp_path / "clips", kind="clips", config={})
    clips.quarantine([{"source": "x.mp4", "stage": "shard", "error_class": "Empty", "message": "0 bytes"}])
    clips.finalize()
    with pytest.raises(ValueError, match="holds no clip \\(1 inputs are quarantined"):
        teach.run(config(tmp_path / "clips", tmp_path / "flow"))


def test_a_clip_too_short_for_every_gap_has_a_blob_without_pairs(clips, tmp_path):
    summary = teach.run(config(clips, tmp_path / "flow", gaps=(4,)))
    assert (summary.clips, summary.quarantined) == (3, 0)
    stored = blobs(tmp_path / "flow")
    assert {source: len(blob.pairs) for source, blob in stored.items()} == {"pan.mp4": 4, "zoom.mp4": 2, "turn.mp4": 0}
    assert Artifact.read(tmp_path / "flow").samples().to_pylist()[2]["mean_flow_px"] is None


def test_what_a_network_cannot_take_costs_the_clip_and_is_tried_again(clips, tmp_path, monkeypatch):
    bad_frame = film("zoom.mp4")[3].tobytes()

    class Choosy(NaNTeacher):
        def features(self, frame):
            if frame.tobytes() == bad_frame:
                raise RuntimeError("out of memory:\nno room for this frame")
            return super().features(frame)

    with monkeypatch.context() as patch:
        patch.setattr(teach.TeacherSpec, "load", lambda self: Choosy(0.0))
        assert teach.run(config(clips, tmp_path / "flow")).quarantined == 1
    entry = Artifact.read(tmp_path / "flow").quarantined().to_pylist()[0]
    assert (entry["error_class"], entry["message"]) == ("RuntimeError", "out of memory: no room for this frame")
    summary = teach.run(config(clips, tmp_path / "flow"))
    assert (summary.clips, summary.quarantined, summary.new_shards) == (3, 0, 1)


def test_memory_does_not_grow_with_the_clip(monkeypatch):
    """However many frames come, only a window and a batch of them are held."""
    alive, peak = 0, 0

    class Held:
        def __init__(self):
            nonlocal alive, peak
            alive += 1
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    class Still:
        def features(self, frame):
            return Held()

        def flow(self, pairs):
            return FlowEstimate(torch.zeros(len(pairs), 2, 4, 4))

    pairing = clip_flow.Pairing(gaps=(1, 2), batch_pairs=4)
    frames = (np.zeros((4, 4, 3), np.uint8) for _ in range(200))
    assert sum(1 for _ in clip_flow.clip_flow(frames, Still(), pairing)) == pairing.num_pairs(200)
    assert peak <= 8


def test_clips_and_flow_in_an_object_store(tmp_path):
    import fsspec

    base = f"memory://teach-{tmp_path.name}"
    write_clips(f"{base}/clips", SHARDS)
    summary = teach.run(TeachConfig(clips=f"{base}/clips", gaps=(1,)))
    assert summary.out == f"{base}/flow/dis"
    assert Artifact.read(summary.out).verify() == []
    assert len(blobs(summary.out)["pan.mp4"].pairs) == 10
    fsspec.filesystem("memory").store.clear()


def test_ray_actors_write_the_same_bytes(clips, tmp_path, monkeypatch, ray_session):
    teach.run(config(clips, tmp_path / "calm"))
    monkeypatch.setenv("KINEMA_ENGINE", "ray")
    teach.run(config(clips, tmp_path / "ray", num_actors=2))
    assert tree(tmp_path / "ray") == tree(tmp_path / "calm")


def test_decoded_frames_are_the_encoded_ones():
    frames = film("pan.mp4")
    row = {"height": HEIGHT, "width": WIDTH, "num_frames": len(frames)}
    assert np.array_equal(np.stack(list(clip_frames(mp4_of(frames), row))), np.stack(frames))


def random_weights(name: str, path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(flow_network(name).state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["sea_raft_s", "smurf", pytest.param("waft", marks=pytest.mark.slow)])
def test_other_networks_teach_what_they_say_directly(tmp_path, name):
    write_clips(tmp_path / "clips", {0: ["turn.mp4"]})
    weights = random_weights(name, tmp_path / "weights.pth")
    asked = {"uncertainty": True} if name != "smurf" else {}
    settings = {"teacher": name, "weights": str(weights), "iters": 2, "allowed_quarantine": 0.0, **asked}
    assert teach.run(config(tmp_path / "clips", tmp_path / "flow", **settings)).quarantined == 0
    blob = blobs(tmp_path / "flow")["turn.mp4"]
    network = flow_network(name, weights=weights)
    first, second = (image(frame) for frame in film("turn.mp4")[:2])
    with torch.inference_mode():
        expected = network(first, second, iters=2)[0]
    assert np.abs(blob.flow(0, 1) - expected.numpy()).max() <= STEP_PX + 2e-4
    if name != "smurf":
        with torch.inference_mode():
            sigma = network.uncertainty(network.with_info(first, second, iters=2).info)[0, 0]
        np.testing.assert_allclose(blob.uncertainty(0, 1), sigma.clamp(2**-8, 2**7.93), rtol=0.03)
        (row,) = Artifact.read(tmp_path / "flow").samples().to_pylist()
        assert row["pair_uncertainty_px"][0] == pytest.approx(float(sigma.mean()), rel=1e-3)
    else:
        assert blob.uncertainty(0, 1) is None
    with pytest.raises(ValueError, match="do not fit|does not fit|lack"):
        teach.run(config(tmp_path / "clips", tmp_path / "other", teacher="raft_small", weights=str(weights)))
