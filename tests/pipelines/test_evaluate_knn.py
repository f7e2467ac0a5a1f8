"""Benchmark `knn`: neighbours, labelled videos, baselines, and the table they make."""

import csv

import av
import numpy as np
import pytest
import torch

from kinema.configs import DisMoConfig, EvaluateConfig, KNNConfig, TrainConfig
from kinema.configs.load import to_mapping
from kinema.pipelines.evaluate import stage
from kinema.pipelines.evaluate.knn.embedders import flow_histogram
from kinema.pipelines.evaluate.knn.neighbours import knn_accuracy
from kinema.pipelines.evaluate.knn.videos import find_labelled
from kinema.pipelines.scenes.motion_classes import LABELS, MOTIONS, MotionClip, motion_clips
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.video.at_rate import read_video


def clip(motion="right", seed=3, **options):
    return MotionClip(seed, motion, "square", "checks", "red", **options)


def object_masks(frames):
    """Pixels that differ from the ground, which the corner shows."""
    return np.abs(frames.astype(int) - frames[0, 0, 0].astype(int)).sum(-1) > 24


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_translations_go_where_they_say(motion, axis, sign):
    masks = object_masks(clip(motion).frames())
    centres = np.array([np.argwhere(mask).mean(axis=0) for mask in masks])
    steps = np.diff(centres, axis=0)
    assert (sign * steps[:, axis] > 1).all() and (np.abs(steps[:, 1 - axis]) < 0.6).all()


def test_zooms_grow_and_shrink_and_rotations_do_neither():
    area = {motion: object_masks(clip(motion).frames()).sum((1, 2)) for motion in MOTIONS}
    assert (np.diff(area["zoom_in"]) > 0).all() and (np.diff(area["zoom_out"]) < 0).all()
    assert area["rotate"].std() < 0.05 * area["rotate"].mean()
    turning = clip("rotate").frames().astype(int)
    assert np.abs(np.diff(turning, axis=0)).mean() > 1


def test_shaking_comes_and_goes():
    masks = object_masks(clip("shake").frames())
    centres = np.array([np.argwhere(mask).mean(axis=0) for mask in masks])
    steps = np.diff(centres, axis=0)
    assert np.linalg.norm(centres.mean(0) - centres[0]) < 10
    assert (np.linalg.norm(steps, axis=1) > 3).all() and ((steps[1:] * steps[:-1]).sum(1) < 0).all()


def test_appearance_does_not_depend_on_the_motion():
    """The middle moment of clips that differ in motion alone shows the same object in the same colours."""
    for motion in ("left", "zoom_in", "rotate"):
        a, b = clip(motion, num_frames=11).frames()[5], clip("right", num_frames=11).frames()[5]
        assert np.abs(a.astype(int) - b.astype(int)).mean() < 1


def test_close_ups_show_larger_objects_that_go_further():
    for motion in ("rotate", "left"):
        far, near = (object_masks(clip(motion, close_up=close, num_frames=7).frames()) for close in (False, True))
        assert near[3].sum() > 2 * far[3].sum()
    steps = []
    for close in (False, True):
        masks = object_masks(clip("right", close_up=close, num_frames=3).frames())
        steps.append(np.diff([np.argwhere(mask)[:, 1].mean() for mask in masks]).mean())
    assert steps[1] > 1.4 * steps[0] > 1


def test_labels_are_balanced_and_independent():
    clips = list(motion_clips(960, seed=0))
    table = {name: np.array([getattr(c, name) for c in clips]) for name in LABELS}
    assert [int((table["motion"] == m).sum()) for m in MOTIONS] == [120] * 8
    for name, values in LABELS.items():
        for value in values:
            share = (table[name] == value).mean()
            for motion in MOTIONS if name != "motion" else ():
                assert abs((table[name][table["motion"] == motion] == value).mean() - share) < 0.17
    assert len({c.seed for c in clips}) == 960
    assert np.array_equal(
        clips[7].frames(), next(c for i, c in enumerate(motion_clips(960, seed=0)) if i == 7).frames()
    )


def test_neighbours_vote_by_cosine_and_leave_the_item_out():
    angles = torch.tensor([0.0, 5, 10, 120, 125, 130, 240, 245, 250]) * torch.pi / 180
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.linspace(1, 9, 9)[:, None] ** 0
    labels = list("aaabbbccc")
    assert knn_accuracy(embeddings, labels, 2) == 1.0
    assert knn_accuracy(embeddings, list("abcabcabc"), 2) == 0.0
    # Ties go to the nearest: the second neighbour has another label.
    line = torch.tensor([[0.0, 1], [0.02, 1], [1, 0.1], [1, 0.0]])
    assert knn_accuracy(line, ["a", "a", "b", "b"], 2) == 1.0
    with pytest.raises(ValueError, match=r"knn.k=9 neighbours of 9 items"):
        knn_accuracy(embeddings, labels, 9)


def test_the_flow_histogram_sees_speed_and_not_direction():
    embed = flow_histogram()
    still = np.repeat(clip().frames()[:1], 4, axis=0)
    assert embed(still)[0] == 1.0
    moving = clip("right", num_frames=4).frames()
    there, back = embed(moving), embed(np.ascontiguousarray(moving[:, :, ::-1]))
    assert there[0] < 0.5 and (there - back).abs().sum() < 0.5 * (there - embed(still)).abs().sum()


def write_video(path, frames, fps):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of two videos each at 12 frames a second, and a file that is none."""
    root = tmp_path_factory.mktemp("actions")
    for motion in ("left", "zoom_in"):
        (root / motion).mkdir()
        for seed in (1, 2):
            write_video(root / motion / f"{seed}.mp4", clip(motion, seed, num_frames=20).frames(), 12)
    (root / "left" / "broken.mp4").write_bytes(b"no video at all")
    return root


def test_videos_are_read_at_the_rate_asked_for(folder):
    frames = read_video(folder / "left" / "1.mp4", 6.0, 32, 10.0)
    assert frames.shape == (10, 32, 32, 3)
    wanted = clip("left", 1, num_frames=20).frames()[::2].astype(int).reshape(10, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(frames - wanted).mean() < 4
    assert len(read_video(folder / "left" / "1.mp4", 6.0, 32, 0.5)) == 4


def test_labels_of_folders_and_of_a_table(folder, tmp_path):
    found = find_labelled(folder)
    assert [labels["action"] for labels in found.labels] == ["left"] * 3 + ["zoom_in"] * 2
    assert len(find_labelled(folder, max_videos=2).paths) == 2
    with (tmp_path / "labels.csv").open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerows([["file", "action", "person"], ["a.mp4", "run", "x"], ["b.mp4", "walk", "y"]])
    assert find_labelled(tmp_path).labels[1] == {"action": "walk", "person": "y"}
    (tmp_path / "labels.csv").write_text("file,action\na.mp4,\nb.mp4,run\n")
    with pytest.raises(ValueError, match=r"a.mp4 lack a label"):
        find_labelled(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        find_labelled(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    config = TrainConfig(
        model="dismo", settings=DisMoConfig(preset="dismo_tiny", autoencoder="pixels", pixels_per_latent=4, frame_px=32)
    )
    meta = {"identity": {}, "train_config": to_mapping(config), "loss": 1.0, "samples_per_second": 1.0}
    state = make_recipe(config).build().state_dict()
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoint.save_checkpoint(folder, 1, state, {}, meta, keep=1)
    return folder


def test_the_table(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    rendered = stage.run(
        EvaluateConfig(model=str(run), benchmark="knn", data="scenes", knn=KNNConfig(num_videos=16, k=3))
    )
    for label in LABELS:
        chance = rendered.metrics[f"knn_{label}_chance"]
        assert chance == 1 / len(LABELS[label])
        for which in ("", "_flow_histogram", "_untrained_frames"):
            accuracy = rendered.metrics[f"knn_{label}{which}"]
            assert 0 <= accuracy <= 1
            assert rendered.metrics[f"knn_{label}{which}_over_chance"] == pytest.approx(accuracy / chance)
    files = stage.run(
        EvaluateConfig(model=str(run), benchmark="knn", data=str(folder), knn=KNNConfig(k=1, baselines=False))
    )
    assert files.metrics["knn_videos"] == 4 and files.metrics["knn_left_out"] == 1
    assert files.metrics["knn_action_chance"] == 0.5
    assert "broken.mp4 is left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="benchmark=knn takes what gives motion embeddings: dismo"):
        stage.run(EvaluateConfig(model="raft_small", benchmark="knn", data="scenes"))
