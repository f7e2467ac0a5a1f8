"""TAP-Vid: measures against their goldens, the files (pickles that run nothing), the evaluation of trackers."""

import functools
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.configs import EvaluateConfig
from kinema.models.tracks.cotracker3.network import CoTracker3
from kinema.pipelines.evaluate.stage import run
from kinema.pipelines.evaluate.tapvid import trackers as tapvid_trackers
from kinema.pipelines.evaluate.tapvid.files import TapVidFiles, TapVidVideo, read_arrays, write_npz
from kinema.pipelines.evaluate.tapvid.metrics import mean_metrics, tapvid_metrics
from kinema.pipelines.evaluate.tapvid.scores import evaluate_tapvid, sample_queries, scene_videos
from kinema.pipelines.evaluate.tapvid.trackers import FlowChain
from kinema.pipelines.scenes import Scene
from kinema.pipelines.teach.protocol import FlowEstimate


@pytest.fixture(scope="module")
def drawn(fill):
    """`drawn(seed, B, N, T)`: query frames, true and predicted tracks and flags of the goldens."""

    def draw(seed, videos, num, num_frames):
        gt = fill.uniform(seed, "gt", videos, num, num_frames, 2, low=8, high=248)
        scale = torch.exp(fill.uniform(seed, "scale", videos, num, 1, 1, low=-1, high=3))
        tracks = gt + scale * fill.normal(seed, "err", videos, num, num_frames, 2)
        gt[:, 0] = gt[:, 0].round()
        tracks[:, 0] = gt[:, 0]
        tracks[:, 0, 1:5, 0] += torch.tensor([1.0, 2.0, 4.0, 0.5])
        occluded = fill.uniform(seed, "occ", videos, num, num_frames) < 0.3
        flipped = fill.uniform(seed, "pocc", videos, num, num_frames) < 0.15
        predicted = torch.where(flipped, ~occluded, occluded)
        frames = fill.integers(seed, "qf", 0, num_frames - 1, videos, num)
        occluded.scatter_(2, frames[..., None], False)
        return [x.numpy() for x in (frames, gt, occluded, tracks, predicted)]

    return draw


@pytest.mark.parametrize(("name", "seed", "shape"), [("s0", 0, (1, 12, 16)), ("s1_b3", 1, (3, 9, 11))])
@pytest.mark.parametrize("mode", ["first", "strided"])
def test_measures_equal_the_published_ones(name, seed, shape, mode, drawn, golden):
    reference, arrays = golden(f"tapvid_metrics__{name}"), drawn(seed, *shape)
    videos = [tapvid_metrics(*(x[i] for x in arrays), mode) for i in range(shape[0])]
    names = [key.removeprefix(f"{mode}.") for key in reference.data if key.startswith(mode) and "batched" not in key]
    assert len(names) == 13
    for key in names:
        found = np.array([video[key] for video in videos])
        reference.check(f"{mode}.{key}", found, atol=1e-6, rtol=0)
    assert mean_metrics(videos)["average_jaccard"] == pytest.approx(
        float(reference.data[f"{mode}.average_jaccard"].mean()), abs=1e-6
    )


def test_a_video_in_which_nothing_counts_is_nan_and_left_out_of_the_mean():
    frames, tracks = np.array([3]), np.zeros((1, 4, 2))
    seen = np.zeros((1, 4), bool)
    empty = tapvid_metrics(frames, tracks, seen, tracks, seen, "first")  # no frame after the last
    perfect = tapvid_metrics(np.array([0]), tracks, seen, tracks, seen, "first")
    assert np.isnan(empty["average_jaccard"]) and np.isnan(empty["occlusion_accuracy"])
    assert mean_metrics([empty, perfect]) == dict.fromkeys(perfect, 1.0)
    with pytest.raises(ValueError, match="mode='last'"):
        tapvid_metrics(frames, tracks, seen, tracks, seen, "last")
    with pytest.raises(ValueError, match=r"occluded is \[1, 3\]"):
        tapvid_metrics(frames, tracks, seen, tracks, seen[:, :3])
    with pytest.raises(ValueError, match="bool"):
        tapvid_metrics(frames, tracks, seen, tracks, seen.astype(np.float32))


def _entry(seed, num_frames=6, num=4, side=24):
    rng = np.random.default_rng(seed)
    return {
        "video": rng.integers(0, 256, (num_frames, side, side + 8, 3), dtype=np.uint8),
        "points": rng.uniform(0, 1, (num, num_frames, 2)).astype(np.float32),
        "occluded": rng.uniform(size=(num, num_frames)) < 0.3,
    }


def _jpegs(frames):
    out = []
    for frame in frames:
        Image.fromarray(frame).save(buffer := io.BytesIO(), format="png")
        out.append(buffer.getvalue())
    return out


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_as_published_are_read(tmp_path, protocol):
    entries = [_entry(seed) for seed in range(2)]
    as_bytes = {**entries[0], "video": np.array(_jpegs(entries[0]["video"]), dtype=object)}
    contents = {
        "davis.pkl": {"goat": entries[0], "bus": {**entries[1], "points": np.asfortranarray(entries[1]["points"])}},
        "0000_of_0010.pkl": [as_bytes, {**entries[1], "video": _jpegs(entries[1]["video"]), "n": np.int64(3)}],
        "big_endian.pkl": [{**e, "points": e["points"].astype(">f8")} for e in entries],
    }
    for file, content in contents.items():
        (tmp_path / file).write_bytes(pickle.dumps(content, protocol=protocol))
        found = list(TapVidFiles(tmp_path / file))
        assert len(found) == 2
        for video, entry in zip(found, entries, strict=True):
            assert np.array_equal(video.frames, entry["video"])
            assert np.array_equal(video.occluded, entry["occluded"])
            assert np.abs(video.points - entry["points"]).max() < 1e-7
    assert [v.name for v in TapVidFiles(tmp_path / "davis.pkl")] == ["goat", "bus"]
    assert len(list(TapVidFiles(tmp_path))) == 6


def test_older_names_of_numpys_parts_are_known(tmp_path):
    stored = pickle.dumps([_entry(0)], protocol=2).replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "old.pkl").write_bytes(stored)
    assert b"numpy.core." in stored and len(list(TapVidFiles(tmp_path / "old.pkl"))) == 1


class _Runs:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, protocol):
    target = tmp_path / "made"
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"a": {**_entry(0), "x": _Runs(target)}}, protocol=protocol))
    with pytest.raises(ValueError, match=r"bad.pkl: holds .*mkdir; only numpy arrays"):
        list(TapVidFiles(tmp_path / "bad.pkl"))
    assert not target.exists()


def _state(dtype_state=b"", shape=b"(K\x02t", data=b"C\x02ab"):
    """A hand-made pickle of one array of 2 bytes, with parts replaced."""
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1K\x00K\x01tR" + dtype_state
    return b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR(K\x01" + (
        shape + dtype + b"\x89" + data + b"tb."
    )


@pytest.mark.parametrize(
    "content",
    [
        _state(shape=b"(K\x09t"),  # more elements than bytes
        _state(shape=b"(J\xff\xff\xff\xfft"),  # a negative size
        _state(data=b"](K\x01K\x02e"),  # objects where bytes should be
        _state(dtype_state=b"(K\x03X\x01\x00\x00\x00|N(X\x01\x00\x00\x00at}X\x01\x00\x00\x00aK\x01sK\x02K\x01K\x00tb"),
        pickle.dumps(np.zeros(2, dtype=[("a", "i4"), ("b", "O")])),
        pickle.dumps(np.zeros(2, dtype="V8")),
        pickle.dumps(np.array([{}, {}], dtype=object).reshape(1, 2)),
        b"\x80\x03c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",  # another encoding
        b"\x80\x03ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb.",  # attributes of an object
        b"\x80\x03c_codecs\nencode\n}X\x0c\x00\x00\x00__defaults__K\x01sb.",  # attributes of a name
        b"",
        b"\x80\x04\x95",
        b"not a pickle",
        pickle.dumps(_entry(0))[:-40],
    ],
)
def test_damaged_or_crafted_pickles_are_refused(tmp_path, content):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="bad.pkl"):
        read_arrays(tmp_path / "bad.pkl")


def test_the_hand_made_pickle_is_read_when_nothing_is_replaced(tmp_path):
    (tmp_path / "good.pkl").write_bytes(_state())
    assert read_arrays(tmp_path / "good.pkl").tolist() == list(b"ab")


def test_npz_files_hold_the_same(tmp_path):
    entry = _entry(1)
    write_npz(TapVidVideo("v", entry["video"], entry["points"], entry["occluded"]), tmp_path / "swing.npz")
    (video,) = TapVidFiles(tmp_path)
    assert video.name == "swing" and np.array_equal(video.frames, entry["video"])
    np.savez(tmp_path / "objects.npz", video=np.array([{}]), points=0, occluded=0)
    with pytest.raises(ValueError, match="objects.npz: not a readable"):
        list(TapVidFiles(tmp_path / "objects.npz"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"video": np.zeros((6, 4, 4, 3), np.float32)}, "uint8"),
        ({"video": [b"no picture"] * 6}, "no picture"),
        ({"points": np.zeros((4, 5, 2))}, r"\[N, 6, 2\]"),
        ({"occluded": None}, r"occluded \[\]"),
    ],
)
def test_entries_of_another_form_say_the_rule(tmp_path, change, words):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"goat": {**_entry(0), **change}}))
    with pytest.raises(ValueError, match=f"a.pkl: goat .*{words}"):
        list(TapVidFiles(tmp_path / "a.pkl"))


def test_missing_files_say_what_is_there(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        list(TapVidFiles(tmp_path / "none"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="found notes.txt"):
        list(TapVidFiles(tmp_path))
    (tmp_path / "n.pkl").write_bytes(pickle.dumps(3))
    with pytest.raises(ValueError, match="holds int"):
        list(TapVidFiles(tmp_path / "n.pkl"))
    (tmp_path / "n.pkl").write_bytes(pickle.dumps({"goat": {"video": 1}}))
    with pytest.raises(ValueError, match="goat needs video, points and occluded; it has video"):
        list(TapVidFiles(tmp_path / "n.pkl"))


def test_queries_are_first_seen_or_every_fifth_frame():
    occluded = np.zeros((3, 12), bool)
    occluded[0, :2], occluded[1], occluded[2, 5] = True, True, True
    tracks = np.arange(72, dtype=np.float32).reshape(3, 12, 2)
    queries, rows = sample_queries(tracks, occluded, "first")
    assert rows.tolist() == [0, 2] and queries.tolist() == [[2, 4, 5], [0, 48, 49]]
    queries, rows = sample_queries(tracks, occluded, "strided")
    assert list(zip(rows.tolist(), queries[:, 0].tolist(), strict=True)) == [(2, 0), (0, 5), (0, 10), (2, 10)]
    assert queries[1, 1:].tolist() == [10, 11]


class _Oracle:
    """Knows the tracks of rendered scenes; `off_px` to the right of them."""

    def __init__(self, videos, off_px=0.0):
        self.videos, self.off_px = iter(videos), off_px

    def __call__(self, frames, queries):
        video = next(self.videos)
        tracks = video.points * 255
        at = [np.abs(tracks[:, int(t)] - (x, y)).sum(axis=1).argmin() for t, x, y in queries]
        return torch.from_numpy(tracks[at].transpose(1, 0, 2)) + torch.tensor([self.off_px, 0]), ~video.occluded[at].T


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_the_truth_about_rendered_scenes_reaches_all(mode):
    videos = list(scene_videos(2, num_frames=11, num_points=12))
    assert all(v.occluded.any() and not v.occluded.all() for v in videos)
    perfect = evaluate_tapvid(_Oracle(videos), videos, mode)
    assert perfect.mean == dict.fromkeys(perfect.mean, 1.0) and len(perfect.videos) == 2
    off = evaluate_tapvid(_Oracle(videos, 3.0), videos, mode).mean
    assert [off[f"pts_within_{d}"] for d in (1, 2, 4, 8, 16)] == [0, 0, 1, 1, 1]
    assert off["average_pts_within_thresh"] == pytest.approx(0.6) and off["occlusion_accuracy"] == 1


def test_a_tracker_that_gives_another_shape_is_told():
    videos = list(scene_videos(1, num_frames=4, num_points=3))
    with pytest.raises(ValueError, match=r"they must be \[T, N, 2\]"):
        evaluate_tapvid(lambda frames, queries: (np.zeros((4, 1, 2)), np.zeros((4, 1), bool)), videos)
    with pytest.raises(ValueError, match="no video"):
        evaluate_tapvid(lambda frames, queries: (None, None), [])


class _TrueFlow:
    """A teacher that knows the scene; features are frame numbers."""

    def __init__(self, scene):
        self.scene, self.numbers, self.asked = scene, iter(range(scene.num_frames)), []

    def features(self, frame):
        return next(self.numbers)

    def flow(self, pairs):
        self.asked += pairs
        return FlowEstimate(torch.from_numpy(np.stack([self.scene.flow_px(*pair) for pair in pairs])))


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_chain_on_true_flow_is_close_to_the_truth(mode):
    (video,) = scene_videos(1, num_frames=8, num_points=24, seed=5)
    teacher = _TrueFlow(Scene(5, 256, 256, 8))
    scores = evaluate_tapvid(FlowChain(teacher), [video], mode).mean
    assert scores["pts_within_1"] > 0.9 and scores["occlusion_accuracy"] > 0.9
    assert len(set(teacher.asked)) == len(teacher.asked)  # each flow is computed once


@pytest.fixture(scope="module")
def tracking_store(tmp_path_factory):
    """One database for the tests of the command: making it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        yield


@pytest.mark.usefixtures("tracking_store")
def test_command_evaluates_chain_on_rendered_scenes(monkeypatch):
    monkeypatch.setattr(tapvid_trackers, "CHAIN_GAPS", (1,))
    short = functools.partial(scene_videos, 1, num_frames=5, num_points=16)
    monkeypatch.setattr("kinema.pipelines.evaluate.tapvid.stage.scene_videos", short)
    metrics = run(EvaluateConfig(model="chain", benchmark="tapvid", data="scenes")).metrics
    assert metrics["tapvid_pts_within_2"] > 0.8 and metrics["tapvid_occlusion_accuracy"] > 0.7


@pytest.mark.slow
@pytest.mark.usefixtures("tracking_store")
def test_command_evaluates_cotracker3(tmp_path):
    """Points that hardly move, and a network that leaves every point where it was given."""
    torch.manual_seed(0)
    model = CoTracker3(model_resolution=(32, 32))
    with torch.no_grad():
        model.updateformer.flow_head.weight.zero_()
        model.updateformer.flow_head.bias.zero_()
        model.updateformer.vis_conf_head.weight.zero_()
        model.updateformer.vis_conf_head.bias.fill_(3.0)
    torch.save(model.state_dict(), tmp_path / "still.pth")
    entry = _entry(0, num_frames=3, num=3)
    entry["points"][:] = entry["points"][:, :1] + np.array([[0.0], [1.5 / 255], [3.0 / 255]])
    entry["occluded"][:] = False
    (tmp_path / "davis.pkl").write_bytes(pickle.dumps({"goat": entry}))
    config = EvaluateConfig(
        model="cotracker3",
        weights=str(tmp_path / "still.pth"),
        benchmark="tapvid",
        data=str(tmp_path / "davis.pkl"),
        out=str(tmp_path / "out"),
        iters=1,
    )
    with pytest.warns(UserWarning, match="CC BY-NC"):
        metrics = run(config).metrics
    within = [metrics[f"tapvid_pts_within_{d}"] for d in (1, 2, 4, 8)]
    assert within == [0, 0, 0.5, 1.0]  # 2.1 and 4.2 px off, in frames 1 and 2
    assert metrics["tapvid_occlusion_accuracy"] == 1
    assert json.loads((tmp_path / "out" / "table.json").read_text())["tapvid_average_jaccard"] > 0
    assert (tmp_path / "out" / "videos.csv").read_text().splitlines()[1].startswith("goat,")
    with pytest.raises(ValueError, match="model=raft is no tracker"):
        run(EvaluateConfig(model="raft", benchmark="tapvid", data=str(tmp_path / "davis.pkl")))
