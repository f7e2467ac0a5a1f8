"""Flow networks learn from stored flow or from frames alone, and their runs serve as teachers."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from kinema.configs import EmbedConfig, EvaluateConfig, FlowNetworkConfig, LoaderConfig, TeachConfig, TrainConfig
from kinema.models.flow.geometry import warp
from kinema.models.flow.raft.network import raft_small
from kinema.pipelines import embed, teach, train
from kinema.pipelines.evaluate import stage as evaluate
from kinema.pipelines.loader import ClipIndex, Skip
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.train.loop import TrainJob, train_worker
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.recipes.flow import FlowRecipe
from kinema.pipelines.train.stop import Stop

SCENES = [Scene(seed=s, height=144, width=160, num_frames=3, speed_px=4.0) for s in range(4)]
SMALL = FlowNetworkConfig(crop=(128, 128), iters=3, jitter=0.1)


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow_training")
    clips = write_scene_clips(SCENES, folder / "clips")
    write_scene_flow(SCENES, clips, folder / "flow", gaps=(1, -1))
    return folder


def config(data, tmp_path, model, **changes) -> TrainConfig:
    base = TrainConfig(
        clips=str(data / "clips"),
        flow=str(data / "flow"),
        out=str(tmp_path / "run"),
        model=model,
        settings=SMALL,
        loader=LoaderConfig(num_workers=0),
        batch_size=2,
        steps=2,
        lr=4e-4,
        pictures_every=0,
    )
    return dataclasses.replace(base, **changes)


def learn(settings: TrainConfig) -> list[dict]:
    """The loop in this process; the points of metrics.jsonl."""
    recipe = train.make_recipe(settings)
    recipe.check()
    out = train.Path(settings.out)
    out.mkdir(parents=True)
    job = TrainJob(settings, recipe, train.ClipLoader(settings, recipe), out, {})
    train_worker(job, Place(), Stop())
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_samples_are_crops_whose_flow_explains_them(data, flip):
    recipe = FlowRecipe("raft_small", dataclasses.replace(SMALL, flip=flip))
    index = ClipIndex.open(data / "clips", data / "flow")
    for number in range(len(index)):
        sample = recipe.read_sample(index.clip(number), np.random.default_rng(number))
        assert sample["image1"].shape == (3, 128, 128) and sample["flow_px"].shape == (2, 128, 128)
        first, second = (sample[name][None].float() for name in ("image1", "image2"))
        warped, inside = warp(second, sample["flow_px"][None])
        moved, still = ((a - first).abs().mean(1)[inside].mean() for a in (warped, second))
        assert moved < 0.6 * still


def test_pixels_that_are_not_known_or_hidden_do_not_count(data, tmp_path):
    index = ClipIndex.open(data / "clips", data / "flow")
    clip = index.clip(0)
    recipe = FlowRecipe("raft_small", dataclasses.replace(SMALL, visible_only=True, flip=0.0))
    hidden = [~recipe.read_sample(clip, np.random.default_rng(s))["valid"].bool().numpy() for s in range(6)]
    assert 0 < np.mean(hidden) < 0.5
    assert recipe.read_sample(clip, np.random.default_rng(0))["valid"].shape == (128, 128)
    large = FlowRecipe("raft_small", dataclasses.replace(SMALL, crop=(256, 128)))
    reason = Skip("frames smaller than flow_network.crop=[256,128]: lower it")
    assert large.read_sample(clip, np.random.default_rng(0)) == reason


def mean_error_px(network) -> float:
    """Over all scenes, at the resolution and with the refinements of the training."""
    errors = []
    for scene in SCENES:
        first, second = (torch.from_numpy(f).permute(2, 0, 1)[None].float() / 255 for f in list(scene.frames())[:2])
        with torch.inference_mode():
            flow = network(first, second, iters=3)[0].numpy()
        errors.append(np.hypot(*(flow - scene.motion(0, 1)[0])).mean())
    return float(np.mean(errors))


def test_published_weights_are_tuned_to_other_footage_then_teach_and_are_evaluated(data, tmp_path, shared_data):
    published = str(shared_data / "weights" / "raft-small.pth")
    learn(config(data, tmp_path, "raft_small", steps=24, weights=published, lr=2e-4, seed=1))
    before, after = mean_error_px(raft_small(weights=published)), mean_error_px(train.load_model(tmp_path / "run"))
    assert after < 0.93 * before
    out = tmp_path / "flow"
    settings = TeachConfig(clips=str(data / "clips"), out=str(out), teacher="raft_small", iters=3, gaps=(1,))
    teach.run(dataclasses.replace(settings, weights=str(tmp_path / "run")))
    clip = ClipIndex.open(data / "clips", out).clip(0)
    network = train.load_model(tmp_path / "run")
    first, second = (torch.from_numpy(f).permute(2, 0, 1)[None].float() / 255 for f in clip.frames([0, 1]))
    with torch.inference_mode():
        expected = network(first, second, iters=3)[0].numpy()
    np.testing.assert_allclose(clip.flow(0, 1), expected, atol=1 / 128 + 1e-3)
    middlebury = str(shared_data / "flow" / "middlebury")
    asked = EvaluateConfig(model=str(tmp_path / "run"), benchmark="middlebury", data=middlebury, iters=2)
    assert 0 < evaluate.run(asked).metrics["middlebury_epe"] < 20
    with pytest.raises(ValueError, match="has its own; leave it out"):
        evaluate.run(dataclasses.replace(asked, weights=published))
    with pytest.raises(ValueError, match="is a RAFT-small, which gives flow; embed takes"):
        embed.run(EmbedConfig(model=str(tmp_path / "run"), clips=str(data / "clips"), out=str(tmp_path / "features")))
    with pytest.raises(ValueError, match="is a RAFT-small, which gives flow; benchmark=davis takes"):
        evaluate.run(EvaluateConfig(model=str(tmp_path / "run"), data=str(shared_data / "davis" / "DAVIS")))


@pytest.mark.parametrize("model", ["sea_raft_s", "smurf", pytest.param("waft", marks=pytest.mark.slow)])
def test_the_other_losses_run_through_the_loop(data, tmp_path, model):
    settings = dataclasses.replace(SMALL, iters=2)
    if model == "smurf":
        settings = dataclasses.replace(settings, crop=(144, 160), self_supervision=0.3, self_supervision_crop=8)
    points = learn(config(data, tmp_path, model, settings=settings, batch_size=1, log_every=1, lr=1e-5))
    assert len(points) == 2 and all(np.isfinite(point["loss"]) for point in points)
    wanted = {"census", "smooth2", "self_supervision"} if model == "smurf" else {"epe", "px1", "px3"}
    assert wanted <= set(points[0])


def test_smurf_needs_no_flow_and_the_others_say_that_they_do(data, tmp_path):
    assert FlowRecipe("smurf", SMALL).needs == ()
    with pytest.raises(ValueError, match="train.flow is empty and raft_small needs it"):
        train.run(config(data, tmp_path, "raft_small", flow=""))
    with pytest.raises(ValueError, match="leaves 0 pixels"):
        FlowNetworkConfig(crop=(128, 128), self_supervision=0.3)
