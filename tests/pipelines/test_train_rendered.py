"""`clips=rendered`: training renders what it learns from, resumes exactly, and says what cannot learn so."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.configs import LoaderConfig, TrainConfig, load_stage
from kinema.configs.rendered import RenderedSourceConfig
from kinema.configs.required import required
from kinema.pipelines import train
from kinema.pipelines.loader import Loader
from kinema.pipelines.loader.reader import BatchReader
from kinema.pipelines.loader.rendered import RenderedIndex
from kinema.pipelines.scenes.rendered import RenderedShot
from kinema.pipelines.train import checkpoint
from kinema.pipelines.workflow import resolve_stage

SMALL = ["rendered.height=64", "rendered.width=80", "rendered.count=6", "loader.num_workers=0", "batch_size=2"]
MODELS = {
    "dinoflow": ["dinoflow.backbone=nano_vit8", "dinoflow.width=8", "dinoflow.freeze_encoder=false"],
    "raft_small": ["flow_network.crop=[128,128]", "flow_network.iters=1", "flow_network.augment=dense"],
}
CROPS = {"dinoflow": ["dinoflow.crop=[32,48]"], "raft_small": []}


@pytest.fixture(autouse=True)
def serial(monkeypatch, tmp_path):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")


def config(*settings: str) -> TrainConfig:
    return load_stage("train", None, ["clips=rendered", "log_every=1", "pictures_every=0", *SMALL, *settings])


def tensors(folder):
    return checkpoint.read_tensors(checkpoint.latest_checkpoint(folder))


@pytest.mark.parametrize("model", MODELS)
def test_two_steps_and_a_resume_equal_three_at_once(model, tmp_path):
    settings = [f"model={model}", *MODELS[model], *CROPS[model]]
    whole = train.run(config(*settings, "steps=3", f"out={tmp_path}/whole"))
    assert whole.step == 3 and np.isfinite(whole.loss)
    train.run(config(*settings, "steps=2", f"out={tmp_path}/parts"))
    parts = train.run(config(*settings, "steps=3", f"out={tmp_path}/parts"))
    assert parts.loss == whole.loss
    expected = tensors(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in tensors(tmp_path / "parts").items())
    with pytest.raises(ValueError, match="data.clips"):
        train.run(config(*settings, "steps=4", f"out={tmp_path}/parts", "rendered.speed_px=9"))


def test_workers_and_ranks_render_what_one_process_does():
    settings = config("model=dinoflow", *MODELS["dinoflow"], *CROPS["dinoflow"])
    recipe = train.make_recipe(settings)
    index = train.ClipLoader(settings, recipe).index()

    def batches(**place):
        loader = Loader(index, recipe.read_sample, LoaderConfig(num_workers=0), batch_size=2, seed=3, **place)
        found = [batch for batch, _ in zip(iter(loader), range(2), strict=False)]
        loader.close()
        return found, loader

    (first, second), loader = batches()
    reader = BatchReader(index, recipe.read_sample, loader.order)
    there = pickle.loads(pickle.dumps(reader))  # what a worker gets
    again = there[[[2, 3]]].batches[0]
    assert again["key"] == second["key"]
    assert all(torch.equal(again[name], second[name]) for name in ("image1", "image2", "flow_px", "valid"))
    halves = [batches(rank=rank, world_size=2)[0][0]["key"] for rank in (0, 1)]
    assert halves[0] + halves[1] == first["key"] + second["key"]


def test_held_out_shots_are_others_than_those_learned_from():
    index = RenderedIndex.of(RenderedSourceConfig(count=7, height=32, width=32))
    learned, judged = index.split(3)
    assert (len(learned), len(judged)) == (5, 2) and set(learned.keys) | set(judged.keys) == set(index.keys)
    assert "5 rendered shots" in learned.describe() and "2 held out" in learned.describe()
    shot = RenderedShot(index.settings, 0, 5)
    assert np.array_equal(judged.clip(1).frames([0])[0], shot.frame(0)) and judged.clip(1).key == index.keys[5]


def test_what_is_rendered_is_known_by_a_hash(tmp_path):
    usual = RenderedSourceConfig(count=5)
    found = {RenderedIndex.of(usual).content_hash()}
    for change in ({"seed": 1}, {"count": 6}, {"speed_px": 5.0}):
        found.add(RenderedIndex.of(replace(usual, **change)).content_hash())
    assert len(found) == 4
    with pytest.raises(ValueError, match="holds no image"):
        RenderedIndex.of(replace(usual, textures=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model=fpt"], "model=fpt learns from tracks; store rendered clips first: kinema shard layout=rendered"),
        (["model=dismo"], "model=dismo learns from longer clips; store rendered clips first"),
        (["model=dinoflow", "flow=somewhere"], "is for stored clips, and clips=rendered has none; leave flow out"),
        (["model=dinoflow", "loader.mode=stream"], "loader.mode=stream is for stored clips"),
        (["model=dinoflow", "loader.pairs.skip_static=true"], "loader.pairs"),
        (["model=dinoflow", "clips=elsewhere", "flow=x"], r"rendered\.\* has no effect with clips=.*elsewhere"),
    ],
)
def test_what_rendered_clips_cannot_do_is_said_before_anything_starts(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.run(config(*settings, f"out={tmp_path}/run"))
    assert not (tmp_path / "run").exists()


def test_nothing_but_a_place_for_the_run_is_required():
    assert required("train", config("model=dinoflow")) == ("clips", "out")
    workflow = load_stage("run", None, ["stages=[train]", "train.clips=rendered", "train.model=raft_small"])
    section = resolve_stage(workflow, "train", Path(workflow.workspace), {})  # as `kinema run` fills it in
    assert (section.clips, section.flow) == ("rendered", "")
