"""Every kind of model that is served: registered, it answers `predict` with the trained model's numbers."""

import os

import mlflow
import numpy as np
import pytest
import torch

from kinema.configs import FlowNetworkConfig, FPTConfig, RegisterConfig, TrainConfig
from kinema.configs.load import to_mapping
from kinema.configs.models.table import MODELS
from kinema.models.flow.raft import raft_small
from kinema.pipelines import registry
from kinema.pipelines.model_address import load_address
from kinema.pipelines.train import checkpoint, load_model
from kinema.pipelines.train.parallel import seed_step
from kinema.pipelines.train.recipes.choose import make_recipe

POKES = {
    "poke_pos": np.array([[0.3, 0.4], [0.7, 0.2]]),
    "poke_flow": np.array([[0.1, -0.05], [0.0, 0.2]]),
    "query_pos": np.array([[0.5, 0.5], [0.1, 0.9], [0.31, 0.4]]),
}


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    yield uri
    patch.undo()


def make_run(folder, config):
    """A run folder with one checkpoint: the initial model, shaken so that nothing is zero by initialisation."""
    recipe = make_recipe(config)
    seed_step(config.seed, 0, 0)
    module = recipe.build()
    with torch.no_grad():
        for value in module.parameters() if not config.weights else ():
            value.add_(0.02 * torch.randn_like(value))
    meta = {"identity": {}, "train_config": to_mapping(config), "loss": 1.0, "samples_per_second": 1.0}
    checkpoint.save_checkpoint(folder, 1, module.state_dict(), {}, meta, keep=1)
    return folder


def pyfunc(summary, store):
    mlflow.set_tracking_uri(store)
    return mlflow.pyfunc.load_model(summary.uri)


def test_fpt_answers_with_mixtures(tmp_path, store):
    run = make_run(tmp_path / "run", TrainConfig(model="fpt", settings=FPTConfig(preset="fpt_nano", image_px=48)))
    summary = registry.run(RegisterConfig(model=str(run)))
    assert summary.name == "kinema-fpt" and summary.champion
    loaded = pyfunc(summary, store)
    assert [spec.name for spec in loaded.metadata.signature.inputs] == ["image", "poke_pos", "poke_flow", "query_pos"]
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 80, 3), dtype=np.uint8)
    found = loaded.predict({"image": image, **POKES}, params={"camera_static": False})
    model = load_model(run)
    pos, flow, query = (torch.from_numpy(v).float()[None].expand(2, -1, -1) for v in POKES.values())
    with torch.no_grad():
        seen = model.embed_image(torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1)
        expected = model.predict_parallel(pos, flow, query, False, seen)
    np.testing.assert_allclose(found["means"], expected.loc, atol=1e-5)
    np.testing.assert_allclose(found["scales"], expected.scale_tril, atol=1e-5)
    np.testing.assert_allclose(found["weights"].sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(found["mean"], expected.mean, atol=1e-5)
    static = loaded.predict({"image": image / 255.0, **POKES})
    assert np.abs(static["mean"] - found["mean"]).max() > 0, "by default the camera stands still"
    without = loaded.predict({"image": image[0], **POKES, "poke_pos": np.zeros((0, 2)), "poke_flow": np.zeros((0, 2))})
    assert without["mean"].shape == (1, 3, 2)
    assert load_address(summary.uri, kind="pokes", user="test").row.name == "fpt"
    with pytest.raises(ValueError, match="is a Flow Poke Transformer, which gives motion from pokes; davis takes"):
        load_address(summary.uri, kind="features", user="davis")
    with pytest.raises(mlflow.exceptions.MlflowException, match="query_pos"):
        loaded.predict({"image": image, "poke_pos": POKES["poke_pos"], "poke_flow": POKES["poke_flow"]})


def test_a_flow_network_answers_with_flow(tmp_path, store, shared_data):
    weights = str(shared_data / "weights" / "raft-small.pth")
    config = TrainConfig(model="raft_small", settings=FlowNetworkConfig(), weights=weights)
    summary = registry.run(RegisterConfig(model=str(make_run(tmp_path / "run", config))))
    assert summary.name == "kinema-raft-small"
    loaded = pyfunc(summary, store)
    assert [spec.name for spec in loaded.metadata.signature.outputs] == ["flow"]
    images = np.random.default_rng(1).random((2, 1, 128, 144, 3)).astype(np.float32)
    found = loaded.predict({"image1": images[0], "image2": images[1]}, params={"iters": 3})["flow"]
    first, second = (torch.from_numpy(i).permute(0, 3, 1, 2) for i in images)
    with torch.no_grad():
        expected = raft_small(weights=weights)(first, second, iters=3).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(Exception, match="give two of one size"):
        loaded.predict({"image1": images[0], "image2": images[1][:, :, :136]})


def test_what_is_shipped_runs_without_our_dependencies(tmp_path):
    """Every served row packs; nothing in the packages imports, when it is loaded, more than torch, numpy and mlflow."""
    from kinema.pipelines.registry.package import module_closure

    served = [row for row in MODELS.values() if row.serving]
    assert len(served) >= 8
    for row in served:
        assert module_closure(row.network.partition(":")[0])
        assert row.registered_name and set(row.registered_name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_einops_travels_with_its_licence(tmp_path):
    from kinema.pipelines.registry.package import write_code

    code = write_code("kinema.models.fpt.model", "kinema_fpt", tmp_path)
    assert "MIT" in (code / "einops" / "LICENSE").read_text()
    own = [path for path in code.rglob("*.py") if path.parent.name != "einops"]
    assert not any("from einops" in path.read_text() or "from kinema." in path.read_text() for path in own)
    assert os.path.getsize(code / "einops" / "einops.py") > 10_000
