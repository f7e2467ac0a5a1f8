"""A run in an object store: copied whole or not at all, taken up on another machine, never ended by a lost bucket."""

import dataclasses
import json
import shutil
import uuid
from pathlib import Path

import fsspec
import pytest
import torch

from kinema.configs import FlowFeatConfig, LoaderConfig, TrainConfig
from kinema.models.backbones import vision_transformer
from kinema.pipelines import train
from kinema.pipelines.artifacts.object_store import ObjectStore
from kinema.pipelines.errors import StageError
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.bucket_run import fetch_run, local_folder, whole_checkpoints
from kinema.pipelines.train.mirror import RunMirror


@pytest.fixture
def url(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return f"memory://runs-{uuid.uuid4().hex}/run"


def save(folder: Path, step: int, keep: int = 9) -> None:
    meta = {"loss": 1.0}
    checkpoint.save_checkpoint(folder, step, {"w": torch.full((64,), float(step))}, {"s": step}, meta, keep)


def copy(url: str, folder: Path, keep: int = 2) -> None:
    with RunMirror(url, folder, keep, every_s=600):
        pass


def test_the_newest_are_kept_and_one_that_is_not_whole_is_never_picked(url, tmp_path):
    folder = tmp_path / "here"
    for step in (1, 2, 3):
        save(folder, step)
    (folder / "run.json").write_text("{}")
    copy(url, folder)
    store = ObjectStore(url)
    assert whole_checkpoints(store) == ["step_00000002", "step_00000003"]
    assert store.sizes("checkpoints/step_00000001") == {}
    fsspec.filesystem("memory").rm_file(f"{url.removeprefix('memory:/')}/checkpoints/step_00000003/state.pt")
    fetch_run(url, tmp_path / "there")
    assert checkpoint.latest_checkpoint(tmp_path / "there").name == "step_00000002"
    assert checkpoint.read_state(checkpoint.resolve_checkpoint(url)) == {"s": 2}
    assert checkpoint.read_state(checkpoint.resolve_checkpoint(f"{url}/checkpoints/step_00000002")) == {"s": 2}
    with pytest.raises(ValueError, match="step_00000003 holds no complete checkpoint"):
        checkpoint.resolve_checkpoint(f"{url}/checkpoints/step_00000003")
    with pytest.raises(ValueError, match="model=memory://nowhere/run holds no complete checkpoint"):
        checkpoint.resolve_checkpoint("memory://nowhere/run")


def test_the_best_are_kept_beside_the_newest(url, tmp_path):
    """By the mean loss of each checkpoint's steps; one without a number is never the best."""
    folder = tmp_path / "here"
    for step, loss in enumerate((0.5, 0.1, float("nan"), 0.3, 0.2, 0.4), start=1):
        meta = {"loss": 9.0, "mean_loss": loss}
        checkpoint.save_checkpoint(folder, step, {"w": torch.zeros(4)}, {}, meta, keep=1, best=2)
        with RunMirror(url, folder, 1, 2, every_s=600):
            pass
    kept = [f"step_{step:08d}" for step in (2, 5, 6)]
    assert [path.name for path in checkpoint.complete_checkpoints(folder)] == kept
    (folder / "run.json").write_text("{}")
    assert whole_checkpoints(ObjectStore(url)) == kept
    shutil.rmtree(folder / "checkpoints" / "step_00000002")  # another machine knows only the newest
    with RunMirror(url, folder, 1, 2, every_s=600):
        pass
    assert whole_checkpoints(ObjectStore(url)) == kept


def test_a_copy_that_is_killed_between_any_two_writes_leaves_a_run_to_go_on_from(url, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    save(folder, 1)
    copy(url, folder)
    save(folder, 2)
    put, write = ObjectStore.put_file, ObjectStore.write
    for allowed in range(5):
        left = [allowed]

        def dies(self, *arguments, left=left, real=None):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(self, *arguments)

        monkeypatch.setattr(ObjectStore, "put_file", lambda self, *a, d=dies: d(self, *a, real=put))
        monkeypatch.setattr(ObjectStore, "write", lambda self, *a, d=dies: d(self, *a, real=write))
        try:
            RunMirror(url, folder, keep=1).copy()
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        steps = [name[-1] for name in whole_checkpoints(ObjectStore(url))]
        assert steps in (["1"], ["1", "2"], ["2"])
    copy(url, folder, keep=1)
    assert whole_checkpoints(ObjectStore(url)) == ["step_00000002"]


def test_a_lost_bucket_is_said_and_only_the_end_fails(url, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "here"
    save(folder, 1)
    fault = StageError("the bucket does not answer for 300 s")

    def lost(self, *_):
        raise fault

    monkeypatch.setattr(ObjectStore, "read", lost)
    with pytest.raises(StageError, match=r"does not answer.*here of this machine, nothing is lost"):
        with RunMirror(url, folder, 1, every_s=0.01) as mirror:
            while not mirror._lost:
                pass
    assert capsys.readouterr().err.count("training goes on") == 1


def test_a_run_goes_on_from_the_bucket_on_another_machine(url, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = dataclasses.replace(vision_transformer.CONFIGS["dino_vits16"], width=32, num_heads=2)
    monkeypatch.setitem(vision_transformer.CONFIGS, "dino_vits16", small)
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    scenes = [Scene(seed, height=72, width=96, num_frames=5) for seed in range(2)]
    clips = write_scene_clips(scenes, tmp_path / "clips")
    flow = write_scene_flow(scenes, clips, tmp_path / "flow")
    config = TrainConfig(
        clips=clips.url, flow=flow.url, out=str(tmp_path / "whole"), steps=4, batch_size=2, checkpoint_every=1,
        pictures_every=0, seed=1, use_gpu="no", loader=LoaderConfig(num_workers=0),
        settings=FlowFeatConfig(variant="dino_vits16_yt", resize=64, crop=32, ema_every=2),
    )  # fmt: skip
    train.run(config)
    first = train.run(dataclasses.replace(config, out=url, steps=2))
    assert first.checkpoint == f"{url}/checkpoints/step_00000002"
    shutil.rmtree(local_folder(url))  # another machine
    second = train.run(dataclasses.replace(config, out=url))
    whole, there = checkpoint.latest_checkpoint(tmp_path / "whole"), checkpoint.resolve_checkpoint(second.checkpoint)
    assert (whole / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()
    assert json.loads(ObjectStore(url).read("run.json"))["run_id"] == first.run_id == second.run_id
    lines = ObjectStore(url).read("metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 4
    assert train.load_model(url) is not None
    torch.set_num_threads(threads)
