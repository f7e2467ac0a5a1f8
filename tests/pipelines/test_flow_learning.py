"""A DinoFlow learns flow from its initialisation within minutes, on pairs that are rendered as it goes."""

import pytest
import torch

from kinema.configs import load_stage
from kinema.models.flow.dis import DIS
from kinema.pipelines.bench import flow_learning
from kinema.pipelines.loader.rendered import RenderedIndex


def test_methods_are_judged_on_the_same_unseen_pairs(capsys):
    config = load_stage("train", flow_learning.CONFIGS["dinoflow"], [])
    index = RenderedIndex(flow_learning.held_out(config).settings, 10_000, 2)
    assert not set(index.keys) & set(RenderedIndex.of(config.rendered).keys[:2])
    table = flow_learning.judge(DIS(), index)
    lengths = [torch.from_numpy(index.clip(n).flow(0, 1)).norm(dim=0).mean().item() for n in (0, 1)]
    assert table.trained == table.dis < table.zero == pytest.approx(sum(lengths) / 2)
    assert "(zero / trained = " in table.line("dis")
    assert flow_learning.main(["smurf"]) == 2 and "choose from dinoflow, raft_small" in capsys.readouterr().err


@pytest.fixture
def table(request, tmp_path, monkeypatch):
    """A whole training with configs/NAME_nano.yaml, judged."""
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = flow_learning.learn(request.param, tmp_path)
    print(found.line(request.param), f"{found.train_cpu_seconds:.0f} s of processor time")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("table", ["dinoflow"], indirect=True)
def test_a_dinoflow_from_scratch_halves_the_error_of_zero_flow(table):
    assert table.train_cpu_seconds < 15 * 60
    assert table.zero / table.trained > 2
    assert table.dis > 0.5  # what is asked of it is not trivial for a method without learning either
