"""What labels of held-out clips say while DisMo trains."""

import dataclasses
import json

import pytest
import torch

from kinema.configs import DisMoConfig, LoaderConfig, TrainConfig
from kinema.pipelines import train
from kinema.pipelines.loader import Clip, ClipIndex
from kinema.pipelines.loader.clip import DamagedClip
from kinema.pipelines.train.loop import TrainJob, train_worker
from kinema.pipelines.train.meter import MEASURES_FILE
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.train.recipes.dismo.measures import label_accuracies
from kinema.pipelines.train.stop import Stop

from .motion_features import moving_clips


class Oracle(torch.nn.Module):
    """In place of an extractor: the embedding is the mean colour of the film, and nothing else."""

    max_delta_time = 4

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward_sliding(self, video):
        return self.one * video.float().mean(dim=(2, 3))[:, :-4]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return moving_clips(tmp_path_factory.mktemp("data") / "clips", 48, side=16)


def test_labels_that_the_embeddings_tell_are_told(clips):
    found = label_accuracies(Oracle(), ClipIndex.open(clips.url), 6.0)
    assert (found.pop("knn_clips"), found.pop("knn_left_out")) == (48, 0)
    assert set(found) == {
        f"knn_{n}{end}" for n in ("motion", "shape", "texture", "colour") for end in ("", "_over_chance")
    }
    assert found["knn_colour_over_chance"] > 1.8 > found["knn_motion_over_chance"]
    assert found["knn_colour_over_chance"] == pytest.approx(6 * found["knn_colour"])


def test_clips_that_cannot_be_embedded_are_counted(clips, monkeypatch):
    def damaged_now_and_then(clip, indices):
        if int(clip.key, 16) % 4 == 0:
            raise DamagedClip("cut off")
        return frames(clip, indices)

    frames = Clip.frames
    monkeypatch.setattr(Clip, "frames", damaged_now_and_then)
    found = label_accuracies(Oracle(), ClipIndex.open(clips.url), 6.0)
    expected = sum(int(key, 16) % 4 == 0 for key in ClipIndex.open(clips.url).keys)
    assert (found["knn_clips"], found["knn_left_out"]) == (48 - expected, expected) and expected > 0
    monkeypatch.setattr(Clip, "frames", frames)
    assert label_accuracies(Oracle(), ClipIndex.open(clips.url), 0.1) == {"knn_clips": 0, "knn_left_out": 48}


def test_the_loop_measures_every_few_steps(clips, tmp_path):
    """At the steps asked for and at the end; a run that goes on does not measure a step twice."""
    settings = DisMoConfig(preset="dismo_nano", autoencoder="pixels", pixels_per_latent=8, frame_px=32, sample_steps=1)
    config = TrainConfig(
        model="dismo", settings=settings, clips=clips.url, out=str(tmp_path), steps=3, batch_size=2, measure_every=2,
        pictures_every=0, loader=LoaderConfig(hold_out=5, num_workers=0),
    )  # fmt: skip

    def go(config):
        recipe = make_recipe(config)
        loader = train.ClipLoader(config, recipe)
        place = Place(0, 1, torch.device("cpu"))
        train_worker(TrainJob(config, recipe, loader, tmp_path, {}, held_out=loader.held_out), place, Stop())
        return [json.loads(line) for line in (tmp_path / MEASURES_FILE).read_text().splitlines()]

    points = go(config)
    assert [point["step"] for point in points] == [2, 3]
    assert all(0 <= point["knn_motion"] <= 1 for point in points)
    assert [point["step"] for point in go(dataclasses.replace(config, steps=4))] == [2, 3, 4]


def test_measuring_needs_clips_and_something_to_measure(tmp_path):
    with pytest.raises(ValueError, match="measure_every=5 .* set loader.hold_out=8"):
        TrainConfig(model="dismo", measure_every=5)
    config = TrainConfig(measure_every=5, loader=LoaderConfig(hold_out=8), clips="c", flow="f", out=str(tmp_path / "r"))
    with pytest.raises(ValueError, match="flowfeat has nothing to measure while it trains"):
        train.run(config)
