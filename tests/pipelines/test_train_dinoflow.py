"""DinoFlow trains on stored flow, on one rank or two, teaches, is registered, and says what it cannot use."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from kinema.configs import LoaderConfig, TeachConfig, TrainConfig, load_stage
from kinema.configs.models.dinoflow import DinoFlowConfig
from kinema.models.dinoflow import FlowModel, FlowModelConfig
from kinema.models.dinoflow.join import join
from kinema.models.dinoflow.model import UntrainedEncoderWarning, dinoflow
from kinema.pipelines import teach, train
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.batch_norm import RankBatchNorm2d, synchronise_batch_norms
from kinema.pipelines.train.loop import TrainJob, train_worker
from kinema.pipelines.train.meter import read_metrics
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.stop import Stop

SCENES = [Scene(seed=s, height=64, width=80, num_frames=3, speed_px=3.0) for s in range(4)]
SMALL = DinoFlowConfig(backbone="nano_vit8", width=16, freeze_encoder=False, crop=(48, 64))


@pytest.fixture(autouse=True)
def serial(monkeypatch, tmp_path):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinoflow")
    clips = write_scene_clips(SCENES, folder / "clips")
    write_scene_flow(SCENES, clips, folder / "flow", gaps=(1, -1))
    return folder


def config(data, out, **changes) -> TrainConfig:
    base = TrainConfig(
        clips=str(data / "clips"),
        flow=str(data / "flow"),
        out=str(out),
        model="dinoflow",
        settings=SMALL,
        loader=LoaderConfig(num_workers=0),
        batch_size=4,
        steps=3,
        lr=1e-3,
        schedule="poly",
        warmup_steps=2,
        log_every=1,
        pictures_every=0,
    )
    return dataclasses.replace(base, **changes)


def learn(settings: TrainConfig, place: Place = Place()) -> None:  # noqa: B008
    """The loop in this process."""
    recipe = train.make_recipe(settings)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    train_worker(TrainJob(settings, recipe, train.ClipLoader(settings, recipe), out, {}), place, Stop())


def one_rank(rank: int, folder: Path, settings: TrainConfig) -> None:
    """A batch norm on unequal shares of a batch, then a step of training."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    made = torch.load(folder / "made.pt")
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(5))
    norm.load_state_dict(made["state"])
    parameter = norm[0].weight
    synchronise_batch_norms(norm)
    assert isinstance(norm[0], RankBatchNorm2d) and norm[0].weight is parameter
    share = slice(1) if rank == 0 else slice(1, None)
    x = made["x"][share].requires_grad_()
    out = norm(x)
    (out * made["target"][share]).sum().backward()
    gradient = norm[0].weight.grad
    dist.all_reduce(gradient)
    torch.save({"out": out.detach(), "dx": x.grad, "dw": gradient, "state": norm.state_dict()}, folder / f"{rank}.pt")
    learn(settings, Place(rank, 2))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """What `one_rank` made on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 6) + torch.arange(5.0).view(5, 1, 1) * 20  # means far from zero
    state = {f"0.{k}": v for k, v in torch.nn.BatchNorm2d(5).state_dict().items()}
    state["0.weight"] = torch.randn(5)
    torch.save({"x": x, "target": torch.randn(3, 5, 4, 6), "state": state}, folder / "made.pt")
    settings = config(data, folder / "run", num_workers=2, steps=1)
    mp.start_processes(one_rank, (folder, settings), nprocs=2, start_method="spawn")
    return folder


def test_two_ranks_learn_what_one_does(two_ranks, data, tmp_path):
    """Batch statistics are those of both ranks: same loss, gradient and running statistics."""
    learn(config(data, tmp_path / "run", steps=1))
    (one,), (two,) = read_metrics(tmp_path / "run"), read_metrics(two_ranks / "run")
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    one, two = (checkpoint.read_tensors(checkpoint.latest_checkpoint(f / "run")) for f in (tmp_path, two_ranks))
    assert set(one) == set(two) == set(FlowModel(FlowModelConfig("nano_vit8", 16)).state_dict())
    for name in one:
        if "running" in name:
            torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-4)
    assert one["head.detail_enhancer.norm.num_batches_tracked"] == 1


def test_a_batch_norm_over_ranks_is_one_over_the_joined_batch(two_ranks):
    """Outputs, gradients and statistics against torch's own on the whole batch."""
    made, found = torch.load(two_ranks / "made.pt"), [torch.load(two_ranks / f"{rank}.pt") for rank in (0, 1)]
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(5))
    norm.load_state_dict(made["state"])
    x = made["x"].requires_grad_()
    out = norm(x)
    (out * made["target"]).sum().backward()
    torch.testing.assert_close(torch.cat([f["out"] for f in found]), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([f["dx"] for f in found]), x.grad, atol=1e-5, rtol=1e-4)
    for part in found:
        torch.testing.assert_close(part["dw"], norm[0].weight.grad, atol=1e-4, rtol=1e-4)
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(part["state"][name], value, atol=1e-5, rtol=1e-5)


def test_a_frozen_encoder_keeps_its_weights_and_the_head_moves(data, tmp_path):
    encoder = FlowModel(FlowModelConfig("nano_vit8", width=16)).encoder
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    frozen = dataclasses.replace(SMALL, freeze_encoder=True, backbone_weights=str(tmp_path / "encoder.safetensors"))
    learn(config(data, tmp_path / "run", settings=frozen))
    tensors = checkpoint.read_tensors(checkpoint.latest_checkpoint(tmp_path / "run"))
    for name, value in encoder.state_dict().items():
        assert torch.equal(tensors[f"encoder.{name}"], value)
    fresh = train.build_model(config(data, tmp_path / "run", settings=frozen)).state_dict()
    assert any(not torch.equal(tensors[k], fresh[k]) for k in fresh if k.startswith("head.output_conv"))


def test_a_run_teaches_under_the_configuration_its_shapes_show(data, tmp_path):
    learn(config(data, tmp_path / "run", settings=dataclasses.replace(SMALL, reading="A")))
    settings = TeachConfig(clips=str(data / "clips"), out=str(tmp_path / "flow"), teacher="dinoflow", gaps=(1,))
    summary = teach.run(dataclasses.replace(settings, weights=str(tmp_path / "run")))
    assert summary.quarantined == 0
    clip = ClipIndex.open(data / "clips", tmp_path / "flow").clip(0)
    network = train.load_model(tmp_path / "run")
    assert network.head.motion.reading == "A"
    first, second = (torch.from_numpy(f).permute(2, 0, 1)[None].float() / 255 for f in clip.frames([0, 1]))
    with torch.inference_mode():
        expected = network(first, second)[0].numpy()
    np.testing.assert_allclose(clip.flow(0, 1), expected, atol=1 / 128 + 1e-3)


def test_a_head_alone_teaches_nothing_until_it_is_joined_with_its_encoder(data, tmp_path):
    model = FlowModel(FlowModelConfig()).eval()
    save_file(model.head.state_dict(), tmp_path / "head.safetensors")
    save_file(model.encoder.state_dict(), tmp_path / "encoder.safetensors")
    settings = TeachConfig(clips=str(data / "clips"), out=str(tmp_path / "flow"), teacher="dinoflow")
    with pytest.raises(ValueError, match=r"hold DinoFlow's head alone.*python -m kinema\.models\.dinoflow\.join"):
        teach.run(dataclasses.replace(settings, weights=str(tmp_path / "head.safetensors")))
    join(tmp_path / "head.safetensors", tmp_path / "encoder.safetensors", tmp_path / "whole.safetensors")
    found = dinoflow(weights=tmp_path / "whole.safetensors").state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no head in the file"):
        dinoflow(weights=tmp_path / "encoder.safetensors")


@pytest.mark.parametrize("backbone", ["dinov2_vits14_reg", "dinov3_vits16", "nano_vit8", "nano_conv4"])
def test_shapes_tell_backbones_apart(backbone, tmp_path):
    state = FlowModel(FlowModelConfig(backbone, width=8, use_cls_token=backbone != "nano_vit8")).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    config = dinoflow(weights=tmp_path / "model.safetensors").config
    assert (config.backbone, config.width, config.use_cls_token) == (backbone, 8, backbone != "nano_vit8")


def test_continuing_from_another_run_starts_with_its_weights(data, tmp_path):
    learn(config(data, tmp_path / "chairs"))
    first = train.load_model(tmp_path / "chairs").state_dict()
    second = train.make_recipe(config(data, tmp_path / "things", weights=str(tmp_path / "chairs"))).build().state_dict()
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_the_published_heads_file_can_be_trained_on(data, tmp_path):
    model = FlowModel(FlowModelConfig("nano_vit8", width=16, reading="A"))
    save_file(model.head.state_dict(), tmp_path / "head.safetensors")
    with pytest.warns(UntrainedEncoderWarning):
        built = train.make_recipe(config(data, tmp_path, weights=str(tmp_path / "head.safetensors"))).build()
    assert built.head.motion.reading == "A"


@pytest.mark.parametrize("matching", [0.0, 1.0])
def test_samples_without_known_pixels_do_not_count(matching):
    recipe = train.make_recipe(TrainConfig(model="dinoflow", settings=dataclasses.replace(SMALL, matching=matching)))
    module = recipe.build()
    batch = {name: torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8) for name in ("image1", "image2")}
    batch |= {"flow_px": torch.zeros(2, 2, 32, 32), "valid": torch.ones(2, 32, 32)}
    batch["valid"][0] = 0
    assert recipe.loss(module, batch).num_samples == 1
    batch["valid"][:] = 0
    nothing = recipe.loss(module, batch)
    assert nothing.num_samples == 0 and nothing.value == 0
    nothing.value.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_matching_is_added_to_the_loss_of_whole_patches():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"image1": images, "image2": images, "flow_px": torch.zeros(2, 2, 32, 32), "valid": torch.ones(2, 32, 32)}
    values = {}
    for matching in (0.0, 0.5, 1.0):
        settings = dataclasses.replace(SMALL, matching=matching)
        recipe = train.make_recipe(TrainConfig(model="dinoflow", settings=settings))
        torch.manual_seed(0)
        values[matching] = recipe.loss(recipe.build(), batch).value.item()
    assert values[1.0] - values[0.0] == pytest.approx(2 * (values[0.5] - values[0.0]), rel=1e-3)
    assert 0 < values[1.0] - values[0.0] < math.log(81)  # better than chance: equal pictures match at once
    uneven = dataclasses.replace(SMALL, matching=1.0, crop=(48, 60))
    with pytest.raises(ValueError, match=r"dinoflow.crop=\[48,60\] is no multiple of their 8 px"):
        train.make_recipe(TrainConfig(model="dinoflow", settings=uneven)).check()


def test_a_registered_dinoflow_gives_the_same_flow(data, tmp_path):
    """Packaged and loaded again, from the description alone: two batches of images in, flow out."""
    from kinema.pipelines.registry.package import package
    from kinema.pipelines.registry.shipped.flow import answer
    from kinema.pipelines.registry.shipped.network import build_model

    learn(config(data, tmp_path / "run"))
    network = train.load_model(tmp_path / "run")
    made = package(train.make_recipe(config(data, tmp_path / "run")).export(network), tmp_path / "package")
    described = json.loads(made.config.read_text())
    again = build_model(FlowModel, described, made.weights)
    images = {
        name: np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8) for name in ("image1", "image2")
    }
    with torch.inference_mode():
        flow = answer(again, images, {}, described, torch.device("cpu"))["flow"]
        first, second = (
            torch.from_numpy(images[name]).permute(0, 3, 1, 2).float() / 255 for name in ("image1", "image2")
        )
        expected = network(first, second)
    np.testing.assert_allclose(flow, expected.numpy(), atol=1e-5)
    assert load_file(made.weights).keys() == network.state_dict().keys()


def test_settings_come_from_files_and_the_command_line():
    found = load_stage(
        "train", None, ["model=dinoflow", "dinoflow.backbone=nano_vit8", "dinoflow.augmentation.hue=0.1"]
    )
    assert found.settings.augment == "dense" and found.settings.augmentation.hue == 0.1
    with pytest.raises(ValueError, match="dinoflow.width=6 is out of range"):
        load_stage("train", None, ["model=dinoflow", "dinoflow.width=6"])
