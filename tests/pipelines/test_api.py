"""`import kinema`: stages as functions, artifacts as collections, the table of models."""

from pathlib import Path

import numpy as np
import pytest
import torch

import kinema
from kinema.pipelines.scenes import Scene, write_scene

FILM = Scene(seed=5, height=48, width=64, num_frames=12)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """clips/ and flow/dis of one film, made by the functions."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "videos").mkdir()
    write_scene(FILM, folder / "videos" / "film.mp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        made = kinema.shard(videos=folder / "videos", out=folder / "clips", clip={"seconds": 0.25}, min_shards=1)
        taught = kinema.teach(clips=folder / "clips", out=folder / "flow" / "dis", gaps=[1])
    assert made.clips == taught.clips == 2
    return folder


def test_clips_are_found_by_number_and_key_with_every_frame(work):
    clips = kinema.open(work / "clips")
    assert len(clips) == len(clips.keys) == 2 and "2 clips" in repr(clips)
    first = clips[0]
    assert clips[first.key].key == first.key == clips[-2].key == next(iter(clips)).key
    assert first.frames().shape == (6, 48, 64, 3)
    np.testing.assert_array_equal(first.frames()[[4, 1]], first.frames([4, 1]))
    for number, frame in enumerate(first.frames().astype(float)):
        apart = [np.abs(frame - FILM.frame(t)).mean() for t in range(12)]
        assert int(np.argmin(apart)) == number, "what was filmed, in its order"
    with pytest.raises(KeyError):
        clips["ffff"]
    with pytest.raises(ValueError, match=r"has frames 0..5, not 6"):
        first.frames([6])


def test_flow_finds_its_clips_and_both_become_batches(work):
    joined = kinema.open(work / "flow" / "dis")
    assert joined.keys == kinema.open(work / "clips", flow=work / "flow" / "dis").keys
    t, gap = joined[0].flow_pairs[0]
    assert joined[0].flow(t, gap).shape == (2, 48, 64)
    (batch,) = torch.utils.data.DataLoader(joined.to_torch(frames_per_clip=3), batch_size=2)
    assert batch["frames"].shape == (2, 3, 48, 64, 3) and batch["frames"].dtype == torch.uint8
    assert batch["flow_pair"][0].tolist() == [t, gap] and batch["key"] == joined.keys
    np.testing.assert_array_equal(batch["flow_px"][0], joined[0].flow(t, gap))
    assert [sample["__key__"] for sample in joined.to_webdataset()] == joined.keys


def test_what_is_not_there_is_told(work, tmp_path):
    with pytest.raises(ValueError, match="manifest.json"):
        kinema.open(tmp_path)
    with pytest.raises(ValueError, match="secnds"):
        kinema.shard(videos=work / "videos", out=tmp_path / "clips", clip={"secnds": 1})
    with pytest.raises(ValueError, match="2 settings are missing"):
        kinema.shard()
    with pytest.raises(ValueError, match="did you mean raft_small"):
        kinema.load_model("raft_smal")


def test_a_model_predicts_and_the_table_says_where_its_weights_come_from():
    network = kinema.load_model("raft_small", untrained=True)
    image = FILM.frame(0)
    assert kinema.predict_flow(image, FILM.frame(1), network).shape == (2, 48, 64)
    weights = {row["model"]: row["weights"] for row in kinema.list_models()}
    assert weights["dis"] == weights["chain"] == "none needed"
    assert weights["smurf"] == "your own" and weights["waft"] == "by hand"
    assert weights["raft_small"] in ("here", "to download")
