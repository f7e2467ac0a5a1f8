"""Layers rewritten by torch.compile: the same learning to rounding, the same names, the same bits after a stop."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kinema.configs import TrainConfig
from kinema.configs.models.table import MODELS
from kinema.pipelines import train
from kinema.pipelines.errors import StageError
from kinema.pipelines.precision import tf32_for_the_rest
from kinema.pipelines.train import checkpoint, compiled
from kinema.pipelines.train.loop import refuse_other_identity, train_worker
from kinema.pipelines.train.meter import read_metrics
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.train.stop import Stop

sys.path.insert(0, str(Path(__file__).parent))
from toy_training import WIDTH, StopAt, ToyRecipe, toy_job

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Layer(nn.Sequential):
    """A linear layer and what follows it; torch compiles no layer of its own that stands alone."""

    def forward(self, x):
        return torch.tanh(self[0](x)) * 2 - 0.5


class InLayers(ToyRecipe):
    """The toy in two layers, without dropout, whose masks a compiler draws in another way."""

    compiles_on_gpu = True

    def build(self):
        module = super().build()
        module.online = module.alias = nn.Sequential(Layer(nn.Linear(WIDTH, 16)), Layer(nn.Linear(16, 1)))
        module.average = copy.deepcopy(module.online).requires_grad_(False)
        return module

    def compiled_units(self, module):
        return list(module.online)


class Stopping(StopAt, InLayers):
    """Compiled layers, and a stop once step `at` is done."""


def config(**changes) -> TrainConfig:
    defaults = dict(steps=6, batch_size=4, lr=0.01, checkpoint_every=50, log_every=1, pictures_every=0, use_gpu="no")
    return TrainConfig(**(defaults | changes))


def newest(run: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.read_tensors(checkpoint.latest_checkpoint(run)))


def test_it_learns_the_same_under_the_same_names_and_resumes_bit_for_bit(tmp_path, capsys):
    for name in ("plain", "whole", "parts"):
        (tmp_path / name).mkdir()
    train_worker(toy_job(tmp_path / "plain", config(), InLayers()), Place(), Stop())
    assert "compiled" not in capsys.readouterr().err
    train_worker(toy_job(tmp_path / "whole", config(compile="on"), InLayers()), Place(), Stop())
    assert "2 layers are compiled in the first step" in capsys.readouterr().err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was
    for step in (3, 99):
        stop = Stop()
        train_worker(toy_job(tmp_path / "parts", config(compile="on"), Stopping(step, stop)), Place(), stop)
    plain, whole, parts = (newest(tmp_path / name) for name in ("plain", "whole", "parts"))
    assert plain.keys() == whole.keys() == parts.keys()
    for name, value in plain.items():
        assert torch.equal(whole[name], parts[name])
        torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-6)
    losses = [[point["loss"] for point in read_metrics(tmp_path / name)] for name in ("plain", "whole")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_pictures_are_made_by_the_layers_as_they_are_written():
    layers = nn.Sequential(Layer(nn.Linear(3, 4)), Layer(nn.Linear(4, 1)))
    for layer in layers:
        layer.compile()
    layers(torch.ones(5, 3)).sum().backward()
    compiled_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad(), compiled.as_written():
        found = layers(torch.ones(7, 3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled_before > 0
    layers(torch.ones(5, 3))
    torch.testing.assert_close(found[:5], layers(torch.ones(5, 3)))


def test_auto_compiles_on_a_gpu_where_the_recipe_asks_for_it_and_a_compiler_is_there(monkeypatch):
    assert compiled.is_used("auto", InLayers(), GPU) and not compiled.is_used("auto", InLayers(), CPU)
    assert not compiled.is_used("auto", ToyRecipe(), GPU) and not compiled.is_used("off", InLayers(), GPU)
    assert compiled.is_used("on", InLayers(), CPU)
    assert not compiled.is_used("auto", InLayers(), GPU, sharded=True)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert not compiled.is_used("auto", InLayers(), GPU)


@pytest.mark.parametrize(("model", "preset"), [("fpt", "fpt_tiny"), ("dismo", "dismo_tiny")])
def test_models_name_layers_that_are_part_of_them(model, preset):
    recipe = make_recipe(TrainConfig(model=model, settings=MODELS[model].settings(preset=preset)))
    module = recipe.build()
    units = recipe.compiled_units(module)
    assert recipe.compiles_on_gpu and len(units) >= 2
    assert {id(unit) for unit in units} <= {id(part) for part in module.modules()}


def test_what_cannot_be_compiled_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(
        ValueError, match="train.compile=on: model=flowfeat names no layers to compile; use compile=auto"
    ):
        train.run(config(compile="on", clips="rendered", out=str(tmp_path / "run"), batch_size=4))
    with pytest.raises(ValueError, match="is not for sharding=full"):
        compiled.check("on", InLayers(), "toy", "full")


def test_a_compiler_that_fails_is_named_with_the_way_on(tmp_path, monkeypatch):
    def broken(module, *args):
        raise RuntimeError("no such instruction")

    class Fails(InLayers):
        def compiled_units(self, module):
            module.online[0].compile(backend=broken)
            return []

    with pytest.raises(StageError, match=r"torch.compile failed \(.*\); use train.compile=off"):
        train_worker(toy_job(tmp_path, config(compile="on"), Fails()), Place(), Stop())
    with pytest.raises(RuntimeError, match="of the model itself"), compiled.failures_named():
        raise RuntimeError("of the model itself")


def test_runs_of_versions_that_recorded_it_per_model_go_on(tmp_path):
    refuse_other_identity({"model": "dismo", "dismo.compile": False}, {"model": "dismo"}, tmp_path)
    with pytest.raises(ValueError, match="dismo.preset"):
        refuse_other_identity(
            {"model": "dismo", "dismo.preset": "a"}, {"model": "dismo", "dismo.preset": "b"}, tmp_path
        )


def test_what_autocast_leaves_in_float32_takes_tf32_on_a_gpu_only():
    before = torch.get_float32_matmul_precision()
    for precision, device, expected in (("bf16", GPU, "high"), ("fp32", GPU, before), ("bf16", CPU, before)):
        with tf32_for_the_rest(precision, device):
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == before
