"""FlowFeat learns: through the stages, on rendered scenes, judged on scenes it has not seen and on a real video."""

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from kinema.configs import ClipConfig, EvaluateConfig, FlowFeatConfig, LoaderConfig, TrainConfig
from kinema.pipelines import tracking, train
from kinema.pipelines.demo import HELD_OUT_SEED
from kinema.pipelines.evaluate import stage as evaluate
from kinema.pipelines.evaluate.davis.scores import evaluate_davis
from kinema.pipelines.evaluate.davis.stage import dense_features
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.train.flow_error import FlowError, flow_error
from kinema.pipelines.train.meter import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

DAVIS = Path(__file__).parents[3] / "shared" / "data" / "davis" / "DAVIS"

# Scenes are drawn as the held-out ones are (square, the same camera), with other seeds. Their number matters most:
# from 12 scenes the held-out error stops at 0.8 of its first value, however long the training. So do the samples of a
# step: with 4 instead of 8 of them the share that is left is 0.68 to 0.77, depending on the seed (docs/LOG.md).
NUM_SCENES = 300
SIDE_PX = 192
NUM_FRAMES = 8
FLOW_SIZE_PX = (96, 96)
STEPS = 800
BATCH_SIZE = 8

HELD_OUT_SCENES = 24  # on the demo's three, two models that differ by 2 % on many can differ by 10 %
HELD_OUT_FRAMES = (1, 4)

SHORT_SIDE_PX = 240  # of the frames that label propagation compares; the published 480 take four times as long

# The encoder keeps its random weights. For comparison: a map from perfect knowledge of the objects, with places known
# only within each crop, leaves 0.67.
LARGEST_SHARE_LEFT = 0.72


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A store of this module's own; everything in one process."""
    folder = tmp_path_factory.mktemp("learning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.chdir(folder)  # files of the MLflow store lie below the working folder
        yield folder


@pytest.fixture(scope="module")
def config(place) -> TrainConfig:
    """Settings of the run; its clips and their exact flow are made."""
    scenes = [Scene(seed=seed, height=SIDE_PX, width=SIDE_PX, num_frames=NUM_FRAMES) for seed in range(NUM_SCENES)]
    assert max(scene.seed for scene in scenes) < HELD_OUT_SEED
    clips = write_scene_clips(scenes, place / "clips", ClipConfig(preset="veryfast"), clips_per_shard=50)
    write_scene_flow(scenes, clips, place / "flow", gaps=(1, -1, 2, -2), size=FLOW_SIZE_PX)
    return TrainConfig(
        clips=str(place / "clips"),
        flow=str(place / "flow"),
        out=str(place / "run"),
        settings=FlowFeatConfig(variant="dino_vits16_yt", resize=96, crop=64, ema_every=1, ema_decay=0.98),
        loader=LoaderConfig(num_workers=1),
        steps=STEPS,
        batch_size=BATCH_SIZE,
        lr=1e-3,
        schedule="cosine",
        warmup_steps=10,
        cpus_per_worker=2,
        precision="fp32",
    )


@pytest.fixture(scope="module")
def trained(config) -> Path:
    """The finished run."""
    assert train.run(config).step == STEPS
    return Path(config.out)


@cache
def held_out_flow() -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Frames of scenes that no training clip shows, their exact flow over two frames, and what stays visible."""
    frames, flows, valid = [], [], []
    for number in range(HELD_OUT_SCENES):
        scene = Scene(seed=HELD_OUT_SEED + number, height=SIDE_PX, width=SIDE_PX, num_frames=NUM_FRAMES)
        for t in HELD_OUT_FRAMES:
            frames.append(scene.frame(t))
            flows.append(scene.flow_px(t, t + 2))
            valid.append(~scene.occluded(t, t + 2))
    return frames, flows, valid


def held_out_error(model, config: FlowFeatConfig) -> FlowError:
    """Error on scenes of seeds that are kept out of training, with the training's crops."""
    return flow_error(model, *held_out_flow(), resize=config.resize, crop=config.crop)


def test_held_out_flow_error_falls_well_below_its_value_at_step_0(config, trained):
    before = held_out_error(train.build_model(config), config.settings)
    after = held_out_error(train.load_model(trained), config.settings)
    print(
        f"\nheld-out flow error: {before.epe_px:.3f} px at step 0, {after.epe_px:.3f} px at step {STEPS} "
        f"({after.epe_px / before.epe_px:.3f} of it); constant flow {after.constant_epe_px:.3f} px"
    )
    assert before.constant_epe_px == after.constant_epe_px  # the same crops were judged
    assert after.epe_px < LARGEST_SHARE_LEFT * before.epe_px


def test_products_in_bf16_learn_the_same(config, trained, place):
    """Why `precision=auto` takes them on CPUs that have instructions for them: curve and held-out error agree."""
    other = replace(config, out=str(place / "bf16"), precision="bf16")
    assert train.run(other).precision == "bf16"
    curves = []
    for run in (trained, Path(other.out)):
        points = [point["loss"] for point in read_metrics(run) if "loss" in point]
        curves.append(np.array(points)[-len(points) // 10 * 10 :].reshape(10, -1).mean(1))
    errors = [held_out_error(train.load_model(run), config.settings).epe_px for run in (trained, Path(other.out))]
    print("\nloss by tenths of the training, fp32:", *(f"{value:.3f}" for value in curves[0]))
    print("loss by tenths of the training, bf16:", *(f"{value:.3f}" for value in curves[1]))
    print(f"held-out flow error: {errors[0]:.3f} px in fp32, {errors[1]:.3f} px in bf16")
    assert np.abs(curves[1] / curves[0] - 1).max() < 0.03
    assert errors[1] < 1.03 * errors[0]


@pytest.mark.skipif(not DAVIS.is_dir(), reason=f"needs the DAVIS folder {DAVIS}")
def test_car_shadow_is_scored_before_and_after(config, trained, place):
    """The command's figures, in the run's own metrics too. A random encoder knows no cars: none is asked to be good."""
    protocols = ("mlp", "propagation")
    untrained = dense_features(train.build_model(config), "y_dec")
    options = {"mlp": {}, "propagation": {"frame_side": SHORT_SIDE_PX}}
    before = {name: evaluate_davis(untrained, DAVIS, None, name, **options[name]).jf_mean for name in protocols}
    settings = EvaluateConfig(
        model=str(trained), data=str(DAVIS), protocols=protocols, short_side=SHORT_SIDE_PX, out=str(place / "table")
    )
    summary = evaluate.run(settings)
    after = {name: summary.metrics[f"davis_{name}_jf_mean"] for name in protocols}
    print()
    for name in protocols:
        j, f = (summary.metrics[f"davis_{name}_{measure}_mean"] for measure in "jf")
        print(f"car-shadow, {name}: J&F {after[name]:.3f} (J {j:.3f}, F {f:.3f}); at step 0 {before[name]:.3f}")
    assert summary.metrics["davis_jf"] == after["mlp"]
    assert summary.run_id == json.loads((trained / "run.json").read_text())["run_id"]
    logged = tracking.open_client(os.environ["MLFLOW_TRACKING_URI"]).get_run(summary.run_id).data.metrics
    assert logged["evaluate.davis_jf"] == pytest.approx(after["mlp"])
    assert all(0 < value < 1 for value in (*before.values(), *after.values()))
