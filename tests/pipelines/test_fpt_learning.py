"""A small Flow Poke Transformer learns rendered motion with rigid parts, also of scenes it never saw."""

from types import SimpleNamespace

import numpy as np
import pytest

from kinema.pipelines.bench.fpt_learning import render, train_and_judge
from kinema.pipelines.precision import cpu_multiplies_bf16
from kinema.pipelines.train.meter import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

LARGEST_GAP_NATS = 0.05
"""Between precisions, of what goes from 2 nats to -3 in training."""


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Rendered scenes, and what training in float32 came to: data, run, tables."""
    place = tmp_path_factory.mktemp("fpt_learning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
        data, run = render(place), place / "run"
        yield SimpleNamespace(data=data, run=run, tables=train_and_judge(data, run, ["precision=fp32"]))


def test_pokes_tell_the_model_where_everything_goes(learnt):
    for name, table in learnt.tables.items():
        print("\n".join(["", *table.lines(name)]))
        assert table.pokes[1] == 1 and table.pokes[-1] == 10
        assert table.nll[-1] < table.baseline_nll - 1.0
        assert table.epe[-1] < 0.6 * table.epe[1] < 0.6 * table.baseline_epe


@pytest.mark.skipif(not cpu_multiplies_bf16(), reason="this CPU has no instructions for products of bf16")
def test_products_in_bf16_learn_the_same(learnt):
    """What has to hold before `precision=auto` may take them on CPUs that have instructions for them."""
    run = learnt.run.with_name("bf16")
    tables = train_and_judge(learnt.data, run, ["precision=bf16"])
    curves = [losses_by_tenths(learnt.run), losses_by_tenths(run)]
    for name, curve in zip(("fp32", "bf16"), curves, strict=True):
        print(f"\nloss by tenths of the training, {name}:", *(f"{value:.3f}" for value in curve), end="")
    for name, table in tables.items():
        print("\n".join(["", *table.lines(f"{name} in bf16")]))
    assert not np.array_equal(*curves)
    assert np.abs(curves[1] - curves[0]).max() < LARGEST_GAP_NATS
    for name, table in tables.items():
        expected = learnt.tables[name]
        assert np.abs(np.subtract(table.nll, expected.nll)).max() < 2 * LARGEST_GAP_NATS
        assert np.abs(np.divide(table.epe, expected.epe) - 1).max() < 0.05


def losses_by_tenths(run):
    """Means over tenths of the training."""
    losses = np.array([point["loss"] for point in read_metrics(run) if "loss" in point])
    return losses[-len(losses) // 10 * 10 :].reshape(10, -1).mean(1)
