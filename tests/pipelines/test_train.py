"""`kinema train` on rendered scenes with exact flow, with a tiny backbone, in this process."""

import dataclasses
import fcntl
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.configs import FlowFeatConfig, LoaderConfig, TrainConfig
from kinema.models.backbones import vision_transformer
from kinema.models.flow.geometry import resize_flow
from kinema.pipelines import train
from kinema.pipelines.errors import StageError
from kinema.pipelines.loader import ClipIndex, Skip
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.flow_error import flow_error
from kinema.pipelines.train.meter import read_metrics
from kinema.pipelines.train.recipes.flowfeat import FlowFeatRecipe, square_flow, square_image
from kinema.pipelines.train.stop import Stop


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """One MLflow store for all runs: making one takes seconds."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch, database):
    """A ViT of width 32 in place of DINO S/16, one thread, one MLflow store, and no Ray."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = dataclasses.replace(vision_transformer.CONFIGS["dino_vits16"], width=32, num_heads=2)
    monkeypatch.setitem(vision_transformer.CONFIGS, "dino_vits16", small)
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes():
    return [Scene(seed, height=72, width=96, num_frames=5) for seed in range(6)]


@pytest.fixture(scope="module")
def data(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    clips = write_scene_clips(scenes, folder / "clips")
    write_scene_flow(scenes, clips, folder / "flow")
    return str(folder / "clips"), str(folder / "flow")


def config(data, run, **changes) -> TrainConfig:
    defaults = dict(
        clips=data[0], flow=data[1], out=str(run), steps=6, batch_size=4, lr=1e-3, checkpoint_every=4, log_every=2,
        pictures_every=3, seed=1, use_gpu="no", loader=LoaderConfig(num_workers=0),
        settings=FlowFeatConfig(variant="dino_vits16_yt", resize=64, crop=32, ema_every=2),
    )  # fmt: skip
    return TrainConfig(**(defaults | changes))


def same_model(a, b) -> bool:
    files = [checkpoint.latest_checkpoint(run) / "model.safetensors" for run in (a, b)]
    return files[0].read_bytes() == files[1].read_bytes()


def test_a_run_leaves_checkpoints_metrics_pictures_and_an_mlflow_run(data, tmp_path, database):
    seen = []
    summary = train.run(config(data, tmp_path / "run"), report=seen.append)
    assert summary.step == 6 and math.isfinite(summary.loss) and summary.exit_status == 0
    assert set(dataclasses.asdict(summary)) >= {"step", "loss", "samples_per_second", "checkpoint", "run_id"}
    points = read_metrics(tmp_path / "run")
    assert [p["step"] for p in points] == [2, 4, 6]
    assert all(p["loss"] == pytest.approx(0.1 * p["flow_loss"] + p["edge_loss"], rel=1e-5) for p in points)
    assert len(list((tmp_path / "run/pictures").glob("*.png"))) == 2
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["run_id"] == summary.run_id and set(record["inputs"]) == {"clips", "flow"}

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    logged = client.get_run(summary.run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.params["train.flowfeat.crop"] == "32"
    assert logged.data.tags["data.flow.hash"] == record["inputs"]["flow"]["hash"]
    assert [m.step for m in client.get_metric_history(summary.run_id, "loss")] == [2, 4, 6]
    assert len(client.list_artifacts(summary.run_id, "pictures")) == 2

    again = train.run(config(data, tmp_path / "run"))
    assert (again.step, again.loss, again.run_id) == (6, summary.loss, summary.run_id) and again.seconds < 5


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed_equals_undisturbed(data, tmp_path, monkeypatch, workers):
    """Stopped at step 4: sample 16 of an epoch of 6 clips; the second half reads with other workers."""
    train.run(config(data, tmp_path / "whole"))
    stops = []
    monkeypatch.setattr(Stop, "watch", lambda self, callback: stops.append(self))
    after_step = FlowFeatRecipe.after_step

    def stop_at_4(self, module, step):
        after_step(self, module, step)
        if step == 4:
            stops[-1].request("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(FlowFeatRecipe, "after_step", stop_at_4)
        with pytest.raises(train.Stopped, match="stopped by SIGTERM at step 4 of 6; .* the same command goes on") as e:
            train.run(config(data, tmp_path / "parts"))
    assert e.value.summary.step == 4
    train.run(config(data, tmp_path / "parts", loader=LoaderConfig(num_workers=workers)))
    assert same_model(tmp_path / "whole", tmp_path / "parts")
    names = ("step", "loss", "grad_norm")
    points = [[[p[n] for n in names] for p in read_metrics(tmp_path / run)] for run in ("whole", "parts")]
    assert points[0] == points[1]


def test_longer_training_goes_on_and_other_settings_or_data_are_refused(data, scenes, tmp_path):
    train.run(config(data, tmp_path / "run", steps=2))
    assert train.run(config(data, tmp_path / "run", steps=3, log_every=1)).step == 3
    with pytest.raises(ValueError, match=r"flowfeat.gap: 2 in the checkpoint, 1 now"):
        other = FlowFeatConfig(variant="dino_vits16_yt", resize=64, crop=32, ema_every=2, gap=1)
        train.run(config(data, tmp_path / "run", steps=4, settings=other))
    clips = write_scene_clips(scenes[:3], tmp_path / "clips")
    write_scene_flow(scenes[:3], clips, tmp_path / "flow")
    with pytest.raises(ValueError, match=r"data.clips: '\w+' in the checkpoint, '\w+' now"):
        train.run(config((str(tmp_path / "clips"), str(tmp_path / "flow")), tmp_path / "run", steps=4))


def test_a_run_folder_in_use_is_refused(data, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StageError, match="is being trained by another process"):
            train.run(config(data, tmp_path / "run"))


def test_paths_do_not_depend_on_the_working_folder(data, tmp_path, monkeypatch):
    """Ranks run in another folder than the driver."""
    monkeypatch.chdir(Path(data[0]).parent)
    cfg = train.absolute_paths(config(("clips", "flow"), "run", weights="w.pth"))
    assert (cfg.clips, cfg.flow) == data and Path(cfg.out).is_absolute() and Path(cfg.weights).is_absolute()
    assert train.absolute_paths(config(("s3://b/clips", "flow"), "run")).clips == "s3://b/clips"


def test_the_trained_model_comes_back_and_can_start_another_run(data, tmp_path):
    summary = train.run(config(data, tmp_path / "run"))
    image = torch.rand(1, 3, 32, 32)
    averaged, online = train.load_model(tmp_path / "run"), train.load_model(summary.checkpoint, ema=False)
    saved = checkpoint.read_tensors(checkpoint.latest_checkpoint(tmp_path / "run"))
    name = "scratch.output_conv1.2.weight"
    name = name if f"decoder.{name}" in saved else next(n[8:] for n in saved if n.startswith("decoder.scratch"))
    assert torch.equal(averaged.decoder.state_dict()[name], saved[f"decoder_ema.ema_model.{name}"])
    assert torch.equal(online.decoder.state_dict()[name], saved[f"decoder.{name}"])
    with torch.no_grad():
        assert not torch.equal(averaged(image)[1], online(image)[1])
    cfg = config(data, tmp_path / "next", weights=str(tmp_path / "run"))
    start = train.build_model(cfg)
    assert torch.equal(start.decoder.state_dict()[name], averaged.decoder.state_dict()[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": ""}, "train.out is empty"),
        ({"out": "s3://me:secretsecret@bucket/run"}, "carries credentials"),
        ({"clips": ""}, "train.clips is empty; name the clips artifact"),
        ({"flow": ""}, "train.flow is empty and flowfeat needs it"),
        ({"settings": FlowFeatConfig(variant="dino_vits16_yt", crop=40)}, "crop=40 is no multiple .* use 32 or 48"),
        ({"settings": FlowFeatConfig(variant="dino")}, "variant='dino' is not known; use one of"),
        ({"weights": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.run(config(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_no_usable_sample_names_the_reasons(scenes, tmp_path):
    """Clips whose flow is the same everywhere teach nothing."""
    still = [Scene(9, height=32, width=32, num_frames=3, num_objects=0, camera="still")]
    clips = write_scene_clips(still, tmp_path / "clips")
    write_scene_flow(still, clips, tmp_path / "flow")
    with pytest.raises(Exception, match="constant teacher flow") as caught:
        train.run(config((str(tmp_path / "clips"), str(tmp_path / "flow")), tmp_path / "run"))
    assert type(caught.value).__name__ in ("StageError", "ValueError")


def test_samples_hold_the_centre_square_of_frame_and_flow(data, scenes):
    index = ClipIndex.open(*data)
    clip = index.clip(0)
    recipe = FlowFeatRecipe(FlowFeatConfig(variant="dino_vits16_yt", resize=72, crop=32, gap=1, time_flip=False))
    sample = recipe.read_sample(clip, np.random.default_rng(0))
    assert not isinstance(sample, Skip)
    assert sample["image"].shape == (3, 72, 72) and sample["image"].dtype == torch.uint8
    frames = clip.frames(range(clip.num_frames)).transpose(0, 3, 1, 2)
    cut = [int(np.abs(f[:, :, 12:84].astype(int) - sample["image"].numpy()).max()) for f in frames]
    t = int(np.argmin(cut))
    assert cut[t] <= 1
    exact = torch.from_numpy(clip.flow(t, 1))[:, :, 12:84]
    torch.testing.assert_close(sample["flow"], resize_flow(exact, 32, 32))
    for crop in (sample["crop1"], sample["crop2"]):
        scale = crop[0, 0]
        assert 0.5 <= scale <= 0.75 and crop[1, 1] == scale and crop[0, 1] == crop[1, 0] == 0
        assert abs(crop[0, 2]) <= 1 - scale + 0.02 and abs(crop[1, 2]) <= 1 - scale + 0.02


class Spy:
    """A clip that notes which gaps it is asked for."""

    def __init__(self, clip):
        self.clip, self.gaps = clip, set()
        self.flow_pairs, self.frames = clip.flow_pairs, clip.frames

    def flow_pair(self, t, gap):
        self.gaps.add(gap)
        return self.clip.flow_pair(t, gap)


@pytest.mark.parametrize(("flip", "gaps"), [(True, {1, -1}), (False, {1})])
def test_drawn_pairs_follow_gap_and_time_flip(data, flip, gaps):
    spy = Spy(ClipIndex.open(*data).clip(1))
    recipe = FlowFeatRecipe(FlowFeatConfig(variant="dino_vits16_yt", resize=32, crop=32, gap=1, time_flip=flip))
    for seed in range(20):
        recipe.read_sample(spy, np.random.default_rng(seed))
    assert spy.gaps == gaps


def test_same_rng_same_sample(data):
    clip = ClipIndex.open(*data).clip(2)
    recipe = FlowFeatRecipe(FlowFeatConfig(variant="dino_vits16_yt", resize=64, crop=32))
    one, two = (recipe.read_sample(clip, np.random.default_rng(5)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_squares_of_odd_sizes():
    image = torch.arange(5 * 7 * 3, dtype=torch.uint8).view(5, 7, 3)
    assert torch.equal(square_image(image, 5), image[:, 1:6].permute(2, 0, 1))
    flow = torch.randn(2, 9, 5)
    assert torch.equal(square_flow(flow, 5), flow[:, 2:7])
    constant = torch.tensor([3.0, -6.0]).view(2, 1, 1).expand(2, 30, 40)
    torch.testing.assert_close(square_flow(constant, 10), constant[:, :10, :10] / 3)


class Oracle(torch.nn.Module):
    """Features that are the picture itself, which in these tests shows the flow; or the same everywhere."""

    def __init__(self, knows):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.knows = knows

    def forward(self, x):
        return x, x * self.knows * 100


def picture_of(flow):
    """Red and green are the two components."""
    low, high = flow.min(axis=(1, 2), keepdims=True), flow.max(axis=(1, 2), keepdims=True)
    shown = np.concatenate([(flow - low) / (high - low) * 255, np.zeros_like(flow[:1])])
    return shown.round().astype(np.uint8).transpose(1, 2, 0)


def test_flow_error_is_small_for_features_that_know_the_flow_and_that_of_a_constant_for_others(scenes):
    flow = scenes[0].flow_px(0, 2)
    knows, constant = (
        flow_error(Oracle(k), [picture_of(flow)], [flow], resize=72, crop=64, ridge_alpha=1e-4) for k in (1, 0)
    )
    assert knows.epe_px < 0.05 * constant.epe_px
    assert constant.epe_px == pytest.approx(constant.constant_epe_px, rel=1e-3)
    assert 0.3 < constant.epe_px / np.linalg.norm(flow - flow.mean((1, 2), keepdims=True), axis=0).mean() < 2
    doubled = flow_error(Oracle(1), [picture_of(flow)], [2 * flow], resize=72, crop=64, ridge_alpha=1e-4)
    assert doubled.epe_px == pytest.approx(2 * knows.epe_px, rel=0.01)


def test_flow_error_leaves_out_what_is_not_valid(scenes):
    flow = scenes[0].flow_px(0, 2)
    broken, valid = flow.copy(), np.ones(flow.shape[1:], bool)
    broken[:, 20:40, 30:60] = 500.0
    valid[20:40, 30:60] = False
    picture = picture_of(flow)
    error = flow_error(Oracle(1), [picture], [broken], valid=[valid], resize=72, crop=64, ridge_alpha=1e-4)
    assert error.epe_px < 0.2
    broken[:, 20:40, 30:60] = np.nan
    unknown = flow_error(Oracle(1), [picture], [broken], resize=72, crop=64, ridge_alpha=1e-4)
    assert unknown == error


def test_flow_error_refuses_what_it_cannot_judge(scenes):
    frame, flow = scenes[0].frame(0), scenes[0].flow_px(0, 1)
    with pytest.raises(ValueError, match="1 frames and 0 flows"):
        flow_error(Oracle(1), [frame], [])
    with pytest.raises(ValueError, match="no pixel has known flow"):
        flow_error(Oracle(1), [frame], [flow], valid=[np.zeros(flow.shape[1:], bool)], resize=72, crop=32)
