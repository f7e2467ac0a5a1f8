"""A registered model in a new virtual environment of mlflow, torch and numpy, among packages that carry our names."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.configs import (
    ClipConfig,
    DisMoConfig,
    FlowFeatConfig,
    FlowNetworkConfig,
    FPTConfig,
    LoaderConfig,
    RegisterConfig,
    TrainConfig,
)
from kinema.configs.load import to_mapping
from kinema.pipelines import registry, train
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.recipes.choose import make_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
INSTALLED = ("mlflow", "torch", "numpy")
FOREIGN = ("models", "kernels", "pipelines", "configs", "kinema")
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

# Two pip outcomes that are no fault of the network: the pins contradict one another, or name nothing for this Python.
OUR_FAULT = ("ResolutionImpossible", "conflicting dependencies", "Requires-Python")

PREDICT = """
import importlib.util, sys
import numpy
assert all(importlib.util.find_spec(n) is None for n in ("jaxtyping", "einops", "safetensors", "ray", "omegaconf"))
assert importlib.util.find_spec("kinema").origin == "{foreign}/kinema/__init__.py"
import mlflow
model = mlflow.pyfunc.load_model("models:/kinema-flowfeat@champion")
images = numpy.load("{images}")
found = {{}}
for name in images.files:
    for feature, value in model.predict(images[name]).items():
        found[name + "." + feature] = value
numpy.savez("{out}", **found)
assert not {names!r} & set(sys.modules)
"""

OTHERS = """
import importlib.util, mlflow, numpy
assert importlib.util.find_spec("einops") is None
given = dict(numpy.load("{inputs}"))
pokes = mlflow.pyfunc.load_model("models:/kinema-fpt@champion")
names = ("image", "poke_pos", "poke_flow", "query_pos")
found = pokes.predict({{name: given[name] for name in names}}, params={{"camera_static": False}})
flow = mlflow.pyfunc.load_model("models:/kinema-raft-small@champion")
found["flow"] = flow.predict({{"image1": given["image1"], "image2": given["image2"]}}, params={{"iters": 3}})["flow"]
assert all(importlib.util.find_spec(n) is None for n in ("diffusers", "transformers"))
motion = mlflow.pyfunc.load_model("models:/kinema-dismo@champion")
found["motion"] = motion.predict({{"video": given["video"]}})["motion"]
numpy.savez("{out}", **found)
"""

REFUSE = """
import mlflow, numpy
model = mlflow.pyfunc.load_model("models:/kinema-flowfeat@champion")
for images in (
    numpy.zeros((4, 5), "uint8"), numpy.zeros((1, 32, 32, 5), "uint8"), numpy.zeros((0, 32, 32, 3), "uint8"),
    numpy.zeros((1, 8, 8, 3), "uint8"), numpy.full((1, 32, 32, 3), -1), numpy.full((1, 32, 32, 3), 255.0),
    numpy.full((1, 32, 32, 3), numpy.nan), numpy.array(["image.png"]), None,
):
    try:
        model.predict(images)
        print("accepted")
    except (ValueError, mlflow.MlflowException) as error:
        print(error)
"""


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory) -> Path:
    """The interpreter of a new environment with three packages, at the versions of our pins."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", CONSTRAINTS, *INSTALLED]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(part) for part in install], env=environment, capture_output=True, text=True)
    if done.returncode and not any(sign in done.stderr for sign in OUR_FAULT):
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-300:]]
        pytest.skip(f"{', '.join(INSTALLED)} cannot be installed here: {reason[-1]}")
    assert done.returncode == 0, done.stderr[-2000:]
    return python


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A model trained for three steps and registered: its run folder and the registry."""
    folder = tmp_path_factory.mktemp("registered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        patch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{folder / 'mlflow.db'}")
        patch.chdir(folder)  # files of the MLflow store lie below the working folder
        scenes = [Scene(seed=s, height=96, width=96, num_frames=6) for s in range(4)]
        clips = write_scene_clips(scenes, folder / "clips", ClipConfig(preset="veryfast"))
        write_scene_flow(scenes, clips, folder / "flow", gaps=(1, -1))
        config = TrainConfig(
            clips=str(folder / "clips"),
            flow=str(folder / "flow"),
            out=str(folder / "run"),
            settings=FlowFeatConfig(variant="dino_vits16_yt", resize=96, crop=64, ema_every=1, ema_decay=0.5),
            loader=LoaderConfig(num_workers=0),
            steps=3,
            batch_size=2,
            lr=1e-3,
        )
        train.run(config)
        assert registry.run(RegisterConfig(model=config.out)).champion
        yield Path(config.out), uri


@pytest.fixture(scope="module")
def consumer(fresh_python, registered, tmp_path_factory):
    """`consumer(code)`: what the code prints, run in a folder of packages with our names that cannot be imported."""
    folder = tmp_path_factory.mktemp("theirs")
    for name in FOREIGN:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('the unrelated package {name}')\n")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "MLFLOW_TRACKING_URI": registered[1],
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
    }

    def run(code: str) -> str:
        command = [str(fresh_python), "-c", code]  # `-c` puts the working folder in front of the path
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder, run.environment = folder, environment
    return run


def ask(port: int, body: dict) -> tuple[int, dict]:
    """Status and answer of a scoring server on loopback."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_mlflow_serves_and_predicts_from_the_fresh_environment(consumer, fresh_python, registered, tmp_path):
    """`mlflow models serve` and `predict`: integers, floats and a PNG give the trainer's pooled features."""
    image = np.random.default_rng(3).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    forms = {
        "integers": [image.tolist()],
        "floats": [(image / 255).tolist()],
        "png": [base64.b64encode(buffer.getvalue()).decode()],
    }
    model = train.load_model(registered[0])
    x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - MEAN) / STD
    with torch.no_grad():
        wanted = model(x)[1].mean(dim=(2, 3)).numpy()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mlflow_program = str(fresh_python.parent / "mlflow")
    place = ["-m", "models:/kinema-flowfeat@champion", "--env-manager", "local"]
    command = [mlflow_program, "models", "serve", *place, "--host", "127.0.0.1", "--port", str(port)]
    path = f"{fresh_python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**consumer.environment, "PATH": path}
    server = subprocess.Popen(command, cwd=consumer.folder, env=environment, start_new_session=True)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        for form, images in forms.items():
            status, answer = ask(port, {"inputs": {"images": images}, "params": {"pooled": True, "outputs": "y_dec"}})
            assert status == 200, (form, answer)
            np.testing.assert_allclose(answer["predictions"]["y_dec"], wanted, atol=1e-4, err_msg=form)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
    (tmp_path / "in.json").write_text(json.dumps({"inputs": {"images": forms["png"]}, "params": {"pooled": True}}))
    files = ["-i", str(tmp_path / "in.json"), "-o", str(tmp_path / "out.json")]
    command = [mlflow_program, "models", "predict", *place, *files]
    done = subprocess.run(command, cwd=consumer.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())["predictions"]
    np.testing.assert_allclose(found["y_dec"], wanted, atol=1e-4)


def usual_images() -> dict[str, np.ndarray]:
    """One and three images, of several sizes, in each of the usual forms."""
    rng = np.random.default_rng(0)
    images = {}
    for count, height, width in [(1, 64, 64), (3, 64, 64), (1, 96, 48), (3, 112, 176), (1, 224, 224), (3, 37, 53)]:
        values = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        name = f"{count}x{height}x{width}"
        images |= {f"{name}-bytes": values, f"{name}-floats": (values / 255).astype(np.float32)}
        images[f"{name}-channels-first"] = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    return images


def test_predict_gives_the_trainers_features(consumer, registered, tmp_path):
    """Equal to float rounding: the library versions, the threads and the arithmetic are the same."""
    images = usual_images()
    np.savez(tmp_path / "images.npz", **images)
    code = {"foreign": consumer.folder, "images": tmp_path / "images.npz", "out": tmp_path / "out.npz"}
    consumer(PREDICT.format(**code, names=set(FOREIGN)))
    found = np.load(tmp_path / "out.npz")
    model = train.load_model(registered[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    worst = 0.0
    for name, values in images.items():
        x = torch.from_numpy(values)
        x = x if name.endswith("channels-first") else x.permute(0, 3, 1, 2)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        with torch.no_grad():
            wanted = dict(zip(("y_enc", "y_dec"), model((x - MEAN) / STD), strict=True))
        for feature, value in wanted.items():
            got = found[f"{name}.{feature}"]
            assert got.dtype == np.float32 and got.shape == tuple(value.shape)
            worst = max(worst, float(np.abs(got - value.numpy()).max() / value.abs().max()))
    torch.set_num_threads(threads)
    print(f"\nfeatures in a fresh environment: at most {worst:.1e} of the largest from the trainer's")
    assert worst <= 1e-6


def test_pokes_flow_and_motion_are_the_trainers(consumer, registered, tmp_path, monkeypatch):
    """A Flow Poke Transformer, RAFT-small and DisMo's motion extractor, registered beside the features."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered[1])
    monkeypatch.chdir(registered[0].parent)
    rng = np.random.default_rng(1)
    runs = {}
    small = {
        "fpt": FPTConfig(preset="fpt_nano", image_px=48),
        "raft_small": FlowNetworkConfig(),
        "dismo": DisMoConfig(preset="dismo_tiny", autoencoder="pixels", pixels_per_latent=4, frame_px=32),
    }
    for model, settings in small.items():
        config = TrainConfig(model=model, settings=settings)
        recipe = make_recipe(config)
        module = recipe.build()
        with torch.no_grad():
            for value in module.parameters():
                value.add_(0.02 * torch.randn_like(value))
        meta = {"identity": {}, "train_config": to_mapping(config), "loss": 1.0, "samples_per_second": 1.0}
        runs[model] = tmp_path / model
        checkpoint.save_checkpoint(runs[model], 1, module.state_dict(), {}, meta, keep=1)
        assert registry.run(RegisterConfig(model=str(runs[model]))).champion
    inputs = {
        "image": rng.integers(0, 256, (1, 64, 80, 3), dtype=np.uint8),
        "poke_pos": rng.random((3, 2)),
        "poke_flow": 0.1 * rng.standard_normal((3, 2)),
        "query_pos": rng.random((5, 2)),
        "image1": rng.random((1, 128, 144, 3)).astype(np.float32),
        "image2": rng.random((1, 128, 144, 3)).astype(np.float32),
        "video": rng.integers(0, 256, (1, 11, 40, 56, 3), dtype=np.uint8),
    }
    np.savez(tmp_path / "inputs.npz", **inputs)
    consumer(OTHERS.format(inputs=tmp_path / "inputs.npz", out=tmp_path / "out.npz"))
    found = np.load(tmp_path / "out.npz")
    pos, flow, query = (torch.from_numpy(inputs[n]).float()[None] for n in ("poke_pos", "poke_flow", "query_pos"))
    first, second = (torch.from_numpy(inputs[name]).permute(0, 3, 1, 2) for name in ("image1", "image2"))
    with torch.no_grad():
        poker = train.load_model(runs["fpt"])
        seen = poker.embed_image(torch.from_numpy(inputs["image"]).permute(0, 3, 1, 2).float() / 127.5 - 1)
        mixture = poker.predict_parallel(pos, flow, query, False, seen)
        expected = train.load_model(runs["raft_small"])(first, second, iters=3)
        motion = train.load_model(runs["dismo"]).forward_sliding(torch.from_numpy(inputs["video"]))
    np.testing.assert_allclose(found["means"], mixture.loc, atol=1e-5)
    np.testing.assert_allclose(found["weights"], mixture.weights, atol=1e-5)
    np.testing.assert_allclose(found["flow"], expected, atol=1e-3, rtol=1e-4)
    np.testing.assert_allclose(found["motion"], motion, atol=1e-4)


def test_images_that_cannot_be_meant_are_refused_in_words(consumer):
    lines = consumer(REFUSE).splitlines()
    wanted = [
        "images have shape (4, 5); give [B, H, W, 3]",
        "images have shape (1, 32, 32, 5); give",
        "images have shape (0, 32, 32, 3); give",
        "image size 8x8: both sides must be at least one patch, 16 pixels",
        "images of whole numbers are in -1..-1; give 0..255",
        "float images are in 255..255; give 0..1",
        "float images are in nan..nan; give 0..1",
        "image 'image.png' is no base64 of a PNG or JPEG",
        "Failed to enforce schema of data 'None'",  # MLflow's own word: the model is not asked
    ]
    assert len(lines) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(lines, wanted, strict=True)), lines
