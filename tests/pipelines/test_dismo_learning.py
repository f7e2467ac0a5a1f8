"""A small DisMo learns motion and not appearance, from rendered clips, within a quarter of an hour on a CPU."""

import pytest

from kinema.pipelines.bench.dismo_learning import learn, lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


def test_embeddings_tell_motion_and_not_appearance(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    metrics = learn(tmp_path)
    print("\n".join(["", *lines(metrics)]))
    assert metrics["knn_motion_over_chance"] >= 4
    for appearance in ("shape", "texture", "colour"):
        assert metrics[f"knn_{appearance}_over_chance"] <= 1.5
    assert metrics["knn_motion"] > metrics["knn_motion_flow_histogram"]
    assert metrics["knn_motion"] > metrics["knn_motion_untrained_frames"]
    assert (tmp_path / "moved_objects.png").is_file()
