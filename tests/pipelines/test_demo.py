"""The whole path on two tiny rendered films: every stage for real, in one process."""

import shutil
from pathlib import Path

import pytest

from kinema.pipelines.demo import demo
from kinema.pipelines.scenes import Scene, write_scene


@pytest.mark.timeout(240)
def test_videos_become_a_registered_model_and_a_page(tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that what the demo sets is taken back afterwards
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    videos = tmp_path / "videos"
    videos.mkdir()
    for seed in range(2):
        write_scene(Scene(seed=seed, height=64, width=80, num_frames=10, cuts=(5,)), videos / f"{seed}.mp4")
    (videos / "broken.mp4").write_bytes(b"not a video")
    settings = [f"videos={videos}", f"workspace={tmp_path / 'ws'}", "train.steps=2", "train.batch_size=2"]
    settings += ["train.flowfeat.resize=48", "train.flowfeat.crop=32", "train.loader.num_workers=0"]
    settings += ["backbone_weights=scratch"]
    settings += ["embed.short_side=32", "embed.frame_stride=4"]

    first = demo("demo", overrides=settings)
    assert set(first.stages.values()) == {"done"}
    page = Path(first.report).read_text()
    assert "broken.mp4" in page and page.count("data:image/png") > 2 and page.count("data:image/jpeg") >= 4 * 4
    assert page.index("What was learned") < page.index("Left out: 1") < page.index("Clips")
    assert "data-live" not in page.split("<header>")[0].split("<body")[1], "a finished page is a plain file"
    assert {"r2", "r2_step_0", "r2_constant", "frames", "sources"} == first.explained.keys() and first.explained[
        "frames"
    ] > 0
    assert "sqlite:///" in first.mlflow and (tmp_path / "ws" / "mlflow.db").is_file()

    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'ws' / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("kinema-flowfeat", "champion")
    run = client.get_run(version.run_id)
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.data.tags["kinema.kind"] == "workflow"

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    second = demo("demo", overrides=settings)
    assert set(second.stages.values()) == {"skipped"}

    shutil.rmtree(tmp_path / "ws" / "flow" / "dis")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    third = demo("demo", overrides=settings)
    assert third.stages == {"shard": "skipped", "teach": "done", "train": "done", "register": "done", "embed": "done"}


def test_films_with_known_motion_give_errors_in_pixels(tmp_path, monkeypatch):
    from kinema.pipelines import demo as module
    from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow

    videos = tmp_path / "videos"
    videos.mkdir()
    assert not module.is_rendered(videos)
    scene = Scene(seed=3, height=64, width=80, num_frames=6)
    write_scene(scene, videos / "film.mp4")
    assert module.is_rendered(videos)
    (videos / "film.mp4").rename(videos / "scene-3")  # the name under which packed clips know their source
    clips = write_scene_clips([scene], tmp_path / "clips")
    write_scene_flow([scene], clips, tmp_path / "flow")
    error = module.teacher_error(videos, str(tmp_path / "clips"), str(tmp_path / "flow"))
    assert error == pytest.approx(0, abs=1 / 128)
