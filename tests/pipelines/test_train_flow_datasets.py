"""Every data set with known flow is learned from: packed by its layout, two steps with a tiny DinoFlow."""

from pathlib import Path

import numpy as np
import pytest

from kinema.configs import LoaderConfig, TrainConfig, load_stage
from kinema.configs.models.dinoflow import DinoFlowConfig
from kinema.pipelines import shard, train
from kinema.pipelines.flow_datasets import LAYOUTS
from kinema.pipelines.flow_datasets.tiny import write_tiny
from kinema.pipelines.train.loop import TrainJob, train_worker
from kinema.pipelines.train.meter import read_metrics
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.stop import Stop

_SPARSE = ("kitti2012", "kitti2015", "hd1k")


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_steps_on_the_pairs_of(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    folder = write_tiny(name, tmp_path / "data")
    places = [f"videos={folder}", f"layout={name}", f"out={tmp_path}/clips", "dataset.partial=true"]
    packed = shard.run(load_stage("shard", None, places), report=lambda line: None)
    settings = DinoFlowConfig(
        *("nano_vit8", "", False, 8), crop=(32, 48), gap=2, augment="sparse" if name in _SPARSE else "dense"
    )
    config = TrainConfig(
        *(f"{tmp_path}/clips",), flow=f"{tmp_path}/flow/truth", out=f"{tmp_path}/run", model="dinoflow",
        settings=settings, loader=LoaderConfig(num_workers=0), batch_size=2, steps=2, log_every=1, pictures_every=0,
    )  # fmt: skip
    recipe = train.make_recipe(config)
    Path(config.out).mkdir()
    train_worker(TrainJob(config, recipe, train.ClipLoader(config, recipe), Path(config.out), {}), Place(), Stop())
    steps = read_metrics(Path(config.out))
    assert packed.pairs > 0 and [row["step"] for row in steps] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
