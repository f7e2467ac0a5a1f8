"""A curriculum in one workflow file: phases differ in what they say, and train on from one another."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kinema.configs import load_stage
from kinema.pipelines import train, workflow
from kinema.pipelines.flow_datasets.tiny import write_tiny
from kinema.pipelines.phases import phase_config
from kinema.pipelines.train import checkpoint

SMALL = ["backbone=nano_vit8", "width=8", "freeze_encoder=false", "crop=[32,48]"]


def test_phases_are_the_file_with_what_they_say():
    config = load_stage("run", "dinoflow_c_t.yaml", ["phases.chairs.shard.videos=/chairs", "workspace=/w"])
    chairs, things = phase_config(config, "chairs", ""), phase_config(config, "things", "/w/chairs/runs/x")
    assert (chairs.shard.videos, chairs.shard.layout, chairs.workspace) == ("/chairs", "flyingchairs", "/w/chairs")
    assert chairs.train.settings.augmentation.scale_log2 == (-0.1, 1.0)
    assert things.train.settings.augmentation.scale_log2 == (-0.4, 0.8)
    assert chairs.train.settings.crop == things.train.settings.crop == (512, 512)
    assert chairs.train.weights == "" and things.train.weights == "/w/chairs/runs/x"
    # Two epochs of warm-up and twelve in all, of 22,232 pairs in batches of 48.
    assert chairs.train.warmup_steps == round(2 * 22232 / 48) and chairs.train.steps == 22232 * 12 // 48 - 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.things.train.stepz=3", "phases.things: .*unknown key train.stepz; did you mean train.steps"),
        ("phases.things.train=3", "phases.things: .*section"),
        ("phases.things=3", "phases.things=3 is a section"),
        ("phases.things.phases.more.name=x", "phases.things has phases of its own"),
    ],
)
def test_a_wrong_phase_is_refused_before_the_first_begins(override, message, tmp_path):
    config = load_stage("run", "dinoflow_c_t.yaml", [override, f"workspace={tmp_path / 'w'}"])
    with pytest.raises(ValueError, match=message):
        workflow.run(config)
    assert not (tmp_path / "w").exists()


def test_things_train_on_from_chairs(tmp_path, monkeypatch):
    """Both data sets from their published layouts to clips and flow, and a run from the other's weights."""
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for name in ("flyingchairs", "flyingthings3d"):
        write_tiny(name, tmp_path / name, 48, 64)
    train_settings = ["steps=2", "warmup_steps=1", "batch_size=2", "num_workers=1", "lr=1e-3", "loader.num_workers=0"]
    overrides = [
        f"workspace={tmp_path / 'w'}",
        "shard.min_shards=1",
        "shard.num_workers=1",
        "shard.dataset.partial=true",
        *(f"train.dinoflow.{setting}" for setting in SMALL),
        *(f"train.{setting}" for setting in train_settings),
    ]
    for phase, name in (("chairs", "flyingchairs"), ("things", "flyingthings3d")):
        overrides += [f"phases.{phase}.shard.videos={tmp_path / name}"]
        overrides += [f"phases.{phase}.train.{setting}" for setting in ("steps=2", "warmup_steps=1")]
    config = load_stage("run", "dinoflow_c_t.yaml", overrides)
    summary = workflow.run(config)
    assert summary.stages == dict.fromkeys(("chairs.shard", "chairs.train", "things.shard", "things.train"), "done")
    first, second = (summary.outputs[f"{name}.train"] for name in ("chairs", "things"))
    wanted = checkpoint.read_tensors(checkpoint.latest_checkpoint(train.Path(first)))
    things = phase_config(config, "things", first).train
    started = train.make_recipe(things).build().state_dict()
    assert all(torch.equal(started[name], value) for name, value in wanted.items())
    assert train.load_model(second).config.width == 8
    again = workflow.run(config)
    assert set(again.stages.values()) == {"skipped"}
    assert dataclasses.replace(config, phases={}).phases == {}
