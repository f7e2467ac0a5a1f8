"""DisMo's recipe: what it is shown, what it learns from it, and what comes out of a run."""

import dataclasses
import io

import numpy as np
import pytest
import torch

from kinema.configs import DisMoConfig, EmbedConfig, RegisterConfig, TrainConfig
from kinema.configs.load import to_mapping
from kinema.pipelines import embed, registry
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.loader import ClipIndex, Skip
from kinema.pipelines.registry.files import load_registered
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips
from kinema.pipelines.train import checkpoint, load_model
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.train.recipes.dismo.metrics import draw_noise_shares, spread, step_metrics

SETTINGS = DisMoConfig(
    preset="dismo_tiny", autoencoder="pixels", pixels_per_latent=4, frame_px=32, fps=12.0, sample_steps=2
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Artifact:
    scenes = [Scene(seed, height=48, width=64, num_frames=30) for seed in range(2)]
    scenes.append(Scene(9, height=48, width=64, num_frames=6))
    return write_scene_clips(scenes, tmp_path_factory.mktemp("data") / "clips", clips_per_shard=3)


@pytest.fixture(scope="module")
def recipe():
    return make_recipe(TrainConfig(model="dismo", settings=SETTINGS))


def clip_of(clips, num_frames):
    index = ClipIndex.open(clips.url)
    return next(index.clip(i) for i in range(len(index)) if index.clip(i).num_frames == num_frames)


@pytest.fixture(scope="module")
def batch(recipe, clips):
    samples = recipe.read_samples(clip_of(clips, 30), [np.random.default_rng(i) for i in range(2)])
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@pytest.fixture(scope="module")
def module(recipe):
    torch.manual_seed(0)
    return recipe.build()


@pytest.fixture(scope="module")
def run(module, tmp_path_factory):
    """A run with one checkpoint, whose average differs from the trained weights."""
    with torch.no_grad():
        for value in module.average.ema_model.parameters():
            value.add_(0.02 * torch.randn_like(value))
    folder = tmp_path_factory.mktemp("run")
    config = to_mapping(TrainConfig(model="dismo", settings=SETTINGS))
    meta = {"identity": {}, "train_config": config, "loss": 1.0, "samples_per_second": 1.0}
    checkpoint.save_checkpoint(folder, 1, module.state_dict(), {}, meta, keep=1)
    return folder


def test_samples_are_seeded_and_read_together(recipe, clips):
    """Each sample depends on its own generator alone: read with others or by itself."""
    clip = clip_of(clips, 30)
    together = recipe.read_samples(clip, [np.random.default_rng(i) for i in (0, 1)])
    alone = recipe.read_sample(clip, np.random.default_rng(1))
    for name, value in alone.items():
        assert torch.equal(together[1][name], value), name
    assert not torch.equal(together[0]["motion"], alone["motion"])
    assert alone["motion"].shape == (8, 32, 32, 3) and alone["motion"].dtype == torch.uint8
    assert alone["source"].shape == alone["target"].shape == (4, 32, 32, 3)
    assert ((alone["delta_time"] > 0) & (alone["delta_time"] <= 4 + 1e-4)).all()


def test_source_and_target_share_their_augmentation(clips):
    """With the clip standing still in between, a pair would be equal: here a target at its source's own frame is."""
    still = dataclasses.replace(SETTINGS, motion_angle_deg=0.0)
    recipe = make_recipe(TrainConfig(model="dismo", settings=still))
    clip = clip_of(clips, 30)
    frames = np.repeat(clip.frames([3]), clip.num_frames, axis=0)
    clip.frames = lambda indices: frames[list(indices)]
    sample = recipe.read_sample(clip, np.random.default_rng(4))
    assert torch.equal(sample["source"], sample["target"])
    assert all(torch.equal(sample["motion"][0], frame) for frame in sample["motion"])
    assert not torch.equal(sample["source"][0], sample["source"][1]), "each pair has its own"


def test_more_noise_and_turned_hues(clips, recipe):
    torch.manual_seed(0)
    plain, shifted = (draw_noise_shares(64, torch.device("cpu"), shift).logit() for shift in (0.0, 0.8))
    assert plain.mean().abs() < 0.05 and (shifted.mean() - 0.8).abs() < 0.05
    turned = make_recipe(TrainConfig(model="dismo", settings=dataclasses.replace(SETTINGS, motion_hue=0.5)))
    clip = clip_of(clips, 30)
    for seed in range(4):
        ours, theirs = (made.read_sample(clip, np.random.default_rng(seed)) for made in (turned, recipe))
        difference = (ours["motion"].float() - theirs["motion"].float()).abs().mean(dim=(0, 1, 2))
        assert difference.max() > 2, "the motion branch has other colours"


def test_short_clips_are_skipped(recipe, clips):
    assert isinstance(recipe.read_sample(clip_of(clips, 6), np.random.default_rng(0)), Skip)


def test_loss_metrics_and_pictures(recipe, module, batch):
    torch.manual_seed(1)
    loss = recipe.loss(module, batch)
    loss.value.backward()
    assert loss.num_samples == 2 and 0.5 < loss.value < 5
    bins = torch.stack([loss.metrics[f"loss_t{i}"] for i in (1, 2, 3, 4)])
    torch.testing.assert_close(bins.mean(), loss.value.detach())  # 8 pairs, two in each quarter
    assert 0 <= loss.metrics["motion_spread"] <= 1 and loss.metrics["motion_norm"] > 0
    assert all(p.grad is not None for p in module.model.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in module.average.ema_model.parameters())
    module.eval()
    with torch.no_grad():
        picture = recipe.pictures(module, batch)["source_target_latent_generated"]
    module.train()
    assert picture.dtype == np.uint8 and picture.shape == (2 * 32 + 2, 4 * 32 + 6, 3)


def test_a_collapse_is_seen(module, batch, recipe, capsys):
    motion = torch.randn(4, 3, 8)
    assert spread(motion) > 0.5 and spread(motion[:1].expand(4, -1, -1)) == 0
    result = module.model(
        batch["motion"].float() / 127.5 - 1,
        batch["source"].float() / 127.5 - 1,
        torch.zeros(8, 8, 8, 3),
        batch["delta_time"],
    )
    low = dataclasses.replace(result, motion=result.motion[:1].detach().expand(2, -1, -1))
    t = torch.full((8,), 0.5)
    assert step_metrics(low, t, 0.05)["collapsed"] == 1
    assert step_metrics(dataclasses.replace(result, motion=torch.randn(2, 4, 8)), t, 0.05)["collapsed"] == 0
    alarmed = dataclasses.replace(recipe, config=dataclasses.replace(SETTINGS, collapse_spread=2.0))
    with torch.no_grad():
        alarmed.pictures(module, batch)
    assert "collapsed" in capsys.readouterr().err


def test_noise_shares_are_distributed_as_published():
    torch.manual_seed(0)
    drawn = torch.cat([draw_noise_shares(16, torch.device("cpu")) for _ in range(400)])
    normal = torch.logit(drawn)
    assert normal.mean().abs() < 0.02 and (normal.std() - 1).abs() < 0.02
    quarters = torch.special.ndtr(torch.logit(draw_noise_shares(8, torch.device("cpu")))) * 4
    assert torch.bincount(quarters.long(), minlength=4).tolist() == [2, 2, 2, 2]


def test_published_model_is_the_average(recipe, module, run):
    found, trained = load_model(run), load_model(run, ema=False)
    state = module.average.ema_model.motion_extractor.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    assert not torch.equal(found.proj.weight, trained.proj.weight)


def test_a_run_goes_on_from_another(run, module):
    """weights=RUN starts from the trained weights of its newest checkpoint."""
    other = make_recipe(TrainConfig(model="dismo", settings=SETTINGS, weights=str(run)))
    other.check()
    started, wanted = other.build().model.state_dict(), module.model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in started.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_px": 50}, "multiple of 8.*use 48"),
        ({"preset": "dismo_large"}, "pixels has 3 channels, but the generator.*makes 4"),
        ({"encoder_weights": "published"}, "none for tiny_vit8"),
        ({"autoencoder": "/nowhere/ae"}, "cannot be loaded|not installed"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    recipe = make_recipe(TrainConfig(model="dismo", settings=dataclasses.replace(SETTINGS, **change)))
    with pytest.raises(ValueError, match=message) as caught:
        recipe.check()
    assert "\n" not in str(caught.value)


def test_embeddings_of_clips(run, clips, tmp_path, monkeypatch):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    out = tmp_path / "features"
    config = EmbedConfig(model=str(run), clips=clips.url, out=str(out), fps=12.0, num_actors=1, allowed_quarantine=0.5)
    summary = embed.run(config)
    assert summary.clips == 2 and summary.quarantined == 1  # six frames are three at this rate
    features = Artifact.read(out)
    clip = clip_of(clips, 30)
    row = next(row for row in features.samples().to_pylist() if row["key"] == clip.key)
    assert row["frames"] == list(range(0, 22, 2))
    data = read_range(features.shard_url(row["shard"]), row["motion_offset"], row["motion_size"])
    stored = np.load(io.BytesIO(data), allow_pickle=False)
    with torch.no_grad():
        expected = load_model(run).forward_sliding(torch.from_numpy(clip.frames(range(0, 30, 2)))[None])[0]
    np.testing.assert_allclose(stored, expected, atol=1e-5)
    np.testing.assert_allclose(row["motion_mean"], expected.mean(0), atol=1e-5)


def test_a_registered_extractor_answers(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    summary = registry.run(RegisterConfig(model=str(run)))
    assert summary.name == "kinema-dismo"
    video = np.random.default_rng(0).integers(0, 256, (1, 10, 40, 56, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = load_model(run).forward_sliding(torch.from_numpy(video))
        np.testing.assert_allclose(
            load_registered(summary.uri).forward_sliding(torch.from_numpy(video)), expected, atol=1e-5
        )
    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pyfunc.load_model(summary.uri)
    np.testing.assert_allclose(loaded.predict({"video": video})["motion"], expected, atol=1e-4)
