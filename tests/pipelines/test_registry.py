"""Registration, aliases, and a consumer that has mlflow, torch and numpy but nothing of ours."""

import base64
import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kinema.configs import FlowFeatConfig, RegisterConfig, TrainConfig
from kinema.configs.load import to_mapping
from kinema.models.backbones.vision_transformer import CONFIGS
from kinema.pipelines import registry, tracking
from kinema.pipelines.model_names import named_row
from kinema.pipelines.registry.card import serving_form
from kinema.pipelines.registry.package import module_closure, package
from kinema.pipelines.registry.shipped.inputs import images_to_input
from kinema.pipelines.registry.shipped.weights_file import read_weights
from kinema.pipelines.train import checkpoint, load_model
from kinema.pipelines.train.parallel import seed_step
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.train.recipes.protocol import ExportedModel

NAME = "kinema-flowfeat"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One MLflow store for the module."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    yield uri
    os.environ.pop("MLFLOW_TRACKING_URI")
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_run(folder: Path, seed: int, **metrics: float) -> Path:
    """A run folder with one checkpoint of an untrained model, and its MLflow run with evaluation metrics."""
    config = TrainConfig(seed=seed, settings=FlowFeatConfig(variant="dino_vits16_yt", resize=64, crop=32))
    recipe = make_recipe(config)
    seed_step(seed, 0, 0)
    module = recipe.build()
    with torch.no_grad():
        for value in module.decoder_ema.ema_model.parameters():
            value.add_(0.01 * torch.randn_like(value))  # so that averaged and trained weights differ
    tracker = tracking.start_run("tests", f"train-{seed}", {})
    tracker.log_metrics({f"evaluate.{name}": value for name, value in metrics.items()})
    tracker.end()
    record = {
        "run_id": tracker.run_id,
        "tracking_uri": tracker.handle.uri,
        "config_hash": "c0ffee",
        "inputs": {"clips": {"url": "/somewhere", "hash": "1234"}},
        "notices": ["the encoder dino_vits16 is untrained"],
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    meta = {"identity": {}, "train_config": to_mapping(config), "loss": 1.0, "samples_per_second": 1.0}
    checkpoint.save_checkpoint(folder, 7, module.state_dict(), {}, meta, keep=1)
    return folder


@pytest.fixture(scope="module")
def first(store, tmp_path_factory):
    """The first registered run."""
    run = make_run(tmp_path_factory.mktemp("first") / "run", 1, davis_jf=0.5)
    return run, registry.run(RegisterConfig(model=str(run)))


def test_first_version_becomes_champion_with_its_facts(store, first):
    run, summary = first
    assert (summary.version, summary.champion, summary.metric, summary.value) == (1, True, "davis_jf", 0.5)
    client = tracking.open_client(store)
    version = client.get_model_version_by_alias(NAME, "champion")
    assert version.run_id == summary.run_id == json.loads((run / "run.json").read_text())["run_id"]
    assert client.get_model_version_by_alias(NAME, "candidate").version == version.version
    assert version.tags["kinema.data.clips"] == "1234" and version.tags["kinema.config_hash"] == "c0ffee"
    assert version.tags["licence.decoder"] == "Apache-2.0" and float(version.tags["metric.davis_jf"]) == 0.5


def test_only_a_better_version_becomes_champion(store, tmp_path, monkeypatch):
    """Equal is not better; a version without the metric is a candidate only; the same weights register once."""
    small = dataclasses.replace(CONFIGS["dino_vits16"], width=32, num_heads=2)
    monkeypatch.setitem(CONFIGS, "dino_vits16", small)
    name = {"name": "contest"}
    runs = [make_run(tmp_path / str(i), 10 + i, **m) for i, m in enumerate([{"a": 1.0}, {"a": 1.0}, {}, {"a": 1.5}])]
    one, equal, unknown, better = (registry.run(RegisterConfig(model=str(r), **name)) for r in runs)
    assert [s.version for s in (one, equal, unknown, better)] == [1, 2, 3, 4]
    assert [s.champion for s in (one, equal, unknown, better)] == [True, False, False, True]
    assert equal.uri == "models:/contest@candidate" and better.champion_before == 1
    client = tracking.open_client(store)
    said = [client.get_model_version("contest", str(number)).description for number in (1, 2, 3, 4)]
    assert "Champion: a 1, no other to beat." in said[0]
    assert "Candidate: a 1, version 1 has 1; version 1 stays champion." in said[1]
    assert "Candidate: not evaluated, unlike version 1; version 1 stays champion." in said[2]
    assert "Champion: a 1.5, version 1 has 1." in said[3] and said[3].startswith("**FlowFeat**")
    lower = registry.run(RegisterConfig(model=str(runs[0]), higher_is_better=False, **name))
    assert (lower.version, lower.champion) == (1, True)
    aliases = tracking.open_client(store).get_registered_model("contest").aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {"candidate": 1, "champion": 1}


def test_registered_module_equals_the_trainers(store, first):
    run, summary = first
    image = torch.rand(2, 3, 48, 32)
    with torch.no_grad():
        ours, theirs = load_model(run)(image), registry.load_registered(summary.uri)(image)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "address", ["models:/nothing@champion", "models:/kinema-flowfeat@best", "models:/kinema-flowfeat/9"]
)
def test_unknown_addresses_say_what_to_do(store, first, address):
    with pytest.raises(ValueError, match="is not in the registry at .*kinema register"):
        registry.load_registered(address)


def test_malformed_address_and_missing_run(store, tmp_path):
    with pytest.raises(ValueError, match="is not models:/NAME@ALIAS or models:/NAME/VERSION"):
        registry.load_registered("models:/kinema-flowfeat")
    with pytest.raises(ValueError, match="neither a checkpoint nor a run"):
        registry.run(RegisterConfig(model=str(tmp_path)))


CONSUMER = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import models, kernels, kinema
assert models.WHOSE == kernels.WHOSE == kinema.WHOSE == "theirs"
import mlflow, numpy
model = mlflow.pyfunc.load_model("models:/kinema-flowfeat@champion")
images = numpy.load(sys.argv[4])
numpy.savez(sys.argv[3] + ".uint8.npz", **model.predict(images))
numpy.savez(sys.argv[3] + ".float.npz", **model.predict(images.astype("float32") / 255))
absent = [n for n in ("jaxtyping", "einops", "safetensors", "ray", "beartype", "omegaconf") if n in sys.modules]
assert not absent, absent
assert models.WHOSE == "theirs"
"""

HIDDEN = ("kinema", "jaxtyping", "einops", "safetensors", "ray", "beartype", "omegaconf", "av", "webdataset")


def consumer_folders(folder: Path) -> tuple[Path, Path]:
    """A folder with unrelated packages of our names, and one that links to what mlflow, torch and numpy need."""
    theirs, libraries = folder / "theirs", folder / "libraries"
    for name in ("models", "kernels", "kinema", "configs"):
        (theirs / name).mkdir(parents=True)
        (theirs / name / "__init__.py").write_text("WHOSE = 'theirs'\n")
    libraries.mkdir()
    for entry in Path(np.__file__).parents[1].iterdir():
        hidden = any(entry.name.lower().startswith((name, f"__editable___{name}")) for name in HIDDEN)
        if not hidden and entry.suffix != ".pth":
            (libraries / entry.name).symlink_to(entry)
    return theirs, libraries


def test_a_consumer_without_our_code_gets_the_trainers_features(store, first, tmp_path):
    run, _ = first
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    theirs, libraries = consumer_folders(tmp_path)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        CONSUMER,
        theirs,
        libraries,
        tmp_path / "out",
        tmp_path / "images.npy",
    ]
    done = subprocess.run([str(c) for c in command], cwd=theirs, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(IMAGENET[n]).view(3, 1, 1) for n in ("mean", "std"))
    with torch.no_grad():
        y_enc, y_dec = load_model(run)((x - mean) / std)
    for form in ("uint8", "float"):
        got = np.load(tmp_path / f"out.{form}.npz")
        np.testing.assert_allclose(got["y_enc"], y_enc.numpy(), atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(got["y_dec"], y_dec.numpy(), atol=1e-5, rtol=1e-5)


def model_id_of(client, name: str, version: str) -> str:
    """MLflow's SQL registry keeps the logged model of a version as its source."""
    return client.get_model_version(name, version).source.removeprefix("models:/")


def test_no_pickle_and_no_path_of_this_machine_in_the_registered_files(store, first, tmp_path):
    client = tracking.open_client(store)
    location = client.get_logged_model(model_id_of(client, NAME, "1")).artifact_location
    source = location.removeprefix("file://")
    files = [p for p in Path(source).rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
    assert {p.suffix for p in files} <= {".py", ".safetensors", ".json", ".yaml", ".txt", ""}
    text = (Path(source) / "MLmodel").read_text()
    assert "/tmp" not in text and str(Path.cwd()) not in text


def test_package_holds_only_what_the_model_needs(tmp_path):
    names = set(module_closure("kinema.models.flowfeat.model"))
    assert {
        "kinema.models.flowfeat.model",
        "kinema.models.backbones.dpt",
        "kinema.models.backbones.vision_transformer",
    } <= names
    assert not any("raft" in name or "pipelines" in name for name in names)
    with pytest.raises(ValueError, match="imports cv2, which consumers"):
        module_closure("kinema.models.flow.dis")


def test_unknown_architecture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="architecture 'other' is not known; known are flowfeat"):
        package(ExportedModel("other", {}, {}), tmp_path)


def test_images_in_any_usual_form_give_the_same_input():
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
    wanted = images_to_input(images, IMAGENET)
    assert wanted.shape == (2, 3, 8, 6) and wanted.dtype == torch.float32
    for other in (images.transpose(0, 3, 1, 2), images / 255.0, torch.from_numpy(images)):
        torch.testing.assert_close(images_to_input(other, IMAGENET), wanted)
    torch.testing.assert_close(images_to_input(images[0], IMAGENET), wanted[:1])
    grey = (np.full((1, 2, 2, 3), 0.5) - IMAGENET["mean"]) / IMAGENET["std"]
    np.testing.assert_allclose(
        images_to_input(np.full((1, 2, 2, 3), 0.5), IMAGENET)[0, :, 0, 0], grey[0, 0, 0], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 6), np.uint8), "images have shape"),
        (np.zeros((0, 8, 6, 3), np.uint8), "images have shape"),
        (np.full((1, 8, 6, 3), 2.0), r"float images are in 2..2; give 0..1"),
        (np.full((1, 8, 6, 3), np.nan), "float images are in nan"),
        (np.full((1, 8, 6, 3), -1, np.int32), "whole numbers are in -1..-1; give 0..255"),
        (np.full((1, 8, 6, 3), 256), "whole numbers are in 256..256"),
        ([np.zeros((8, 6, 3), np.uint8).tolist(), np.zeros((9, 6, 3), np.uint8).tolist()], "ragged|different"),
        ("image.png", "is no base64 of a PNG or JPEG"),
    ],
)
def test_images_that_cannot_be_meant_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        images_to_input(images, IMAGENET)


def as_png(image: np.ndarray) -> str:
    """A PNG in base64, made by OpenCV."""
    return base64.b64encode(cv2.imencode(".png", image[..., ::-1])[1]).decode()


def test_images_as_json_carries_them_give_the_same_input():
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)
    wanted = images_to_input(images, IMAGENET)
    texts = [as_png(image) for image in images]
    objects = np.empty(2, object)
    objects[:] = texts
    for other in (images.tolist(), images.astype(np.int64), np.array(images.tolist(), dtype=object), texts, objects):
        torch.testing.assert_close(images_to_input(other, IMAGENET), wanted)
    fractions = (images / 255).tolist()
    fractions[0][0][0][0] = 0  # JSON writes 0.0 and 1.0 without a fraction in some languages
    wanted[0, 0, 0, 0] = -IMAGENET["mean"][0] / IMAGENET["std"][0]
    torch.testing.assert_close(images_to_input(np.array(fractions, dtype=object), IMAGENET), wanted)
    for one in (texts[1], {"b64": texts[1]}, f"data:image/png;base64,{texts[1]}", np.array(texts[1], dtype=object)):
        torch.testing.assert_close(images_to_input(one, IMAGENET), wanted[1:])


def bodies(image: np.ndarray) -> dict[str, dict]:
    """One image in the forms in which people send it."""
    whole, fractions, text = image.tolist(), (image / 255).tolist(), as_png(image)
    return {
        "inputs, integers": {"inputs": {"images": [whole]}},
        "inputs, bare integers": {"inputs": [whole]},
        "inputs, floats": {"inputs": {"images": [fractions]}},
        "inputs, PNG": {"inputs": {"images": [text]}},
        "instances, integers": {"instances": [{"images": whole}]},
        "instances, bare integers": {"instances": [whole]},
        "instances, PNG": {"instances": [{"images": text}]},
        "rows, PNG": {"dataframe_split": {"columns": ["images"], "data": [[text]]}},
    }


def test_the_scoring_server_takes_every_body_form_and_gives_small_answers(store, first, monkeypatch):
    """Without params an image of 32 x 48 comes back as 4 MB of JSON."""
    import mlflow.pyfunc.scoring_server as scoring_server
    from starlette.testclient import TestClient

    run, summary = first
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", store, raising=False)
    client = TestClient(scoring_server.init(mlflow.pyfunc.load_model(summary.uri)))
    image = np.random.default_rng(2).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    with torch.no_grad():
        y_enc, y_dec = load_model(run)(images_to_input(image, IMAGENET))
    params = {"pooled": True}
    for form, body in bodies(image).items():
        answer = client.post("/invocations", json=body | {"params": params})
        assert answer.status_code == 200, (form, answer.text[:500])
        found = answer.json()["predictions"]
        np.testing.assert_allclose(found["y_dec"], y_dec.mean(dim=(2, 3)), atol=1e-4, err_msg=form)
        np.testing.assert_allclose(found["y_enc"], y_enc.mean(dim=(2, 3)), atol=1e-4, err_msg=form)
    body = bodies(image)["inputs, PNG"]
    small = client.post("/invocations", json=body | {"params": {"outputs": "y_dec", "stride": 8, "dtype": "int8"}})
    found = {name: np.array(value) for name, value in small.json()["predictions"].items()}
    assert found.keys() == {"y_dec", "y_dec_scale"} and len(small.content) < 20_000
    wanted = y_dec[:, :, 4::8, 4::8].numpy()
    half_step = 0.51 * found["y_dec_scale"][:, None, None]
    assert (np.abs(found["y_dec"] * found["y_dec_scale"][:, None, None] - wanted) <= half_step).all()
    wrong = client.post("/invocations", json=body | {"params": {"outputs": "y"}})
    assert wrong.status_code == 400 and "y is not known; use some of y_enc, y_dec" in wrong.text


def test_a_version_says_what_it_is_and_belongs_to_its_run(store, first):
    run, summary = first
    client = tracking.open_client(store)
    version = client.get_model_version(NAME, "1")
    logged = client.get_logged_model(model_id_of(client, NAME, "1"))
    assert logged.source_run_id == summary.run_id and logged.status == "READY" and logged.model_type == "features"
    outputs = client.get_run(summary.run_id).outputs.model_outputs
    assert [output.model_id for output in outputs] == [logged.model_id]
    assert {metric.key: metric.value for metric in logged.metrics} == {"davis_jf": 0.5}
    for text in ("FlowFeat", "Trained with kinema for 7 steps", "/somewhere", "davis_jf", "is untrained", "`stride`"):
        assert text in version.description, text
    assert 'load_model("models:/kinema-flowfeat@champion")' in version.description
    assert client.get_registered_model(NAME).description.startswith("FlowFeat: Pixel-dense")
    info = mlflow.models.get_model_info(logged.artifact_location.removeprefix("file://"))
    assert info.signature.inputs.input_names() == ["images"] and info.metadata["kinema"]["outputs"]["y_dec"] == [-1] * 4
    assert [spec.name for spec in info.signature.params.params] == ["outputs", "pooled", "stride", "dtype"]


@pytest.mark.parametrize(
    "name", ["raft_small", "fpt_tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sea_raft_s", "cotracker3"))]
)
def test_networks_of_the_table_register_by_name(store, tmp_path, name):
    """Weights from a file; what comes back equals the network, code and all."""
    row = named_row(name)
    torch.manual_seed(0)
    network = row.make(name)
    save_file({key: value.clone() for key, value in network.state_dict().items()}, tmp_path / "w.safetensors")
    summary = registry.run(RegisterConfig(model=name, weights=str(tmp_path / "w.safetensors")))
    assert summary.champion and summary.name == row.registered_name
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        monkey = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(store)
        try:
            model = mlflow.pyfunc.load_model(summary.uri)
        finally:
            mlflow.set_tracking_uri(monkey)
        form = serving_form(row)
        answer = model.predict(form.example())
    assert [str(w.message) for w in said if "mlflow" in str(w.filename)] == []
    assert answer.keys() == form.OUTPUTS.keys()
    loaded = registry.load_registered(summary.uri)
    assert type(loaded).__name__ == type(network).__name__
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), network.state_dict().values(), strict=True)
    )


def test_register_leaks_no_warning_of_mlflows(store, tmp_path, monkeypatch, capfd):
    small = dataclasses.replace(CONFIGS["dino_vits16"], width=32, num_heads=2)
    monkeypatch.setitem(CONFIGS, "dino_vits16", small)
    run = make_run(tmp_path / "run", 30)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        registry.run(RegisterConfig(model=str(run), name="quiet"))
    assert [str(w.message) for w in said] == [] and "WARNING" not in capfd.readouterr().err


def test_dis_has_no_form_in_the_registry(store):
    with pytest.raises(ValueError, match="model=dis is a DIS, which has no form in the registry; known are flowfeat"):
        registry.run(RegisterConfig(model="dis"))


def test_weights_reader_agrees_with_the_library_and_refuses_cut_files(tmp_path):
    from safetensors.torch import save_file

    tensors = {
        "a": torch.randn(3, 5), "b": torch.arange(4), "c": torch.tensor(True), "d": torch.randn(2).bfloat16(),
        "e": torch.empty(0, 3), "f": torch.randn(2).half(), "g": torch.tensor([1, 255], dtype=torch.uint8),
    }  # fmt: skip
    path = tmp_path / "w.safetensors"
    save_file(tensors, path)
    read = read_weights(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is cut off"):
        read_weights(path)
    path.write_bytes(b"PK\x03\x04" * 4)
    with pytest.raises(ValueError, match="no safetensors file"):
        read_weights(path)
