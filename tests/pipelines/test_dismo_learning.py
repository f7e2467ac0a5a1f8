"""A small DisMo learns, within fifteen minutes of one core, to tell motions of objects that it never saw."""

import pytest

from kinema.pipelines.bench.dismo_learning import learn, lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


def test_embeddings_tell_motion_and_not_appearance(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    metrics = learn(tmp_path)
    print("\n".join(["", *lines(metrics)]))
    assert metrics["train_seconds"] <= 15 * 60
    assert metrics["knn_motion_over_chance"] >= 4
    for label in ("shape", "texture", "colour"):
        assert metrics[f"knn_{label}_over_chance"] <= 1.5
    for baseline in ("flow_histogram", "untrained_frames"):
        assert metrics["knn_motion"] > metrics[f"knn_motion_{baseline}"]
    assert metrics["search_hit"] >= 0.8 and metrics["search_first"] >= 0.8
    assert (tmp_path / "moved_objects.png").is_file()
