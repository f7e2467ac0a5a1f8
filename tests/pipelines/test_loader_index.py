"""Which clips an index holds, and what it says about the others."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from kinema.configs import LoaderConfig, PairFilterConfig
from kinema.pipelines.artifacts import Artifact, sample_key
from kinema.pipelines.loader import ClipIndex, Loader
from kinema.pipelines.loader.order import Order
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.sidecars.flow_codec import FlowPair, encode_clip_flow

KEYS = [sample_key("clip", i) for i in range(8)]


def plan(keys: list[str]) -> pa.Table:
    rows = [{"shard": i // 3, "key": key, "source": f"{i}.mp4"} for i, key in enumerate(keys)]
    return pa.Table.from_pylist(rows, pa.schema([("shard", pa.int32()), ("key", pa.string()), ("source", pa.string())]))


def write(artifact: Artifact, samples: dict[str, tuple[dict, dict]], schema: pa.Schema | None = None) -> Artifact:
    """Fill a planned artifact: members and columns by key; the rest is quarantined."""
    for shard in artifact.pending():
        with artifact.shard_writer(shard, schema) as writer:
            for key in artifact.plan_of(shard)["key"].to_pylist():
                if key in samples:
                    writer.add(key, *samples[key])
                else:
                    writer.quarantine(key, stage=artifact.kind, error_class="ValueError", message="broken")
            writer.commit()
    artifact.finalize()
    return artifact


def write_clips(url, **columns: dict[int, object]) -> Artifact:
    """Eight clips without pictures; `columns` changes values by clip number; clip 7 is quarantined."""
    artifact = Artifact.open(url, kind="clips", config={"gop": 12})
    artifact.append_plan(plan(KEYS))
    samples = {}
    for i, key in enumerate(KEYS[:7]):
        row = {"num_frames": 10, "height": 4, "width": 6, "fps_num": 24, "fps_den": 1, "codec": "h264"}
        row |= {"motion_score": 0.1 * i, "duplicate_of": None}
        row |= {name: values[i] for name, values in columns.items() if i in values}
        samples[key] = ({"json": b"{}", "mp4": bytes(100)}, row)
    return write(artifact, samples)


def write_flow(url, clips: Artifact, keys: list[str], planned: list[str] | None = None, empty: str = "") -> Artifact:
    """Zero flow for `keys` of the `planned` ones; the others are quarantined; `empty` gets no pair."""
    artifact = Artifact.open(url, kind="flow", config={"teacher": "dis"}, inputs={"clips": clips.plan8})
    artifact.append_plan(plan(planned or keys))
    samples = {}
    for key in keys:
        pairs = [] if key == empty else [FlowPair(0, 1, np.zeros((2, 4, 6), np.float32))]
        blob = encode_clip_flow(pairs, height=4, width=6, teacher="dis", weights_hash="none", frames=10)
        samples[key] = ({"flow": blob}, {"height": 4, "width": 6, "num_pairs": len(pairs)})
    return write(artifact, samples)


def test_every_clip_is_either_in_the_index_or_counted(tmp_path):
    duplicate = pa.scalar(KEYS[0]).as_py()
    clips = write_clips(tmp_path / "clips", duplicate_of={1: duplicate}, num_frames={2: 1})
    flow = write_flow(
        tmp_path / "flow", clips, [KEYS[i] for i in (6, 0, 4, 5)], [KEYS[i] for i in (6, 0, 3, 4, 5)], KEYS[4]
    )
    index = ClipIndex.open(clips.url, flow.url, min_motion=0.05, min_frames=2)
    assert index.keys == [KEYS[5], KEYS[6]]
    assert index.left_out == {
        "quarantined by shard": 1,
        "exact duplicate": 1,
        "under 2 frames": 1,
        "motion score under 0.05": 1,
        "quarantined by teach": 1,
        "without a flow pair": 1,
    }
    assert len(index) + sum(index.left_out.values()) == 8
    assert index.describe().startswith("2 clips; left out: 1 quarantined by shard, 1 exact duplicate")
    assert index.clip(0).flow_pairs == [(0, 1)] and (index.clip(1).flow(0, 1) == 0).all()


def test_what_the_config_allows_stays(tmp_path):
    clips = write_clips(tmp_path / "clips", duplicate_of={1: KEYS[0]})
    assert len(ClipIndex.open(clips.url)) == 6
    assert len(ClipIndex.open(clips.url, skip_duplicates=False)) == 7
    assert ClipIndex.open(clips.url, min_motion=0.35).keys == KEYS[4:7]


def test_clips_are_joined_by_key_not_by_place(tmp_path):
    clips = write_clips(tmp_path / "clips")
    flow = write_flow(tmp_path / "flow", clips, KEYS[6:2:-1])
    index = ClipIndex.open(clips.url, flow.url)
    assert index.keys == KEYS[3:7] and index.left_out["without flow"] == 3
    rows = {row["key"]: row for row in flow.samples().to_pylist()}
    for number, key in enumerate(index.keys):
        row = index.clip(number).row
        assert (row["flow_shard"], row["flow_offset"]) == (rows[key]["shard"], rows[key]["flow_offset"])


def test_scores_that_are_missing_are_left_out_when_motion_is_asked_for(tmp_path):
    clips = write_clips(tmp_path / "clips", motion_score={0: None, 6: float("nan")})
    index = ClipIndex.open(clips.url, min_motion=0.25)
    assert index.keys == KEYS[3:6] and index.left_out["without motion score"] == 2


def test_nothing_usable_names_the_reasons_with_counts(tmp_path):
    clips = write_clips(tmp_path / "clips", duplicate_of=dict.fromkeys(range(4), KEYS[7]))
    clips.quarantine([{"source": "bad.mp4", "stage": "scan", "error_class": "ValueError", "message": "no video"}])
    clips.finalize()
    with pytest.raises(ValueError) as caught:
        ClipIndex.open(clips.url, min_motion=5)
    message = str(caught.value)
    assert "no usable sample" in message and "8 clips planned" in message and "\n" not in message
    assert "1 quarantined by shard, 4 exact duplicate, 3 motion score under 5" in message
    assert "1 sources were quarantined before they gave a clip" in message


def test_flow_of_other_clips_is_a_clear_error(tmp_path):
    clips = write_clips(tmp_path / "clips")
    flow = write_flow(tmp_path / "flow", clips, [sample_key("other", i) for i in range(3)])
    with pytest.raises(ValueError, match="7 without flow.*was the flow made from these clips"):
        ClipIndex.open(clips.url, flow.url)


def test_wrong_or_unfinished_artifacts_are_named(tmp_path):
    clips = write_clips(tmp_path / "clips")
    with pytest.raises(ValueError, match="holds clips, not flow"):
        ClipIndex.open(clips.url, clips.url)
    flow = write_flow(tmp_path / "flow", clips, KEYS[:3])
    with pytest.raises(ValueError, match="holds flow, not clips"):
        ClipIndex.open(flow.url)
    with pytest.raises(ValueError, match="holds no artifact"):
        ClipIndex.open(tmp_path / "nowhere")
    half = Artifact.open(tmp_path / "half", kind="clips", config={})
    half.append_plan(plan(KEYS))
    with pytest.raises(ValueError, match="no commits yet"):
        ClipIndex.open(half.url)


def test_index_on_disk_is_the_same_in_another_process(tmp_path):
    clips = write_clips(tmp_path / "clips")
    index = ClipIndex.open(clips.url)
    (tmp_path / "rows").mkdir()
    shared = index.on_disk(tmp_path / "rows")
    packed = pickle.dumps(shared)
    assert b"".join(key.encode() for key in KEYS[:1]) not in packed
    for copy in (pickle.loads(packed), pickle.loads(pickle.dumps(index))):
        assert copy.keys == index.keys and copy.clip(3).row == index.clip(3).row


def test_clip_numbers_outside_are_refused(tmp_path):
    index = ClipIndex.open(write_clips(tmp_path / "clips").url)
    for number in (-1, 7):
        with pytest.raises(IndexError):
            index.clip(number)


def test_object_store_urls_are_read_by_ranges():
    scene = Scene(seed=1, height=32, width=48, num_frames=14, num_objects=1)
    clips = write_scene_clips([scene], "memory://loader-test/clips")
    write_scene_flow([scene], clips, "memory://loader-test/flow", gaps=(1,))
    index = ClipIndex.open("memory://loader-test/clips", "memory://loader-test/flow")

    def read(clip, rng):
        t = int(rng.integers(13))
        return {"frame": clip.frames([t])[0], "flow": clip.flow(t, 1), "t": t}

    batch = next(iter(Loader(index, read, LoaderConfig(num_workers=0), 3, seed=0)))
    for frame, flow, t in zip(batch["frame"], batch["flow"], batch["t"], strict=True):
        assert np.abs(flow.numpy() - scene.flow_px(int(t), int(t) + 1)).max() <= 1 / 128
        assert np.abs(frame.numpy().astype(int) - scene.frame(int(t))).mean() < 8


@pytest.mark.parametrize(("num_clips", "samples", "window"), [(1, 1, 4), (7, 1, 4), (7, 3, 4), (5, 2, 256), (8, 2, 1)])
def test_every_epoch_holds_every_sample_once(num_clips, samples, window):
    order = Order(num_clips, seed=3, samples_per_clip=samples, shuffle_window=window)
    for epoch in range(3):
        first = epoch * order.num_samples
        visits = [order.visit(n) for n in range(first, first + order.num_samples)]
        assert {visit.epoch for visit in visits} == {epoch}
        assert sorted((v.clip, v.draw) for v in visits) == [(c, d) for c in range(num_clips) for d in range(samples)]


def test_replacements_walk_through_all_clips_with_draws_of_their_own():
    order = Order(6, seed=0, samples_per_clip=2, shuffle_window=3)
    walks = {n: [order.replacement(n, attempt) for attempt in range(1, 13)] for n in range(12)}
    assert all({visit.clip for visit in walk[:6]} == set(range(6)) for walk in walks.values())
    places = [(v.clip, v.draw) for walk in walks.values() for v in walk]
    own = [(v.clip, v.draw) for v in map(order.visit, range(12))]
    assert len(set(places + own)) == len(places) + len(own)
    assert len({tuple(v.clip for v in walk[:6]) for walk in walks.values()}) > 3


def test_random_numbers_depend_on_seed_epoch_key_and_draw_only():
    def number(seed=0, sample=0, key="a" * 32):
        order = Order(1, seed)
        return order.rng(order.visit(sample), key).integers(1 << 62)

    assert number() == number()
    assert len({number(), number(seed=1), number(sample=1), number(key="b" * 32)}) == 4


def write_scored_flow(url, clips: Artifact, value: float, consistency: dict[str, list[float | None]]) -> Artifact:
    """Two pairs for every clip of `consistency`, whose flow is `value` everywhere and whose signals are given."""
    keys = list(consistency)
    artifact = Artifact.open(url, kind="flow", config={"teacher": str(value)}, inputs={"clips": clips.plan8})
    artifact.append_plan(plan(keys))
    samples = {}
    for key, signals in consistency.items():
        hidden = np.zeros((4, 6), bool)
        hidden[0, int(value) % 6] = True
        pairs = [FlowPair(t, 1, np.full((2, 4, 6), value, np.float32), hidden) for t in (0, 1)]
        blob = encode_clip_flow(pairs, height=4, width=6, teacher="x", weights_hash="none", frames=10)
        row = {"height": 4, "width": 6, "num_pairs": 2, "pair_consistency_px": signals, "pair_static": [False, True]}
        samples[key] = ({"flow": blob}, row)
    lists = {"pair_consistency_px": pa.list_(pa.float32()), "pair_static": pa.list_(pa.bool_())}
    return write(
        artifact, samples, pa.schema({"height": pa.int32(), "width": pa.int32(), "num_pairs": pa.int32()} | lists)
    )


def test_pairs_are_filtered_by_their_signals_and_clips_without_a_pair_counted(tmp_path):
    clips = write_clips(tmp_path / "clips")
    signals = {KEYS[0]: [0.1, 0.2], KEYS[1]: [0.1, 3.0], KEYS[2]: [5.0, 3.0], KEYS[3]: [None, 9.0]}
    flow = write_scored_flow(tmp_path / "flow", clips, 1.0, signals)
    index = ClipIndex.open(clips.url, flow.url, pairs=PairFilterConfig(max_consistency_px=1.0))
    assert index.keys == [KEYS[0], KEYS[1], KEYS[3]] and index.left_out["without a usable flow pair"] == 1
    assert [index.clip(i).flow_pairs for i in range(3)] == [[(0, 1), (1, 1)], [(0, 1)], [(0, 1)]]
    still = ClipIndex.open(clips.url, flow.url, pairs=PairFilterConfig(skip_static=True))
    assert all(still.clip(i).flow_pairs == [(0, 1)] for i in range(4))
    travelled = pickle.loads(pickle.dumps(index.on_disk(tmp_path)))
    assert travelled.clip(1).flow_pairs == [(0, 1)]
    with pytest.raises(ValueError, match="no column pair_photometric.*teach it anew"):
        ClipIndex.open(clips.url, flow.url, pairs=PairFilterConfig(max_photometric=0.1))


def test_one_of_two_teachers_is_drawn_or_both_are_averaged(tmp_path):
    clips = write_clips(tmp_path / "clips")
    first = write_scored_flow(tmp_path / "a", clips, 1.0, {key: [0.1, 0.1] for key in KEYS[:4]})
    second = write_scored_flow(tmp_path / "b", clips, 2.0, {key: [0.1, 9.0] for key in KEYS[1:6]})
    index = ClipIndex.open(clips.url, first.url, other_flows=[second.url])
    assert index.keys == KEYS[1:4]
    drawn = [float(index.drawn(0, np.random.default_rng(seed)).flow(0, 1)[0, 0, 0]) for seed in range(40)]
    assert set(drawn) == {1.0, 2.0} and 8 < drawn.count(1.0) < 32
    again = [float(index.drawn(0, np.random.default_rng(seed)).flow(0, 1)[0, 0, 0]) for seed in range(40)]
    assert drawn == again
    limits = PairFilterConfig(max_consistency_px=1.0)
    mean = ClipIndex.open(clips.url, first.url, other_flows=[second.url], flow_use="average", pairs=limits)
    clip = pickle.loads(pickle.dumps(mean)).drawn(0, np.random.default_rng(0))
    assert (clip.flow(0, 1) == 1.5).all() and clip.flow_pairs == [(0, 1)]
    assert clip.flow_pair(0, 1).occlusion.sum() == 2 and clip.flow_size == (4, 6)
    one_way = write_scored_flow(tmp_path / "c", clips, 1.0, {key: [None, None] for key in KEYS[:4]})
    assert len(ClipIndex.open(clips.url, one_way.url, other_flows=[second.url], pairs=limits)) == 3
    with pytest.raises(ValueError, match=r"max_consistency_px has nothing to go by: .*; teach with directions="):
        ClipIndex.open(clips.url, one_way.url, pairs=limits)
    single = ClipIndex.open(clips.url, first.url)
    rng = np.random.default_rng(0)
    assert single.drawn(0, rng).flow(0, 1)[0, 0, 0] == 1.0
    assert rng.random() == np.random.default_rng(0).random(), "nothing is drawn for a single teacher"
    with pytest.raises(ValueError, match="flow of 1 teachers, not number 1"):
        single.clip(0).with_flow(1)
