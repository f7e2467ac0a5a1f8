"""AllTracker in the pipeline: long-gap flow with visibility from one pass, tracks from any frame, TAP-Vid."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from kinema.configs import TeachConfig, TrackConfig
from kinema.models.tracks.alltracker import AllTracker, alltracker
from kinema.models.tracks.alltracker.predictor import AllTrackerPredictor
from kinema.pipelines import teach, track
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.evaluate.tapvid.trackers import TrackerSettings, load_tracker
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips
from kinema.pipelines.teach.dense_tracks import DenseTracksTeacher
from kinema.pipelines.teach.protocol import ClipTeacher, Pairing
from kinema.pipelines.teach.teachers import TeacherSpec

HEIGHT, WIDTH, NUM_FRAMES = 32, 40, 5


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clips"
    write_scene_clips([Scene(940, HEIGHT, WIDTH, NUM_FRAMES)], folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory, fill, manifest) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    model = fill.fill_(AllTracker(tiny=True), 0, manifest("alltracker_tiny"))
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def network(weights) -> AllTracker:
    return alltracker(weights=weights)


def frames_of(clips: Path) -> torch.Tensor:
    """[1, T, 3, H, W] in 0..255, as decoded."""
    frames = ClipIndex.open(clips).clip(0).frames(range(NUM_FRAMES))
    return torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float()


def settings(clips: Path, out: Path, weights: Path, **changes) -> TeachConfig:
    base = TeachConfig(clips=str(clips), out=str(out), teacher="alltracker_tiny", weights=str(weights))
    return dataclasses.replace(base, gaps=(1, 2, 4), iters=1, stride=2, **changes)


def test_every_gap_comes_from_one_pass_with_what_is_hidden(clips, tmp_path, weights, network, monkeypatch):
    encoded, encode = [], AllTracker.encode
    monkeypatch.setattr(AllTracker, "encode", lambda self, video: encoded.append(video) or encode(self, video))
    summary = teach.run(settings(clips, tmp_path / "flow", weights))
    assert (summary.clips, summary.pairs, summary.quarantined) == (1, 10, 0)
    assert len(encoded) == NUM_FRAMES
    clip, video = ClipIndex.open(clips, tmp_path / "flow").clip(0), frames_of(clips)
    starts = [(0, 1), (0, 2), (0, 4), (2, 1), (2, 2)]
    assert clip.flow_pairs == sorted([*starts, *((t + gap, -gap) for t, gap in starts)])
    with torch.inference_mode():
        forward, backward = network(video, iters=1), network(video.flip(1), iters=1)
        middle = network(video[:, 2:], iters=1)
    expected = {(0, 1): (forward, 1), (0, 4): (forward, 4), (4, -4): (backward, 4), (2, 2): (middle, 2)}
    for (t, gap), (tracks, frame) in expected.items():
        assert np.abs(clip.flow(t, gap) - tracks.flow[0, frame].numpy()).max() <= 1 / 128 + 1e-3
        hidden = tracks.visconf[0, frame].prod(dim=0) <= 0.6
        np.testing.assert_array_equal(clip.occlusion(t, gap), hidden.numpy())
    (row,) = Artifact.read(tmp_path / "flow").samples().to_pylist()
    assert row["pair_consistency_px"] == [None] * 10 and None not in row["pair_occluded_share"]


def test_visibility_is_stored_with_one_direction_too(clips, tmp_path, weights):
    teach.run(settings(clips, tmp_path / "flow", weights, directions=("forward",)))
    clip = ClipIndex.open(clips, tmp_path / "flow").clip(0)
    assert [pair[1] for pair in clip.flow_pairs] == [1, 2, 4, 1, 2] and clip.occlusion(0, 4) is not None


def test_as_a_teacher_of_pairs_it_sees_two_frames(clips, weights, network):
    teacher = DenseTracksTeacher(TeacherSpec("alltracker_tiny", str(weights), iters=1))
    assert isinstance(teacher, ClipTeacher)
    video = frames_of(clips)
    first, second = (teacher.features(frame.permute(1, 2, 0).byte().numpy()) for frame in video[0, :2])
    with torch.inference_mode():
        expected = network(video[:, :2], iters=1).flow[:, 1]
    assert (teacher.flow([(first, second)]).flow_px - expected).abs().max() < 1e-4


def test_a_long_clip_needs_no_more_memory(weights):
    """What the teacher holds: features of max(gaps) + 1 frames, each let go when the window has passed."""
    import gc
    import weakref

    teacher = DenseTracksTeacher(TeacherSpec("alltracker_tiny", str(weights), iters=1))
    alive, most, plain = weakref.WeakSet(), 0, teacher.features

    def features(frame):
        nonlocal most
        gc.collect()
        most = max(most, len(alive))
        found = plain(frame)
        alive.add(found.maps)
        return found

    teacher.features = features
    frames = (np.full((24, 24, 3), t, np.uint8) for t in range(9))
    pairs = [(t, gap) for t, gap, *_ in teacher.estimates(frames, Pairing((1, 2), backward=False, stride=4))]
    assert pairs == [(0, 1), (0, 2), (4, 1), (4, 2)]
    assert most <= 3


def test_absurd_flow_is_quarantined(clips, tmp_path, weights):
    state = torch.load(weights)["model"]
    state["flow_head.2.bias"] = torch.full((2,), float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    summary = teach.run(settings(clips, tmp_path / "flow", tmp_path / "nan.pth"))
    assert (summary.pairs, summary.quarantined, summary.exit_status) == (0, 1, 3)
    (row,) = Artifact.read(tmp_path / "flow").quarantined().to_pylist()
    assert row["error_class"] == "BadFlow" and "not finite" in row["message"]


def test_tiles_are_refused(clips, tmp_path, weights):
    changes = {"too_large": "tile", "max_megapixels": 0.02}
    with pytest.raises(ValueError, match="follows pixels across the whole frame; use too_large=downscale"):
        teach.run(settings(clips, tmp_path / "flow", weights, **changes))


def test_tracks_start_in_any_frame_on_any_grid(clips, tmp_path, weights, network):
    out = tmp_path / "tracks"
    asked = TrackConfig(
        clips=str(clips), out=str(out), tracker="alltracker_tiny", weights=str(weights), iters=1, grid=9
    )
    summary = track.run(dataclasses.replace(asked, start_frames=(0, 2)))
    assert (summary.clips, summary.tracks, summary.quarantined) == (1, 162, 0)
    found = ClipIndex.open(clips, None, out).clip(0).tracks()
    video = frames_of(clips)
    with torch.inference_mode():
        later, earlier = network(video[:, 2:], iters=1), network(video[:, :3].flip(1), iters=1)
    points = found.queries[81:, 1:]
    x, y = np.rint(points).astype(int).T
    for frame, (tracks, offset) in {4: (later, 2), 3: (later, 1), 0: (earlier, 2)}.items():
        flow = tracks.flow[0, offset].numpy()
        moved = [map_coordinates(part, points.T[::-1], order=1, mode="nearest") for part in flow]
        expected = points + np.stack(moved, axis=1)
        assert np.abs(found.points_px[frame, 81:] - expected).max() <= 1 / 128 + 1e-3
        score = tracks.visconf[0, offset].prod(dim=0).numpy()[y, x]
        np.testing.assert_array_equal(found.visible[frame, 81:], score > 0.6)
    assert found.visible[2, 81:].all() and np.abs(found.points_px[2, 81:] - points).max() <= 1 / 128 + 1e-4


class Recorder:
    """Frames that note how many are asked for at once."""

    def __init__(self, num_frames: int):
        self.num_frames, self.most = num_frames, 0

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, frames: slice) -> np.ndarray:
        count = len(range(*frames.indices(self.num_frames)))
        self.most = max(self.most, count)
        return np.zeros((count, 24, 24, 3), np.uint8)


def test_a_long_clip_is_read_a_window_at_a_time(network):
    frames = Recorder(26)
    tracks = AllTrackerPredictor(network, iters=1)(frames, np.array([[20, 4, 5], [20, 7.25, 3]]))
    assert tracks.tracks.shape == (26, 2, 2) and frames.most <= 16
    assert tracks.tracks[20].tolist() == [[4, 5], [7.25, 3]]


def test_tapvid_takes_it(clips, weights):
    tracker = load_tracker(TrackerSettings("alltracker_tiny", str(weights), iters=1))
    tracker.predict.size = (48, 64)
    frames = ClipIndex.open(clips).clip(0).frames(range(3))
    tracks, visible = tracker(frames, np.array([[1, 5.2, 6.7]], np.float32))
    assert tracks.shape == (3, 1, 2) and visible.shape == (3, 1) and bool(visible[1, 0])
    assert tracks[1, 0].tolist() == pytest.approx([5.2, 6.7])
