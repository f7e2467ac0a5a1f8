"""`teacher=consensus` over stored flow: better than its members, with an expected error that filters and weighs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from kinema.configs import FlowFeatConfig, PairFilterConfig, TeachConfig
from kinema.configs.load import load_stage, to_mapping
from kinema.pipelines import teach
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.loader import ClipIndex, Skip
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.train.recipes.flowfeat import FlowFeatRecipe, confidence

SCENES = [Scene(seed, 96, 128, 5, num_objects=4) for seed in (950, 951)]


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """clips/ and two members: DIS at its usual and at its coarsest preset."""
    folder = tmp_path_factory.mktemp("data")
    write_scene_clips(SCENES, folder / "clips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        for name, preset in (("usual", 0), ("coarse", 1)):
            settings = TeachConfig(clips=str(folder / "clips"), out=str(folder / name), iters=preset, gaps=(1, 2, 4))
            teach.run(settings)
    return folder


def config(data: Path, out: Path, **changes) -> TeachConfig:
    members = (str(data / "usual"), str(data / "coarse"))
    base = TeachConfig(clips=str(data / "clips"), out=str(out), teacher="consensus", from_=members, gaps=(1, 4))
    return dataclasses.replace(base, **changes)


def errors(data: Path, flow: Path, gap: int) -> list[float]:
    """Mean error of every forward pair of this gap, px."""
    index, scenes = ClipIndex.open(data / "clips", flow), {f"scene-{s.seed}": s for s in SCENES}
    found = []
    for clip in (index.clip(i) for i in range(len(index))):
        scene = scenes[clip.row["source"]]
        for t, g in clip.flow_pairs:
            if g == gap:
                found.append(np.hypot(*(clip.flow(t, gap) - scene.motion(t, t + gap)[0])).mean())
    return found


def test_it_is_better_than_each_member_and_says_how_sure_it_is(data, tmp_path):
    summary = teach.run(config(data, tmp_path / "flow"))
    assert (summary.clips, summary.quarantined) == (2, 0)
    members = {gap: [np.mean(errors(data, data / name, gap)) for name in ("usual", "coarse")] for gap in (1, 4)}
    assert np.mean(errors(data, tmp_path / "flow", 1)) < min(members[1])
    # Two presets of one method lose sight of the same pixels over four frames, and neither knows what those do.
    assert np.mean(errors(data, tmp_path / "flow", 4)) < np.mean(members[4])
    clip = ClipIndex.open(data / "clips", tmp_path / "flow").clip(0)
    scene = next(s for s in SCENES if f"scene-{s.seed}" == clip.row["source"])
    stored = clip.flow_pair(0, 1)
    error = np.hypot(*(stored.flow_px - scene.motion(0, 1)[0]))
    sure = stored.uncertainty_px < np.median(stored.uncertainty_px)
    assert stored.occlusion is not None and error[sure].mean() < 0.5 * error[~sure].mean()


def test_the_loader_filters_and_flowfeat_weighs_by_it(data, tmp_path):
    teach.run(config(data, tmp_path / "flow", gaps=(1,)))
    rows = Artifact.read(tmp_path / "flow").samples().to_pylist()
    signals = [value for row in rows for value in row["pair_uncertainty_px"]]
    assert len(signals) == 16 and None not in signals
    limits = PairFilterConfig(max_uncertainty_px=float(np.median(signals)))
    index = ClipIndex.open(data / "clips", tmp_path / "flow", pairs=limits)
    assert sum(len(index.clip(i).flow_pairs) for i in range(len(index))) == sum(
        s <= np.median(signals) for s in signals
    )
    settings = FlowFeatConfig(resize=64, crop=56, gap=1, confidence_px=1.0)
    sample = FlowFeatRecipe(settings).read_sample(index.clip(0), np.random.default_rng(0))
    assert (
        sample["confidence"].shape == (1, 56, 56) and 0 <= sample["confidence"].min() < sample["confidence"].max() <= 1
    )
    plain = ClipIndex.open(data / "clips", data / "usual").clip(0)
    assert isinstance(FlowFeatRecipe(settings).read_sample(plain, np.random.default_rng(0)), Skip)
    np.testing.assert_allclose(confidence(np.full((40, 60), 2.0, np.float32), 2.0, 16), 0.5, rtol=1e-5)


def test_a_member_taught_anew_is_judged_anew(data, tmp_path):
    out, member = tmp_path / "flow", tmp_path / "member"
    write_scene_flow(SCENES, Artifact.read(data / "clips"), member, gaps=(1, -1))
    settings = config(data, out, gaps=(1,), from_=(str(data / "usual"), str(member)))
    teach.run(settings)
    assert np.mean(errors(data, out, 1)) < np.mean(errors(data, data / "usual", 1))
    inputs = Artifact.read(out).manifest["inputs"]
    assert set(inputs) == {"clips", "from_0", "from_1"}
    assert teach.run(settings).clips == 2
    with pytest.raises(ValueError, match="from_1"):
        teach.run(dataclasses.replace(settings, from_=(str(data / "usual"), str(data / "coarse"))))


def test_from_is_a_key_of_files_and_of_the_command_line(tmp_path):
    read = load_stage("teach", None, ["teacher=consensus", "from=[flow/a,flow/b]"])
    assert read.from_ == ("flow/a", "flow/b") and to_mapping(read)["from"] == ("flow/a", "flow/b")
    (tmp_path / "x.yaml").write_text("teach:\n  teacher: consensus\n  from: [a, b]\n")
    assert load_stage("teach", tmp_path / "x.yaml").from_ == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"from_": ()}, "needs two or more flow artifacts"),
        ({"gaps": (3,)}, "needs gap 3 in both directions"),
        ({"short_side": 64}, "works at its first member's size"),
        ({"teacher": "dis"}, "looks at frames alone; use teacher=consensus"),
    ],
)
def test_bad_arguments_are_one_line(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        teach.run(config(data, tmp_path / "flow", **changes))
    assert not (tmp_path / "flow").exists()
