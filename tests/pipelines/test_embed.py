"""Features of every clip: equal to the model's, resumable, bad clips quarantined."""

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kinema.configs import EmbedConfig, FlowFeatConfig, TrainConfig
from kinema.configs.load import to_mapping
from kinema.models.backbones.vision_transformer import CONFIGS
from kinema.pipelines import embed
from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.pictures.images import normalise_images
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips
from kinema.pipelines.train import checkpoint, load_model
from kinema.pipelines.train.recipes.choose import make_recipe


@pytest.fixture(autouse=True, scope="module")
def tiny_model():
    """A ViT of width 32 in place of DINO S/16, in this process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = dataclasses.replace(CONFIGS["dino_vits16"], width=32, num_heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "dino_vits16", small)
        patch.setenv("KINEMA_ENGINE", "serial")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory) -> Path:
    """`run` and `clips` as every test gets them."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder / "run", seed=0)
    scenes = [Scene(seed, height=48, width=64, num_frames=5) for seed in range(5)]
    write_scene_clips(scenes, folder / "clips", clips_per_shard=2)
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A run with a checkpoint of an untrained model."""
    return shutil.copytree(made / "run", tmp_path / "run")


def make_run(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = TrainConfig(settings=FlowFeatConfig(variant="dino_vits16_yt", resize=64, crop=32))
    module = make_recipe(config).build()
    meta = {"identity": {}, "train_config": to_mapping(config), "loss": 1.0, "samples_per_second": 1.0}
    checkpoint.save_checkpoint(folder, 1, module.state_dict(), {}, meta, keep=1)
    return folder


@pytest.fixture
def clips(made, tmp_path) -> Artifact:
    return Artifact.read(shutil.copytree(made / "clips", tmp_path / "clips"))


def config(source: Artifact, run: Path, folder: Path, **changes) -> EmbedConfig:
    defaults = dict(
        model=str(run), clips=source.url, out=str(folder), frame_stride=2, short_side=32, batch_frames=2, num_actors=2
    )
    return EmbedConfig(**(defaults | changes))


def member(artifact: Artifact, row: dict, name: str) -> np.ndarray:
    data = read_range(artifact.shard_url(row["shard"]), row[f"{name}_offset"], row[f"{name}_size"])
    return np.load(io.BytesIO(data), allow_pickle=False)


def expected(clips: Artifact, run: Path, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of frames 0, 2 and 4, by hand."""
    frames = torch.from_numpy(ClipIndex.open(clips.url).clip(number).frames([0, 2, 4]))
    x = F.interpolate(frames.permute(0, 3, 1, 2).float() / 255, (32, 48), mode="bilinear", antialias=True)
    with torch.no_grad():
        return load_model(run)(normalise_images(x))


@pytest.mark.parametrize("which", ["y_dec", "y_enc"])
def test_dense_features_are_the_models(clips, run, tmp_path, which):
    summary = embed.run(config(clips, run, tmp_path / "out", features=which))
    assert (summary.clips, summary.frames, summary.quarantined, summary.shards) == (5, 15, 0, 3)
    out = Artifact.read(tmp_path / "out")
    assert out.verify() == []
    rows = out.samples().to_pylist()
    assert [r["key"] for r in rows] == clips.samples(["key"])["key"].to_pylist()
    stored = member(out, rows[3], which)
    wanted = expected(clips, run, 3)[which == "y_dec"]
    assert stored.dtype == np.float16 and rows[3]["frames"] == [0, 2, 4]
    np.testing.assert_allclose(stored, wanted.numpy(), atol=4e-3)


def test_maps_in_few_bytes_and_their_size_said_before(clips, run, tmp_path):
    """Every third pixel from the second on, a byte each: within half a step; the size said is what is stored."""
    said: list[str] = []
    small = config(clips, run, tmp_path / "out", features="y_dec", dtype="int8", stride=3)
    embed.run(small, report=said.append)
    out = Artifact.read(tmp_path / "out")
    row = out.samples().to_pylist()[3]
    stored, scale = member(out, row, "y_dec"), member(out, row, "y_dec_scale")
    wanted = expected(clips, run, 3)[1][:, :, 1::3, 1::3].numpy()
    assert stored.dtype == np.int8 and stored.shape == wanted.shape and scale.shape == (wanted.shape[1],)
    assert (np.abs(stored * scale[:, None, None] - wanted) <= scale[:, None, None] * 0.5001).all()
    np.testing.assert_allclose(np.abs(wanted).max(axis=(0, 2, 3)), scale * 127, rtol=1e-5)
    values = sum(np.prod(member(out, r, "y_dec").shape) for r in out.samples().to_pylist())
    (size,) = [line for line in said if "a frame, int8, stride 3" in line]
    assert f"y_dec of 15 frames takes {values / 1e6:.2f} MB" in size and "features=pooled next to nothing" in size
    with pytest.raises(ValueError, match="dtype"):
        embed.run(dataclasses.replace(small, dtype="float16"))


def test_pooled_features_are_in_the_shards_and_in_parquet(clips, run, tmp_path):
    embed.run(config(clips, run, tmp_path / "out"))
    out = Artifact.read(tmp_path / "out")
    row = out.samples().to_pylist()[1]
    for name, maps in zip(("y_enc", "y_dec"), expected(clips, run, 1), strict=True):
        by_frame = maps.mean(dim=(2, 3)).numpy()
        np.testing.assert_allclose(member(out, row, name), by_frame, atol=1e-5)
        np.testing.assert_allclose(row[f"{name}_mean"], by_frame.mean(0), atol=1e-5)


def test_a_second_run_does_nothing_and_a_lost_shard_comes_back_the_same(clips, run, tmp_path):
    embed.run(config(clips, run, tmp_path / "out"))
    whole = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert embed.run(config(clips, run, tmp_path / "out")).new_shards == 0
    next((tmp_path / "out").glob("*-000001.tar")).unlink()
    assert embed.run(config(clips, run, tmp_path / "out", batch_frames=3)).new_shards == 1
    again = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert again.keys() == whole.keys()


def test_another_model_is_refused(clips, run, tmp_path):
    embed.run(config(clips, run, tmp_path / "out"))
    with pytest.raises(ValueError, match="config"):
        embed.run(config(clips, make_run(tmp_path / "other", seed=1), tmp_path / "out"))


def test_a_damaged_clip_is_quarantined_and_the_rest_embedded(clips, run, tmp_path):
    row = clips.samples().to_pylist()[2]
    shard = Path(clips.shard_url(row["shard"]))
    whole = shard.read_bytes()
    data = bytearray(whole)
    data[row["mp4_offset"] + 40 : row["mp4_offset"] + row["mp4_size"]] = bytes(row["mp4_size"] - 40)
    shard.write_bytes(data)
    summary = embed.run(config(clips, run, tmp_path / "out"))
    assert (summary.clips, summary.quarantined, summary.exit_status) == (4, 1, 3)
    bad = Artifact.read(tmp_path / "out").quarantined().to_pylist()
    assert [b["key"] for b in bad] == [row["key"]] and bad[0]["stage"] == "embed"
    shard.write_bytes(whole)
    again = embed.run(config(clips, run, tmp_path / "out"))
    assert (again.clips, again.quarantined, again.new_shards) == (5, 0, 1), "a disk that reads again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": ""}, "clips is empty"),
        ({"model": "nowhere"}, "model=nowhere does not exist"),
        ({"device": "cuda"}, "there is no GPU"),
    ],
)
def test_bad_arguments(clips, run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        embed.run(config(clips, run, tmp_path / "out", **changes))
