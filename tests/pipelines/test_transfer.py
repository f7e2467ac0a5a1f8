"""`kinema transfer`: from a video, a picture and a prompt to a film that plays; what it refuses; adapters of runs."""

import json
import re
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from kinema.configs import LoaderConfig, TrainConfig, TransferConfig, TransferTrainingConfig
from kinema.configs.models.table import MODELS
from kinema.models.dismo.transfer.base import DEFAULT_BASE, load_base
from kinema.models.dismo.transfer.model import MotionTransfer
from kinema.models.weights import LEDGER, licence_notice
from kinema.pipelines import train, transfer
from kinema.pipelines.cli import main
from kinema.pipelines.loader import ClipIndex, Skip
from kinema.pipelines.pictures.motion import write_mp4
from kinema.pipelines.registry.source import source_of
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.transfer.extractor import load_extractor
from tests.tiny_video_model import HEIGHT, WIDTH, write_dismo_run

pytest.importorskip("diffusers", reason="the extra `transfer` is not installed")


def moving(count: int, fps: float, path) -> None:
    """A bright square that moves to the right; the frame's number is its position."""
    frames = np.full((count, 48, 64, 3), 40, np.uint8)
    for t, frame in enumerate(frames):
        frame[16:32, t : t + 16] = 220
    write_mp4(path, frames, fps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_video_base):
    """Inputs of a transfer: video, picture, a DisMo run, an adapter file."""
    folder = tmp_path_factory.mktemp("transfer")
    moving(40, 24.0, folder / "motion.mp4")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / "image.png")
    write_dismo_run(folder / "dismo")
    model = MotionTransfer(load_base(str(tiny_video_base)), load_extractor(str(folder / "dismo")), rank=4, d_cond=16)
    torch.manual_seed(0)
    torch.save({name: torch.randn_like(value) * 0.2 for name, value in model.adapter_state().items()}, folder / "a.pt")
    return folder


def settings(folder, video_base, **changes):
    given = {
        "motion": folder / "motion.mp4",
        "image": folder / "image.png",
        "prompt": "a dog runs",
        "base": video_base,
        "weights": folder / "a.pt",
        "extractor": folder / "dismo",
        "negative_prompt": "blur",
        "num_frames": 9,
        "steps": 2,
    }
    return {key: value if isinstance(value, int | float) else str(value) for key, value in (given | changes).items()}


def decoded(path) -> tuple[np.ndarray, Fraction]:
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]), stream.average_rate


def test_from_the_command_line_to_a_film_that_plays(folder, tiny_video_base, tmp_path, capfd):
    out = tmp_path / "x.mp4"
    arguments = [f"{key}={value}" for key, value in settings(folder, tiny_video_base, out=out).items()]
    assert main(["transfer", "--json", *arguments]) == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    frames, rate = decoded(out)
    assert frames.shape == (9, HEIGHT, WIDTH, 3) and rate == 8
    assert (summary["frames"], summary["height"], summary["width"], summary["fps"]) == (9, HEIGHT, WIDTH, 8.0)
    assert summary["guidance"] == 6.0 and summary["seconds"] > 0 and summary["out"] == str(out)
    unlike = []
    for seed in (0, 1):
        given = settings(folder, tiny_video_base, out=tmp_path / f"{seed}.mp4", seed=seed)
        assert transfer.run(TransferConfig(**given)).frames == 9
        unlike.append(np.abs(decoded(tmp_path / f"{seed}.mp4")[0].astype(float) - frames).mean())
    # The same pictures; x264 may write them in other bytes (docs/LOG.md).
    assert unlike[0] < 0.1 * unlike[1], unlike


def test_motion_is_read_by_its_timestamps(folder):
    """40 frames at 24 a second: every third one at 8, every second one at 12, from a second on the 24th."""
    from kinema.pipelines.transfer.inputs import read_motion

    def numbers(**changes):
        config = TransferConfig(motion=str(folder / "motion.mp4"), **changes)
        return [int(np.argmax(frame[24, :, 0] > 130)) for frame in read_motion(config)]

    assert numbers(num_frames=9) == list(range(0, 27, 3))
    assert numbers(fps=12.0, num_frames=5) == [0, 2, 4, 6, 8]
    assert numbers(fps=24.0, num_frames=5, start_s=1.0) == [24, 25, 26, 27, 28]
    assert len(numbers(num_frames=0)) == 13
    assert numbers(fps=24.0, num_frames=0) == list(range(37))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 25}, "motion=.* has 13 frames at 8 a second; use num_frames=13, or a longer video"),
        ({"fps": 1.0}, "has 1 frames at 1 a second, motion needs at least 5"),
        ({"fps": 60.0}, "has 24 frames a second, fewer than fps=60; use fps=24 or less"),
        ({"motion": "image.png"}, "motion=.*image.png "),
        ({"motion": "nothing.mp4"}, "motion=.* cannot be read as a video"),
        ({"image": "motion.mp4"}, "is no picture that can be read; give a PNG or JPEG"),
        ({"height": 480, "width": 720}, "size 480x720: .* makes videos of 64x96 only"),
        ({"prompt": "a dog runs over the hill"}, "tokens, at most 12 fit; shorten it"),
        ({"base": "dismo"}, "base=.* lacks scheduler, .*; give a folder"),
        ({"weights": "image.png"}, "weights=.*image.png: not a readable checkpoint"),
        ({"weights": "dismo"}, "is a run of dismo; give one of model=cogvideox5b_i2v_large"),
        ({"weights": "broken.pt"}, "broken.pt do not fit the adapter .missing: init_gru_state"),
        ({"extractor": "nothing"}, "extractor=.*nothing: model=.*nothing does not exist"),
        ({"offload": "model", "device": "cpu"}, "offload=model keeps weights away from a GPU"),
        ({"out": "x.gif"}, "the video becomes an .mp4"),
        ({"num_frames": 8}, "num_frames=8 is out of range: use 4 n \\+ 1 frames, such as 5 or 9"),
    ],
)
def test_one_line_says_what_is_wrong(folder, tiny_video_base, tmp_path, capfd, change, message):
    state = torch.load(folder / "a.pt")
    torch.save({key: value for key, value in state.items() if key != "init_gru_state"}, folder / "broken.pt")
    named = ("motion", "image", "base", "weights", "extractor")
    change = {key: folder / value if key in named else value for key, value in change.items()}
    given = settings(folder, tiny_video_base, **({"out": tmp_path / "x.mp4"} | change))
    assert main(["transfer", *(f"{key}={value}" for key, value in given.items())]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("kinema transfer: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "x.mp4").exists()


def test_without_the_extra(folder, tiny_video_base, tmp_path, monkeypatch, capfd):
    """This command names the extra; no other one imports it."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    given = settings(folder, tiny_video_base, out=tmp_path / "x.mp4")
    assert main(["transfer", *(f"{key}={value}" for key, value in given.items())]) == 2
    err = capfd.readouterr().err.strip().splitlines()
    assert len(err) == 1 and "pip install 'kinema[transfer]'" in err[0]
    assert main(["models"]) == 0 and "cogvideox5b_i2v_large" in capfd.readouterr().out
    script = "import kinema.pipelines.cli, kinema.pipelines.api, sys; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    scenes = [Scene(seed, height=48, width=64, num_frames=30) for seed in range(2)]
    scenes.append(Scene(9, height=48, width=64, num_frames=6))
    return write_scene_clips(scenes, tmp_path_factory.mktemp("data") / "clips", clips_per_shard=3)


def training(folder, base, clips, out, **changes) -> TrainConfig:
    small = TransferTrainingConfig(
        base=str(base), extractor=str(folder / "dismo"), rank=4, d_cond=16, fps=12.0, num_frames=5, height=HEIGHT,
        width=WIDTH, sample_steps=1,
    )  # fmt: skip
    given = dict(
        model="cogvideox5b_i2v_large", settings=small, clips=clips.url, out=str(out), steps=4, batch_size=2, lr=1e-3,
        checkpoint_every=2, log_every=1, pictures_every=0, use_gpu="no", loader=LoaderConfig(num_workers=0),
    )  # fmt: skip
    return TrainConfig(**(given | changes))


@pytest.fixture(scope="module")
def runs(folder, tiny_video_base, clips, tmp_path_factory):
    """Four steps in one go, and the same with a stop after two."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{out / 'mlflow.db'}")
        train.run(training(folder, tiny_video_base, clips, out / "whole"))
        train.run(training(folder, tiny_video_base, clips, out / "parts", steps=2))
        train.run(training(folder, tiny_video_base, clips, out / "parts"))
    return out


def test_a_resumed_training_equals_the_undisturbed_one(runs):
    whole, parts = (checkpoint.latest_checkpoint(runs / name) for name in ("whole", "parts"))
    assert whole.name == parts.name == "step_00000004"
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_a_checkpoint_is_an_adapter(runs, folder, tiny_video_base, tmp_path):
    """Exactly the published keys, small, and `kinema transfer` takes the run with the extractor it was trained with."""
    newest = checkpoint.latest_checkpoint(runs / "whole")
    first = checkpoint.read_tensors(checkpoint.checkpoint_folder(runs / "whole", 2))
    tensors = checkpoint.read_tensors(newest)
    model = train.load_model(runs / "whole")
    assert set(tensors) == model.adapter_names
    assert all(torch.equal(value, tensors[key]) for key, value in model.adapter_state().items())
    assert any(not torch.equal(value, first[key]) for key, value in tensors.items())
    made = settings(folder, tiny_video_base, out=tmp_path / "x.mp4", weights=runs / "whole", extractor="", num_frames=5)
    assert transfer.run(TransferConfig(**made)).frames == 5
    assert decoded(tmp_path / "x.mp4")[0].shape == (5, HEIGHT, WIDTH, 3)


def test_samples_are_seeded_and_captioned(folder, tiny_video_base, clips):
    recipe = make_recipe(training(folder, tiny_video_base, clips, "x"))
    index = ClipIndex.open(clips.url)
    clip = next(index.clip(i) for i in range(len(index)) if index.clip(i).num_frames == 30)
    clip.meta["labels"] = {"caption": "a dog"}
    sample = recipe.read_sample(clip, np.random.default_rng(1))
    assert sample["prompt"] == "a dog" and sample["frames"].shape == (5, HEIGHT, WIDTH, 3)
    assert torch.equal(recipe.read_sample(clip, np.random.default_rng(1))["frames"], sample["frames"])
    clip.meta["labels"] = {}
    assert recipe.read_sample(clip, np.random.default_rng(1))["prompt"] == ""
    short = next(index.clip(i) for i in range(len(index)) if index.clip(i).num_frames == 6)
    assert isinstance(recipe.read_sample(short, np.random.default_rng(0)), Skip)


def test_pictures_and_export(folder, tiny_video_base, clips):
    recipe = make_recipe(training(folder, tiny_video_base, clips, "x"))
    module = recipe.build()
    module.eval()
    batch = {"frames": torch.zeros(2, 5, HEIGHT, WIDTH, 3, dtype=torch.uint8), "prompt": ["a", "b"]}
    picture = recipe.pictures(module, batch)["clip_generated"]
    assert picture.shape == (4 * HEIGHT + 6, 4 * WIDTH + 6, 3)
    exported = recipe.export(module.model)
    assert module.model.adapter_names < set(exported.tensors)
    assert {name.partition(".")[0] for name in set(exported.tensors) - module.model.adapter_names} == {
        "motion_extractor"
    }


def test_the_row_and_its_licence():
    row = MODELS["cogvideox5b_i2v_large"]
    assert TransferConfig().base == TransferTrainingConfig().base == DEFAULT_BASE
    assert row.kind == "video" and row.section == "transfer" and LEDGER[row.weights].non_commercial
    assert "not for commercial use" in licence_notice(row.weights)
    with pytest.raises(ValueError, match="which has no form in the registry"):
        source_of(row.name)
