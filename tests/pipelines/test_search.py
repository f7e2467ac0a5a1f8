"""Clips that move alike: as by brute force, in bounded memory, by key and by video, with an index that is kept."""

import json
import sys
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kinema.configs import DisMoConfig, EmbedConfig, RegisterConfig, SearchConfig, TrainConfig
from kinema.configs.load import to_mapping
from kinema.pipelines import embed, registry, search
from kinema.pipelines.cli import main
from kinema.pipelines.pictures.motion import write_mp4
from kinema.pipelines.search.approximate import ApproximateIndex, recall
from kinema.pipelines.search.exact import Nearest
from kinema.pipelines.search.exact import search as search_exactly
from kinema.pipelines.search.query import copies_of
from kinema.pipelines.search.windows import MotionWindows
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.recipes.choose import make_recipe

from .made_videos import write_video
from .motion_features import keys_only, moving_clips, write_motion

SETTINGS = DisMoConfig(preset="dismo_nano", autoencoder="pixels", pixels_per_latent=8, frame_px=32, initial_spread=1.0)


def made_keys(count):
    return [f"{number:032x}" for number in range(count)]


def random_windows(count, width=16, seed=0):
    """Embeddings around a common vector, as a network's are."""
    rng = np.random.default_rng(seed)
    common = 3 * rng.normal(size=width)
    for _ in range(count):
        yield common + rng.normal(size=(int(rng.integers(1, 9)), width))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """300 clips in shards of 40, and their embeddings."""
    folder = tmp_path_factory.mktemp("corpus")
    clips = keys_only(folder / "clips", made_keys(300), 40)
    write_motion(folder / "features", clips, random_windows(300))
    return MotionWindows.open(str(folder / "features"), clips), list(random_windows(300))


def brute_force(values, query):
    """Scores of all clips, by PyTorch, one pair of windows after another's definition."""
    everything = torch.from_numpy(np.concatenate(values)).double()
    unit = [F.normalize(torch.from_numpy(v).double() - everything.mean(0), dim=1) for v in values]
    return torch.stack([(unit[query] @ other.T).amax(dim=1).mean() for other in unit])


@pytest.mark.parametrize("block_windows", [1, 50, 10_000])
def test_exact_search_equals_brute_force(corpus, block_windows):
    windows, values = corpus
    assert windows.num_windows == sum(map(len, values))
    chosen = [3, 150, 299]
    queries = [windows.of_key(made_keys(300)[number]) for number in chosen]
    nearest = [Nearest(12, {}, [made_keys(300)[number]]) for number in chosen]
    found = search_exactly(windows.blocks(block_windows), queries, nearest)
    for number, matches in zip(chosen, found, strict=True):
        scores = brute_force(values, number)
        scores[number] = -2
        best = scores.topk(12)
        assert [int(match.key, 16) for match in matches] == best.indices.tolist()
        np.testing.assert_allclose([match.score for match in matches], best.values, atol=1e-5)


def test_of_copies_the_best_is_listed():
    """c and d are copies of b: one place for the three; copies of the query are left out."""
    copies = {"b": "b", "c": "b", "d": "b", "q2": "q"}
    nearest = Nearest(3, copies, ["q"])
    nearest.offer(["b", "q2", "a"], np.array([0.5, 0.9, 0.4]))
    nearest.offer(["c", "e", "d"], np.array([0.7, 0.1, 0.6]))
    nearest.offer(["f"], np.array([0.05]))
    assert [(m.key, round(m.score, 6)) for m in nearest.matches()] == [("c", 0.7), ("a", 0.4), ("e", 0.1)]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """32,000 windows of width 128 are 16 MB; a block of 500 is 0.26 MB."""
    clips = keys_only(tmp_path / "clips", made_keys(400), 25)
    block = np.random.default_rng(0).normal(size=(80, 128))
    write_motion(tmp_path / "features", clips, (np.roll(block, n, axis=0) + n % 7 for n in range(400)))
    windows = MotionWindows.open(str(tmp_path / "features"), clips)
    query = windows.of_key(made_keys(400)[5])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    found = search_exactly(windows.blocks(500), [query], [Nearest(10, {})])[0]
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert len(found) == 10 and found[0].score == pytest.approx(1, abs=1e-5)
    assert peak < 0.15 * 32_000 * 128 * 4


def test_an_index_finds_nearly_what_exact_search_does(corpus, tmp_path):
    pytest.importorskip("faiss")
    windows, _ = corpus
    index = ApproximateIndex.build(windows, 100)
    index.save(tmp_path / "index")
    again = ApproximateIndex.load(tmp_path / "index", windows)
    assert again.facts["groups"] > 4 and again.keys == tuple(made_keys(300))
    everywhere = recall(again, windows, 10, 10, again.facts["groups"], 400, 100)
    somewhere = recall(again, windows, 10, 10, 1, 20, 100)
    assert everywhere >= 0.95 and somewhere < everywhere


def test_an_index_of_other_features_is_refused(corpus, tmp_path):
    pytest.importorskip("faiss")
    windows, _ = corpus
    ApproximateIndex.build(windows, 100).save(tmp_path / "index")
    clips = keys_only(tmp_path / "clips", made_keys(50), 50)
    write_motion(tmp_path / "features", clips, random_windows(50, seed=1))
    other = MotionWindows.open(str(tmp_path / "features"), clips)
    with pytest.raises(ValueError, match="was made from other features .* remove it"):
        ApproximateIndex.load(tmp_path / "index", other)
    (tmp_path / "index" / "windows.faiss").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        ApproximateIndex.load(tmp_path / "index", windows)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint of an untrained model whose transformers do something."""
    torch.manual_seed(0)
    config = TrainConfig(model="dismo", settings=SETTINGS)
    module = make_recipe(config).build()
    with torch.no_grad():
        for value in module.average.ema_model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    folder = tmp_path_factory.mktemp("run")
    meta = {"identity": {}, "train_config": to_mapping(config), "loss": 1.0, "samples_per_second": 1.0}
    checkpoint.save_checkpoint(folder, 1, module.state_dict(), {}, meta, keep=1)
    return folder


@pytest.fixture(scope="module")
def embedded(run, tmp_path_factory):
    """Rendered clips, and what `kinema embed` makes of them."""
    folder = tmp_path_factory.mktemp("embedded")
    clips = moving_clips(folder / "clips", 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINEMA_ENGINE", "serial")
        embed.run(EmbedConfig(model=str(run), clips=clips.url, out=str(folder / "features"), num_actors=1))
    return clips, folder / "features"


def settings(embedded, folder, **changes):
    clips, features = embedded
    key = clips.samples(["key"])["key"][3].as_py()
    defaults = dict(clips=clips.url, features=str(features), query=key, out=str(folder / "found"), k=5)
    return SearchConfig(**(defaults | changes))


def test_by_key_with_a_page_of_films(embedded, tmp_path, capfd):
    config = settings(embedded, tmp_path)
    arguments = [f"{name}={getattr(config, name)}" for name in ("clips", "features", "query", "out", "k")]
    assert main(["search", *arguments, "--json"]) == 0
    shown = json.loads(capfd.readouterr().out.splitlines()[-1])
    keys = [match["key"] for match in shown["results"]]
    scores = [match["score"] for match in shown["results"]]
    assert len(set(keys)) == 5 and config.query not in keys and scores == sorted(scores, reverse=True)
    assert shown["method"] == "exact" and shown["windows"] == 16 * 8
    assert json.loads((tmp_path / "found" / "results.json").read_text()) == shown
    films = sorted(path.name for path in (tmp_path / "found" / "films").iterdir())
    assert films == [*(f"{place:03d}_{key}.mp4" for place, key in enumerate(keys, start=1)), "query.mp4"]
    page = (tmp_path / "found" / "search.html").read_text()
    assert all(f'src="films/{name}"' in page for name in films)


def test_by_video_as_by_key(embedded, run, tmp_path):
    """A film of the clip's own frames finds the clip first, then what the clip finds."""
    from kinema.pipelines.loader import ClipIndex

    config = settings(embedded, tmp_path)
    index = ClipIndex.open(config.clips)
    clip = next(index.clip(i) for i in range(len(index)) if index.clip(i).key == config.query)
    # Hardly compressed: untrained embeddings differ by so little that compression would be much of it.
    write_video(tmp_path / "query.mp4", clip.frames(range(clip.num_frames)), fps=6, options={"crf": "1"})
    by_key = search.run(settings(embedded, tmp_path, k=4))
    by_video = search.run(settings(embedded, tmp_path, query=str(tmp_path / "query.mp4"), model=str(run)))
    assert by_video.query == "query.mp4" and by_video.results[0].key == config.query
    assert by_video.results[0].score > 0.9
    assert len({m.key for m in by_video.results[1:]} & {m.key for m in by_key.results}) >= 3


def test_near_duplicates_of_the_query_are_left_out(tmp_path):
    class Clips:
        @staticmethod
        def samples():
            import pyarrow as pa

            return pa.table({"key": ["a", "b", "c", "d"], "near_duplicate_of": [None, "a", None, None],
                             "duplicate_of": [None, None, "b", None]})  # fmt: skip

    assert copies_of(Clips()) == {"a": "a", "b": "a", "c": "a"}


def test_a_registered_index_answers(embedded, run, tmp_path, monkeypatch):
    """Made beside the model in the registry, and used from there; a query by video finds its model there too."""
    pytest.importorskip("faiss")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(ValueError, match="is not in the registry .* register it first"):
        search.run(settings(embedded, tmp_path, method="approximate", register=True))
    version = registry.run(RegisterConfig(model=str(run))).uri
    # `embed` from the run and from its version give the same numbers; the features must be of the version's content.
    clips, _ = embedded
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    embed.run(EmbedConfig(model=version, clips=clips.url, out=str(tmp_path / "features"), num_actors=1))
    config = dict(features=str(tmp_path / "features"), method="approximate")
    made = search.run(settings(embedded, tmp_path, register=True, **config))
    assert made.registered == "models:/kinema-dismo/1" and made.recall is not None
    again = search.run(settings(embedded, tmp_path / "other", index=version, **config))
    assert [m.key for m in again.results] == [m.key for m in made.results]
    exact = search.run(settings(embedded, tmp_path, features=config["features"]))
    assert {m.key for m in exact.results} & {m.key for m in made.results}
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    write_mp4(tmp_path / "query.mp4", frames, 6.0)
    by_video = search.run(settings(embedded, tmp_path, query=str(tmp_path / "query.mp4"), features=config["features"]))
    assert len(by_video.results) == 5


def test_bad_input_is_refused_in_one_line(embedded, run, tmp_path, monkeypatch):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message) as caught:
            search.run(settings(embedded, tmp_path, **changes))
        assert "\n" not in str(caught.value)

    refused("is no clip of", query="f" * 32)
    refused("neither a file nor a clip's key", query="nothing.mp4")
    other = moving_clips(tmp_path / "clips", 2, seed=5)
    refused("were made from clips", clips=other.url)
    write_mp4(tmp_path / "short.mp4", np.zeros((4, 32, 32, 3), np.uint8), 6.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    refused("is not in the registry .* needs model=", query=str(tmp_path / "short.mp4"))
    refused("4 frames at 6 a second; motion embeddings need 5", query=str(tmp_path / "short.mp4"), model=str(run))
    (tmp_path / "text.mp4").write_text("no video")
    refused("cannot be read as a video", query=str(tmp_path / "text.mp4"), model=str(run))
    refused("add method=approximate", register=True)
    refused("out= is empty", out="")
    monkeypatch.setitem(sys.modules, "faiss", None)
    refused(r"pip install 'kinema\[search\]'", method="approximate")


def test_a_model_that_did_not_make_the_features_is_refused(embedded, run, tmp_path):
    clips, _ = embedded
    write_motion(tmp_path / "features", clips, random_windows(16, 32), model_hash="1" * 64)
    write_mp4(tmp_path / "query.mp4", np.zeros((8, 32, 32, 3), np.uint8), 6.0)
    config = settings(
        embedded, tmp_path, features=str(tmp_path / "features"), query=str(tmp_path / "query.mp4"), model=str(run)
    )
    with pytest.raises(ValueError, match=r"did not make features=.* \(by 111111111111\)"):
        search.run(config)


def test_features_of_single_frames_are_refused(embedded, tmp_path):
    from kinema.pipelines.artifacts import Artifact

    clips, _ = embedded
    dense = Artifact.open(tmp_path / "dense", kind="features", config={"features": "pooled"},
                          inputs={"clips": clips.plan8})  # fmt: skip
    dense.append_plan(clips.samples(["shard", "key", "source"]))
    for shard in dense.pending():
        with dense.shard_writer(shard) as writer:
            for key in writer.planned:
                writer.add(key, {"y_dec.npy": b""}, {"source": key, "frames": [0], "y_dec_mean": [0.0]})
            writer.commit()
    dense.finalize()
    with pytest.raises(ValueError, match="features of single frames, no motion embeddings"):
        search.run(settings(embedded, tmp_path, features=str(tmp_path / "dense")))
