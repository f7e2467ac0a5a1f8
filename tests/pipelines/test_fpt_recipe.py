"""The Flow Poke Transformer learns from tracks: samples, starvation, loss and metrics, runs through the loop."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.configs import FPTConfig, LoaderConfig, TrainConfig
from kinema.models.fpt.data_rules import NoTrainingSample, SamplingRule, frame_to_image
from kinema.models.fpt.mixture import GaussianMixture
from kinema.models.fpt.model import FlowPokeTransformer
from kinema.pipelines import train
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.bench import fpt_step
from kinema.pipelines.bench.fpt_learning import fit_mixture
from kinema.pipelines.bench.fpt_loader import decode_from_start, write_mpeg1
from kinema.pipelines.errors import StageError
from kinema.pipelines.loader import ClipIndex, Loader, Skip
from kinema.pipelines.loader.reader import stack
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_tracks
from kinema.pipelines.train.recipes.fpt.metrics import observed_coverage, poke_bins
from kinema.pipelines.train.recipes.fpt.recipe import FPTRecipe, draw_motion, model_image, square_pixels

GAP = 3
SMALL = FPTConfig(preset="fpt_tiny", image_px=64, gap_s=GAP / 24, num_pokes=6, queries_per_poke=4, min_tracks=16)


@pytest.fixture(autouse=True)
def serial(monkeypatch, tmp_path):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two scenes with nothing but a panning background, of which the square is 64 of 96 columns; then a still one."""
    folder = tmp_path_factory.mktemp("fpt")
    clips = write_scene_clips(scenes(), folder / "clips")
    write_scene_tracks(scenes(), clips, folder / "tracks", grid=12)
    return folder


def scenes() -> list[Scene]:
    moving = [Scene(s, 64, 96, num_frames=8, num_objects=0, camera="pan", speed_px=2.0) for s in (1, 2)]
    return [*moving, Scene(3, 64, 96, num_frames=8, num_objects=0, camera="still")]


def index_of(data: Path) -> ClipIndex:
    return ClipIndex.open(data / "clips", None, data / "tracks")


def config(data: Path, out: Path, **changes) -> TrainConfig:
    base = TrainConfig(
        clips=str(data / "clips"),
        tracks=str(data / "tracks"),
        out=str(out),
        model="fpt",
        settings=SMALL,
        loader=LoaderConfig(num_workers=0, samples_per_clip=2, shuffle_window=2),
        batch_size=2,
        steps=2,
        lr=1e-4,
        log_every=1,
        pictures_every=0,
    )
    return dataclasses.replace(base, **changes)


def batch_of(data: Path, recipe: FPTRecipe, number: int = 2) -> dict:
    index = index_of(data)
    return stack([recipe.read_sample(index.clip(i), np.random.default_rng(i)) for i in range(number)], ["a"] * number)


@pytest.mark.parametrize("queries", ["unbiased", "published"])
def test_a_sample_shows_a_frame_and_where_its_points_go(data, queries):
    """Positions lie in the square that is shown, and every flow is the pan from that frame, in sides of the square."""
    index, recipe = index_of(data), FPTRecipe(dataclasses.replace(SMALL, queries=queries))
    for scene, number in zip(scenes()[:2], range(2), strict=True):
        for seed in range(4):
            sample = recipe.read_sample(index.clip(number), np.random.default_rng(seed))
            assert not sample["camera_static"] and sample["query_pos"].shape == (6, 4, 2)
            shown = sample["image"].numpy().astype(float)
            start = min(range(8), key=lambda t: np.abs(scene.frame(t)[:, 16:80] - shown).mean())
            expected = scene.flow_px(start, start + GAP)[:, 0, 0] / 64
            for part in ("poke", "query"):
                pos, flow = (sample[f"{part}_{what}"].reshape(-1, 2).numpy() for what in ("pos", "flow"))
                assert pos.min() >= 0 and pos.max() <= 1
                np.testing.assert_allclose(flow, np.broadcast_to(expected, flow.shape), atol=1e-3)


def test_a_still_camera_is_noticed_and_the_gap_is_in_seconds(data):
    clip = index_of(data).clip(2)
    assert FPTRecipe(SMALL).read_sample(clip, np.random.default_rng(0))["camera_static"]
    long = FPTRecipe(dataclasses.replace(SMALL, gap_s=8 / 24))
    assert long.read_sample(clip, np.random.default_rng(0)) == Skip("clip shorter than the time gap")
    just = FPTRecipe(dataclasses.replace(SMALL, gap_s=7 / 24))
    assert not isinstance(just.read_sample(clip, np.random.default_rng(0)), Skip)


def test_samples_read_together_equal_those_read_alone(data):
    clip, recipe = index_of(data).clip(0), FPTRecipe(SMALL)
    together = recipe.read_samples(clip, [np.random.default_rng(i) for i in range(5)])
    for i, sample in enumerate(together):
        alone = recipe.read_sample(clip, np.random.default_rng(i))
        assert all(torch.equal(torch.as_tensor(sample[name]), torch.as_tensor(alone[name])) for name in sample)


def test_frames_are_cut_and_resized_as_the_published_loader_does():
    frame = Scene(5, 90, 131).frame(0)
    pixels = square_pixels(frame, 64)
    assert pixels.shape == (64, 64, 3)
    assert (model_image(pixels[None])[0] - frame_to_image(frame, 64)).abs().max() < 1.1 / 127.5


def test_start_frames_are_drawn_evenly_from_those_with_enough_tracks():
    rng = np.random.default_rng(0)
    points, visible = rng.random((9, 30, 2)), np.ones((9, 30), bool)
    visible[[1, 4], :25] = False
    rule = SamplingRule(num_pokes=4, queries_per_poke=2, min_num_tracks=10)
    starts = [draw_motion(points, visible, 2, rule, rng).start for _ in range(1000)]
    assert set(starts) == {0, 2, 3, 5, 6}
    assert min(starts.count(start) for start in set(starts)) > 150
    motion = draw_motion(points, visible, 2, rule, rng)
    np.testing.assert_array_equal(motion.pos + motion.flow, points[motion.start + 2, motion.tracks])
    assert motion.end == motion.start + 2
    visible[:] = False
    with pytest.raises(NoTrainingSample, match="too few visible tracks: at most 0 of 30"):
        draw_motion(points, visible, 2, rule, rng)


STARVED = [
    ({"gap_s": 1.0}, "256 x clip shorter than the time gap"),
    ({"min_tracks": 150}, "256 x too few visible tracks"),
    ({"num_pokes": 200, "min_tracks": 1}, "256 x too few visible tracks"),
]


@pytest.mark.parametrize(("change", "reason"), STARVED)
@pytest.mark.parametrize("samples_per_clip", [1, 2])
def test_data_without_a_single_sample_is_refused_with_the_reason_counted(data, change, reason, samples_per_clip):
    recipe = FPTRecipe(dataclasses.replace(SMALL, **change))
    settings = LoaderConfig(num_workers=0, samples_per_clip=samples_per_clip)
    loader = Loader(index_of(data), recipe.read_sample, settings, 2, seed=0, read_samples=recipe.read_samples)
    with pytest.raises(StageError, match=f"no usable sample in .*3 clips gave none .{reason}"):
        next(iter(loader))


def test_such_data_ends_a_run(data, tmp_path):
    settings = config(data, tmp_path / "run", settings=dataclasses.replace(SMALL, gap_s=1.0))
    with pytest.raises(StageError, match="3 clips gave none .256 x clip shorter than the time gap"):
        train.run(settings)


def test_a_run_logs_its_metrics_and_gives_the_model_back(data, tmp_path):
    settings = config(data, tmp_path / "run", accumulate=2)
    assert train.run(settings).step == 2
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = {"loss", "epe", "pck_0.01", "pck_0.05", "pck_0.1", "coverage_10", "coverage_90", "camera_static_share"}
    assert wanted | {f"{m}.pokes_{bin}" for m in ("nll", "epe") for bin in ("0", "1", "2_4", "5")} <= set(points[0])
    assert len(points) == 2 and all(np.isfinite(value) for value in points[-1].values())
    assert list((tmp_path / "run" / "pictures").glob("pokes_density_mean_sample_*.png"))
    model = train.load_model(tmp_path / "run")
    assert isinstance(model, FlowPokeTransformer) and not model.training
    again = FPTRecipe(SMALL, weights=str(tmp_path / "run")).build()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_tracks_are_asked_for_and_belong_to_the_identity_of_a_run(data, tmp_path):
    with pytest.raises(ValueError, match="train.tracks is empty and fpt needs it"):
        train.run(config(data, tmp_path / "run", tracks=""))
    train.run(config(data, tmp_path / "run", steps=1))
    clips = index_of(data).clips_url
    other = write_scene_tracks(scenes(), Artifact.read(clips), tmp_path / "tracks", grid=11)
    with pytest.raises(ValueError, match="data.tracks"):
        train.run(config(data, tmp_path / "run", tracks=other.url))
    relative = train.absolute_paths(
        config(data, tmp_path / "run", tracks="tracks", settings=FPTConfig(encoder_weights="w.pt"))
    )
    assert Path(relative.tracks).is_absolute() and Path(relative.settings.encoder_weights).is_absolute()


def test_encoder_weights_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="there are none for tiny_vit8"):
        FPTRecipe(dataclasses.replace(SMALL, encoder_weights="published")).check()


def test_every_weight_that_trains_gets_a_gradient_and_bfloat16_agrees(data):
    recipe = FPTRecipe(SMALL)
    torch.manual_seed(0)
    model = recipe.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # closed branches pass nothing on
                parameter.normal_(std=0.02)
    batch = batch_of(data, recipe)
    loss = recipe.loss(model, batch)
    loss.value.backward()
    assert loss.value.dtype == torch.float64 and loss.num_samples == 2
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    with torch.autocast("cpu", torch.bfloat16):
        narrow = recipe.loss(model, batch)
    assert narrow.value.dtype == torch.float64
    assert narrow.value.item() == pytest.approx(loss.value.item(), abs=0.05)


def test_loss_is_the_mean_of_the_likelihoods_by_number_of_pokes(data):
    recipe = FPTRecipe(SMALL)
    model, batch = recipe.build(), batch_of(data, recipe)
    loss = recipe.loss(model, batch)
    names = ("poke_pos", "poke_flow", "query_pos", "query_flow", "camera_static")
    nll = model.negative_log_likelihood(*(batch[name] for name in names), model_image(batch["image"]))
    assert loss.value.item() == pytest.approx(nll.mean().item(), abs=1e-6)
    assert loss.metrics["nll.pokes_2_4"].item() == pytest.approx(nll[:, 2:5].mean().item(), abs=1e-6)


@pytest.mark.parametrize("num_pokes", [1, 2, 5, 6, 128])
def test_poke_bins_cover_every_number_once(num_pokes):
    covered = [pokes for _, groups in poke_bins(num_pokes) for pokes in range(num_pokes)[groups]]
    assert covered == list(range(num_pokes))
    assert dict(poke_bins(128))["100_127"] == slice(100, 128)


def test_coverage_of_a_calibrated_and_of_an_overconfident_model():
    torch.manual_seed(0)
    scale = 0.1 * torch.eye(2, dtype=torch.float64).expand(4, 8, 8, 2, 2, 2)
    loc = torch.randn(4, 8, 8, 2, 2, dtype=torch.float64)
    truth = GaussianMixture(torch.zeros(4, 8, 8, 2, dtype=torch.float64), loc, scale)
    flow = truth.sample()
    honest = observed_coverage(truth, flow)
    proud = observed_coverage(GaussianMixture(truth.logits, loc, scale / 3), flow)
    for percent in (10, 30, 50, 70, 90):
        assert honest[f"coverage_{percent}"].item() == pytest.approx(percent / 100, abs=0.1)
    assert proud["coverage_90"] < 0.5


def test_the_unconditional_mixture_is_the_one_that_made_the_data():
    torch.manual_seed(1)
    loc = torch.tensor([[0.0, 0.0], [0.5, 0.1]], dtype=torch.float64)
    scale = torch.tensor([[[0.02, 0], [0.01, 0.03]], [[0.1, 0], [0.0, 0.05]]], dtype=torch.float64)
    truth = GaussianMixture(torch.tensor([0.7, 0.3], dtype=torch.float64).log(), loc, scale)
    values = truth.sample((4000,))
    fitted = fit_mixture(values, components=2)
    assert fitted.log_prob(values).mean() == pytest.approx(truth.log_prob(values).mean().item(), abs=0.01)


def test_benches_compare_equal_things(tmp_path, monkeypatch):
    frames = np.stack(list(Scene(4, 64, 64, num_frames=5).frames()))
    write_mpeg1(tmp_path / "a.mpg", frames)
    decoded = decode_from_start(tmp_path / "a.mpg", 4)
    assert np.abs(decoded.astype(int) - frames).mean() < 8
    np.testing.assert_array_equal(decode_from_start(tmp_path / "a.mpg", 2, only_last=True)[0], decoded[2])
    monkeypatch.setattr(fpt_step, "CONFIG", dataclasses.replace(SMALL, image_px=96))
    monkeypatch.setattr(fpt_step, "MODEL", {**fpt_step.MODEL, "width": 64, "head_dim": 32})
    ours, dense = fpt_step.Step("ours", 1), fpt_step.Step("dense mask", 1)
    assert ours() == pytest.approx(dense(), abs=1e-6)
    assert ours.model.transformer.layers[0].self_qkv.weight.grad is not None
