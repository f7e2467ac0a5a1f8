"""The table of models agrees with the code that it names, and with what README says of it."""

import dataclasses
import inspect
from pathlib import Path

import pytest
from torch import nn

import hubconf
from kinema.configs import TrainConfig, build
from kinema.configs.models.benchmarks import BENCHMARKS
from kinema.configs.models.row import ModelRow, resolve
from kinema.configs.models.table import MODELS, ModelTable
from kinema.models.weights import LEDGER
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.train.recipes.protocol import Recipe

ROWS = [pytest.param(row, id=name) for name, row in MODELS.items()]


@pytest.mark.parametrize("row", ROWS)
def test_everything_a_row_names_exists(row):
    for reference in (row.network, row.build, row.presets, row.recipe, row.demo):
        assert not reference or resolve(reference) is not None
    for facts in (row.teacher, row.tracker):
        assert facts is None or callable(resolve(facts.load))
    assert row.tracker is None or callable(resolve(row.tracker.benchmark))
    assert not row.hub or callable(getattr(hubconf, row.hub))
    assert not row.weights or row.weights in LEDGER
    for benchmark in row.benchmarks:
        assert BENCHMARKS[benchmark].kind == row.kind and callable(resolve(BENCHMARKS[benchmark].run))
    assert bool(row.recipe) == bool(row.settings) == bool(row.section)
    assert not row.serving or row.registered_name


@pytest.mark.parametrize("name", MODELS.trainable())
def test_recipes_have_the_whole_protocol_and_the_settings_of_their_row(name):
    config = build(TrainConfig, {"model": name})
    assert isinstance(config.settings, MODELS[name].settings)
    recipe = make_recipe(config)
    members = [n for n, member in inspect.getmembers(Recipe) if not n.startswith("_") and callable(member)]
    assert {"of", "build", "loss", "export"} <= set(members)
    assert all(callable(getattr(recipe, member)) for member in members)
    assert tuple(recipe.needs) == MODELS[name].needs


@pytest.mark.parametrize("row", [p for p in ROWS if p.values[0].parameters])
def test_numbers_of_parameters_are_true(row):
    assert issubclass(resolve(row.network), nn.Module)
    if row.parameters > 30e6:
        pytest.skip(f"{row.parameters / 1e6:.0f} M parameters are built and counted in tests/models")
    assert sum(p.numel() for p in row.make().parameters()) == row.parameters


def test_a_section_belongs_to_one_dataclass():
    table = ModelTable(tuple(MODELS.values()))
    other = dataclasses.make_dataclass("Other", [("x", int, 1)])
    with pytest.raises(ValueError, match="section 'fpt' of model mine belongs to fpt"):
        table.add(ModelRow("mine", "Mine", "pokes", "A test.", settings=other, section="fpt"))
    table.add(ModelRow("mine", "Mine", "pokes", "A test.", settings=other, section="mine"))
    assert "mine" in table and table.sections()["mine"] is other


def test_a_setting_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"flowfeat.gap=3 has no effect with model=raft; its settings are flow_"):
        build(TrainConfig, {}, ["model=raft", "flowfeat.gap=3"])
    assert build(TrainConfig, {"model": "raft", "flowfeat": {"gap": 3}}).settings.gap == 1, "files may hold several"


def test_readme_lists_every_model():
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name, row in MODELS.items():
        found = [line for line in rows if line.startswith(f"| `{name}` |")]
        assert len(found) == 1 and row.summary.split(";")[0].rstrip(".") in found[0], f"README's table lacks {name}"
