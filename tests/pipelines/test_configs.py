"""Every packaged workflow file trains: two steps with its recipe on a tiny rendered scene."""

import dataclasses
from pathlib import Path

import pytest

from kinema.configs import load_stage
from kinema.configs.rendered import RENDERED
from kinema.models.backbones.vision_transformer import CONFIGS as ENCODERS
from kinema.pipelines import train
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow, write_scene_tracks
from tests.tiny_video_model import HEIGHT, WIDTH, write_dismo_run

CONFIGS = sorted(p.name for p in (Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def scene_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    scenes = [Scene(seed=seed, height=64, width=80, num_frames=9) for seed in range(2)]
    clips = write_scene_clips(scenes, folder / "clips")
    write_scene_flow(scenes, clips, folder / "flow", gaps=(1, 2, -1, -2))
    write_scene_tracks(scenes, clips, folder / "tracks", grid=8)
    return folder


@pytest.fixture(autouse=True)
def narrow_encoders(monkeypatch):
    """Encoders of 22 and 86 M weights, and decoders as wide, are built by the models' own tests."""
    for name in ("dinov2_vits14", "dinov2_vitb14"):
        monkeypatch.setitem(ENCODERS, name, dataclasses.replace(ENCODERS[name], width=32, num_heads=2))


def tiny_settings(config, tmp_path, request):
    """Overrides under which the config's model trains on one small scene."""
    if config.model == "cogvideox5b_i2v_large":
        base = request.getfixturevalue("tiny_video_base")
        small = {"base": base, "extractor": write_dismo_run(tmp_path / "dismo"), "rank": 4, "d_cond": 16, "fps": 24.0}
        small |= {"num_frames": 9, "height": HEIGHT, "width": WIDTH, "sample_steps": 1}
        return {"precision": "fp32"} | {f"transfer.{key}": value for key, value in small.items()}
    if config.model == "flowfeat":
        patch = 14 if "dinov2" in config.settings.variant else 16
        return {"flowfeat.resize": 4 * patch, "flowfeat.crop": 2 * patch, "flowfeat.backbone_weights": ""}
    if config.model == "dismo":
        return {
            "dismo.preset": "dismo_tiny",
            "dismo.encoder_weights": "",
            "dismo.autoencoder": "pixels",
            "dismo.pixels_per_latent": 4,
            "dismo.frame_px": 32,
            "dismo.fps": 24.0,
        }
    if config.model == "dinoflow":
        small = {"backbone": "nano_vit8", "width": 16, "crop": "[48,64]", "backbone_weights": ""}
        return {f"dinoflow.{key}": value for key, value in small.items()}
    if config.model == "raft_small":
        crop = {} if config.clips == RENDERED else {"flow_network.crop": "[128,128]"}
        return {**crop, "flow_network.iters": 2}
    return {
        "fpt.preset": "fpt_tiny",
        "fpt.encoder_weights": "",
        "fpt.image_px": 64,
        "fpt.gap_s": 0.1,
        "fpt.num_pokes": 6,
        "fpt.queries_per_poke": 3,
        "fpt.min_tracks": 16,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_with_every_packaged_config(name, scene_data, tmp_path, monkeypatch, request):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    given = load_stage("train", name)
    stored = {key: scene_data / key for key in ("clips", "flow", "tracks")}
    tiny = {
        **({} if given.clips == RENDERED else stored),
        "out": tmp_path / "run",
        "steps": 2,
        "batch_size": 2,
        "num_workers": 1,
        "loader.num_workers": 0,
        **tiny_settings(given, tmp_path, request),
    }
    config = load_stage("train", name, [f"{key}={value}" for key, value in tiny.items()])
    summary = train.run(config)
    assert summary.step == 2 and 0 < summary.loss < 40
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
