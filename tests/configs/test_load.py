"""Config files and command lines: merging, types, and errors that name the fix."""

import dataclasses
import re
from pathlib import Path

import pytest

from kinema.configs import STAGES, WorkflowConfig, build, config_hash, load_stage, resolve_config_path
from kinema.configs.describe import describe, field_docs, key_names
from kinema.configs.required import COMMON, REQUIRED

CONFIGS = sorted(p.name for p in (Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_defaults_yaml_command_line_in_this_order(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 7, lr: 0.5, flowfeat: {gap: 1}}\n")
    config = load_stage("train", path, ["lr=0.25", "flowfeat.crop_scale=[0.4,0.6]"])
    assert (config.steps, config.lr, config.settings.gap) == (7, 0.25, 1)
    assert config.settings.crop_scale == (0.4, 0.6)
    assert config.batch_size == build(STAGES["train"]).batch_size


@pytest.mark.parametrize("value", ["012", "1e3", "null", "[a", "a b/c=d", "", "yes"])
def test_paths_are_taken_letter_by_letter(value):
    assert load_stage("shard", None, [f"videos={value}"]).videos == value


@pytest.mark.parametrize(
    ("stage", "override", "says"),
    [
        ("train", "stpes=3", "did you mean steps?"),
        ("train", "flowfeat.gapp=3", "did you mean flowfeat.gap?"),
        ("train", "steps=abc", "steps=abc"),
        ("train", "model=foo", "flowfeat"),
        ("train", "steps", "not key=value"),
        ("train", "flowfeat=3", "is a section"),
        ("train", "lr.x=3", "no keys of its own"),
        ("train", "batch_size=0", "batch_size=0 is out of range"),
        ("shard", "clip.crf=99", "use 0 (best) to 51"),
        ("teach", "gaps=[0]", "1 or more"),
        ("teach", "gaps=[a]", "gaps=[a]"),
        ("teach", "teacher=raftt", "raft_small"),
    ],
)
def test_errors_name_value_rule_and_fix(stage, override, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        load_stage(stage, None, [override])


def test_batch_size_rule_names_the_neighbours():
    with pytest.raises(ValueError, match="batch_size=100 is not divisible by .* 8; use 96 or 104"):
        load_stage("train", None, ["batch_size=100", "num_workers=8"])


def test_unknown_key_in_a_file_is_refused_even_in_another_section(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("shard: {videoss: x}\n")
    with pytest.raises(ValueError, match="shard.videoss; did you mean shard.videos"):
        load_stage("train", path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match=r"demo\.yaml"):
        resolve_config_path("no_such_config")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(ValueError, match="cannot be read"):
        load_stage("run", broken)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_packaged_config_loads_for_every_stage(name):
    for stage, schema in STAGES.items():
        assert isinstance(load_stage(stage, name), schema)


def test_the_experiment_of_a_workflow_is_that_of_its_stages(tmp_path):
    for stage in ("train", "evaluate"):
        assert load_stage(stage, "demo.yaml").experiment == "kinema-demo"
        assert load_stage(stage, "demo.yaml", ["experiment=mine"]).experiment == "mine"
    own = tmp_path / "own.yaml"
    own.write_text("experiment: all\ntrain: {experiment: own}\n")
    assert load_stage("train", str(own)).experiment == "own", "what a section says itself stays"
    assert load_stage("evaluate", str(own)).experiment == "all"


def test_every_field_is_described():
    for schema in STAGES.values():
        text = describe(schema)
        for line in text.splitlines():
            assert line.strip(), f"{schema.__name__}: a field has no docstring"
    assert set(field_docs(WorkflowConfig)) == {f.name for f in dataclasses.fields(WorkflowConfig)}


def test_help_has_what_is_often_set_before_the_rest():
    for stage, keys in COMMON.items():
        lines = describe(STAGES[stage], REQUIRED[stage], keys).splitlines()
        shown = [line.strip().partition("=")[0] for line in lines if re.match(r"  [a-z_.0-9]+=", line)]
        assert set(keys) <= set(key_names(STAGES[stage])), f"{stage}: {set(keys) - set(key_names(STAGES[stage]))}"
        assert sorted(shown) == sorted(key_names(STAGES[stage])), "every key is there, once"
        assert set(shown[: len(REQUIRED[stage])]) == set(REQUIRED[stage])
        if "  rarely set:" in lines:
            before = "\n".join(lines[: lines.index("  rarely set:")])
            assert all(f"  {key}=" in before for key in (*REQUIRED[stage], *keys))
    assert "  rarely set:" in describe(STAGES["train"], REQUIRED["train"], COMMON["train"])


def test_every_field_is_read_somewhere():
    root = Path(__file__).parents[2]
    sources = [p for folder in ("pipelines", "models") for p in (root / folder).rglob("*.py")]
    text = "\n".join(p.read_text() for p in sources)
    unread = set()
    for schema in STAGES.values():
        stack = [schema()]
        while stack:
            config = stack.pop()
            for field in dataclasses.fields(config):
                value = getattr(config, field.name)
                if dataclasses.is_dataclass(value):
                    stack.append(value)
                elif not re.search(rf"\.{field.name}\b", text):
                    unread.add(f"{type(config).__name__}.{field.name}")
    assert not unread


def test_hash_ignores_order_and_sees_values():
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
    assert config_hash(build(STAGES["train"])) != config_hash(build(STAGES["train"], {"seed": 1}))
