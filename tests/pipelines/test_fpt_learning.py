"""A small Flow Poke Transformer learns rendered motion with rigid parts, also of scenes it never saw."""

import pytest

from kinema.pipelines.bench.fpt_learning import learn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_pokes_tell_the_model_where_everything_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    tables = learn(tmp_path)
    for name, table in tables.items():
        print("\n".join(["", *table.lines(name)]))
        assert table.pokes[1] == 1 and table.pokes[-1] == 10
        assert table.nll[-1] < table.baseline_nll - 1.0
        assert table.epe[-1] < 0.6 * table.epe[1] < 0.6 * table.baseline_epe
