"""CoTracker3: published numbers, batches, the predictor, long clips, errors."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.models.backbones.inference_conv import instance_norm_
from kinema.models.tracks.cotracker3 import layers as cotracker3_layers
from kinema.models.tracks.cotracker3 import network as cotracker3
from kinema.models.tracks.cotracker3.correlation import window_correlation, windows
from kinema.models.tracks.cotracker3.inference import encoded_frames
from kinema.models.tracks.cotracker3.network import CoTracker3, encode_motion
from kinema.models.tracks.cotracker3.predictor import BenchmarkTracker, CoTracker3Predictor, grid_points
from kinema.models.tracks.cotracker3.windowed import window_spans
from kinema.models.weights import NonCommercialWeightsWarning
from kinema.pipelines.scenes import Scene

REPO_ROOT = Path(__file__).resolve().parents[2]
TRACKS_PX, FLAGS, MAPS = 2e-4, 2e-5, 3e-5


@pytest.fixture(scope="module")
def filled(fill, manifest):
    """`filled(seed, resolution)`: the network with the weights of the goldens, in eval mode; one is kept."""
    kept = {}

    def build(seed=0, resolution=(384, 512)):
        if (seed, resolution) not in kept:
            kept.clear()
            model = CoTracker3(model_resolution=resolution)
            kept[seed, resolution] = fill.fill_(model, seed, manifest("cotracker3_offline")).eval()
        return kept[seed, resolution]

    return build


def _video(fill, seed, batch, num_frames, height, width):
    frames = [
        255 * fill.image(seed, "vid", batch, height, width, shift=(1.5 * t, -1.0 * t), zoom=1.0 + 0.01 * t)
        for t in range(num_frames)
    ]
    return torch.stack(frames, dim=1)


def _queries(fill, seed, batch, num, num_frames, height, width):
    t = fill.integers(seed, "qt", 0, num_frames, batch, num).float()
    t[:, 0], t[:, 1] = 0, num_frames - 1
    x = fill.uniform(seed, "qx", batch, num, low=4, high=width - 5)
    y = fill.uniform(seed, "qy", batch, num, low=4, high=height - 5)
    return torch.stack([t, x, y], dim=-1)


def test_state_dict_is_the_published_one(manifest, assert_state_matches):
    expected, model = manifest("cotracker3_offline"), CoTracker3()
    assert_state_matches(model, expected)
    assert sum(p.numel() for p in model.parameters()) == expected["parameter_count"]
    statistics = expected["skipped_values"]["time_emb"]
    assert float(model.time_emb.double().norm()) == pytest.approx(statistics["l2"], rel=1e-6)
    assert float(model.time_emb.double().mean()) == pytest.approx(statistics["mean"], rel=1e-6)


def test_tracks_equal_the_published_network(filled, fill, golden):
    model, reference = filled(), golden("cotracker3_offline__s0_t10_96x128")
    video, queries = _video(fill, 0, 1, 10, 96, 128), _queries(fill, 0, 1, 6, 10, 96, 128)
    raw, inputs, outputs = [], [], []

    def keep(_, given, out):
        inputs.append(given[0])
        outputs.append(out)

    hooks = [
        model.fnet.register_forward_hook(lambda _, __, out: raw.append(out)),
        model.updateformer.register_forward_hook(keep),
    ]
    with torch.no_grad():
        steps = model.predictions(video, queries, iters=4)
    for hook in hooks:
        hook.remove()
    reference.check("feature_map_raw", torch.cat(raw), atol=MAPS, rtol=0)
    reference.check("transformer_input_step1", inputs[0], atol=MAPS, rtol=0)
    reference.check("transformer_output_step1", outputs[0], atol=MAPS, rtol=0)
    reference.check("transformer_input_step2", inputs[1], atol=MAPS, rtol=0)
    for name, tolerance in (("tracks", TRACKS_PX), ("visibility", FLAGS), ("confidence", FLAGS)):
        reference.check(name, getattr(steps[-1], name), atol=tolerance, rtol=0)
        per_step = torch.stack([getattr(step, name) for step in steps])
        reference.check(f"{name}_per_iteration", per_step, atol=tolerance, rtol=0)


def test_the_encoder_arranged_for_speed_gives_the_published_numbers_too(filled, fill, golden):
    """Above, a hook sees the layers; without one, and without gradient, they are not called."""
    model, reference = filled(), golden("cotracker3_offline__s0_t10_96x128")
    video, queries = _video(fill, 0, 1, 10, 96, 128), _queries(fill, 0, 1, 6, 10, 96, 128)
    with torch.no_grad():
        raw = encoded_frames(model.fnet, 2.0 * (video[0] / 255.0) - 1.0)
        found = model(video, queries, iters=4)
    reference.check("feature_map_raw", raw, atol=MAPS, rtol=0)
    for name, tolerance in (("tracks", TRACKS_PX), ("visibility", FLAGS), ("confidence", FLAGS)):
        reference.check(name, getattr(found, name), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instance_norm_in_place_is_the_layer_also_far_from_zero(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 96, 61, 70, generator=generator) * torch.linspace(0.01, 5, 96).view(1, -1, 1, 1) + 30
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    wanted = torch.nn.functional.instance_norm(x.double())
    found = instance_norm_(x.clone(memory_format=torch.preserve_format), relu=False)
    with_relu = instance_norm_(x, relu=True)
    assert found.dtype == dtype
    error = (found.double() - wanted).abs()
    assert error.max() < (2e-3 if dtype == torch.float32 else 0.03)  # 30 +- 0.01 has 3 digits left in float32
    assert error[:, 48:].max() < (3e-5 if dtype == torch.float32 else 0.03)
    assert torch.equal(with_relu, found.relu())


def test_bf16_products_keep_positions_and_logits_in_float32(filled, fill):
    model = filled()
    video, queries = _video(fill, 0, 1, 5, 96, 128), _queries(fill, 0, 1, 6, 5, 96, 128)
    with torch.no_grad():
        exact = model(video, queries, iters=2)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(video, queries, iters=2)
    assert rough.tracks.dtype == rough.visibility.dtype == torch.float32
    moved_px = (rough.tracks - exact.tracks).norm(dim=-1)
    assert 0 < moved_px.mean() < 0.5
    assert (rough.visibility - exact.visibility).abs().mean() < 0.02


def test_parts_equal_the_published_ones(filled, fill, golden):
    model, reference = filled(), golden("cotracker3_probes__s0")
    level = fill.normal(0, "fmap", 1, 4, 16, 9, 11)[0].permute(0, 2, 3, 1).contiguous()
    t = fill.integers(0, "t", 0, 4, 1, 5)[0]
    xy = torch.stack(
        [fill.uniform(0, "px", 1, 5, low=-1.5, high=11.5)[0], fill.uniform(0, "py", 1, 5, low=-1.5, high=9.5)[0]], -1
    )
    every_frame, everywhere = torch.arange(4).expand(5, 4), xy[:, None].expand(5, 4, 2)
    with torch.no_grad():
        template, target = windows(level, t, xy), windows(level, every_frame, everywhere)
        products = window_correlation(level, template.flatten(1, 2), every_frame, everywhere)
        virtual_block = model.updateformer.space_virtual2point_blocks[0]
        tiny = virtual_block(fill.normal(0, "x", 2, 6, 384, std=1e-3), fill.normal(0, "y", 2, 9, 384, std=1e-3))
        found = {
            "corr_mlp": model.corr_mlp(fill.normal(0, "corr", 5, 2401, std=2)),
            "cross_block_tiny_input": tiny,
            "self_block": model.updateformer.time_blocks[0](fill.normal(0, "z", 3, 7, 384)),
            "template_window": template.flatten(1, 2).transpose(0, 1)[None],
            "target_window": target.transpose(0, 1)[None],
            "time_table_10": model.times(10)[None],
            "time_table_75": model.times(75)[None],
            "motion_encoding": encode_motion(fill.normal(0, "rel", 3, 4, std=0.3)),
        }
    for name, value in found.items():
        reference.check(name, value, atol=MAPS, rtol=0)
    expected = torch.einsum("pthwc,pijc->pthwij", target, template).flatten(2)
    assert (products - expected).abs().max() < 1e-4


def test_support_grids_equal_the_published_ones(golden):
    reference = golden("cotracker3_probes__s0")
    for name, grid in {
        "grid_6_in_96x128": grid_points(6, 96, 128),
        "grid_8_in_50_at_y20_x33": grid_points(8, 50, 50, (20.0, 33.0)),
        "grid_1_in_96x128": grid_points(1, 96, 128),
    }.items():
        reference.check(name, grid[None], atol=MAPS, rtol=0)


CASES = {
    "queries": {},
    "queries_backward": {"backward": True},
    "grid5_frame3_backward": {"grid": 5, "grid_frame": 3, "backward": True},
    "grid6_mask": {"grid": 6},
}


# Each kind in the ordinary run: queries and backward in one, a grid and a mask in the other.
REPEATED = ("queries", "grid5_frame3_backward")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in REPEATED)) for c in CASES])
def test_predictor_equals_the_published_one(case, filled, fill, golden):
    model, reference = filled(resolution=(96, 128)), golden("cotracker3_predictor__s0_t8")
    video, queries = _video(fill, 0, 1, 8, 80, 112), _queries(fill, 0, 1, 5, 8, 80, 112)
    options = dict(CASES[case])
    if case == "grid6_mask":
        options["mask"] = fill.image(0, "seg", 1, 80, 112, channels=1)[0, 0] > 0.5
    found = CoTracker3Predictor(model)(video / 255, None if "grid" in case else queries, **options)
    reference.check(f"{case}.tracks", found.tracks, atol=TRACKS_PX, rtol=0)
    reference.check(f"{case}.visible", found.visible.float(), atol=0, rtol=0)
    assert found.confidence.shape == found.visible.shape


@pytest.mark.parametrize("name", ["joint", pytest.param("single", marks=pytest.mark.slow)])
def test_benchmark_tracker_equals_the_published_wrapper(name, filled, fill, golden):
    model, reference = filled(resolution=(96, 128)), golden(f"cotracker3_evaluation__s0_{name}")
    video, queries = _video(fill, 0, 1, 8, 80, 112)[0] / 255, _queries(fill, 0, 1, 3, 8, 80, 112)[0]
    tracker = BenchmarkTracker(model, single=name == "single")
    tracks, score = tracker.scores(video, queries)
    reference.check("tracks", tracks[None], atol=TRACKS_PX, rtol=0)
    reference.check("visibility_times_confidence", score[None], atol=FLAGS, rtol=0)
    assert torch.equal(tracker(video, queries)[1], score > 0.6)


@pytest.fixture(scope="module")
def small(filled):
    """The filled network for tests that only need some numbers, at a resolution that costs little."""
    return filled(resolution=(48, 64))


def test_a_batch_gives_what_its_clips_give(small, fill):
    video, queries = _video(fill, 3, 2, 5, 40, 48), _queries(fill, 3, 2, 4, 5, 40, 48)
    with torch.no_grad():
        together = small(video, queries, iters=2)
        alone = [small(video[i : i + 1], queries[i : i + 1], iters=2) for i in range(2)]
    for name, tolerance in (("tracks", TRACKS_PX), ("visibility", FLAGS), ("confidence", FLAGS)):
        expected = torch.cat([getattr(one, name) for one in alone])
        assert (getattr(together, name) - expected).abs().max() < tolerance
    predictor = CoTracker3Predictor(small, iters=1)
    both = predictor(video / 255, queries, backward=True)
    second = predictor(video[1] / 255, queries[1], backward=True)
    assert (both.tracks[1] - second.tracks).abs().max() < TRACKS_PX and both.visible.shape == (2, 5, 4)


def test_working_in_small_pieces_changes_nothing(small, fill, monkeypatch):
    video, queries = _video(fill, 4, 1, 6, 40, 48), _queries(fill, 4, 1, 7, 6, 40, 48)
    with torch.inference_mode():
        whole = small(video, queries, iters=2)
        monkeypatch.setattr(cotracker3, "MAX_TRACK_FRAMES_CPU", 6)
        monkeypatch.setattr(cotracker3_layers, "TOKENS_AT_ONCE_CPU", 80)
        pieces = small.track(small.encode(video, frames_at_once=1), queries, iters=2)
    assert (pieces.tracks - whole.tracks).abs().max() < TRACKS_PX
    assert (pieces.visibility - whole.visibility).abs().max() < FLAGS


def test_gradients_reach_every_weight(small, fill):
    model = copy.deepcopy(small)
    video, queries = _video(fill, 5, 1, 3, 32, 32), _queries(fill, 5, 1, 2, 3, 32, 32)
    steps = model.predictions(video, queries, iters=2)
    sum(step.tracks.sum() + step.visibility.sum() + step.confidence.sum() for step in steps).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    # A bias in front of an instance norm without weights is taken out again by it: its gradient is rounding.
    assert not [name for name in without if not (name.startswith("fnet") and name.endswith("bias"))]


def test_bytes_and_floats_are_the_same_clip(small, fill):
    pixels = _video(fill, 6, 1, 4, 37, 51)[0].round()
    queries = torch.tensor([[0.0, 10, 12], [3.0, 40.5, 30]])
    predictor = CoTracker3Predictor(small, iters=2)
    from_floats = predictor(pixels / 255, queries)
    from_bytes = predictor(pixels.byte().permute(0, 2, 3, 1).numpy(), queries.numpy())
    assert (from_bytes.tracks - from_floats.tracks).abs().max() < TRACKS_PX
    assert from_bytes.tracks.shape == (4, 2, 2) and from_bytes.visible.dtype == torch.bool
    for i, (t, x, y) in enumerate(queries.tolist()):
        assert from_bytes.tracks[int(t), i].tolist() == pytest.approx([x, y], abs=1e-4)
        assert from_bytes.visible[int(t), i]


def test_no_queries_give_no_tracks(small, fill):
    video = _video(fill, 6, 1, 3, 32, 40)[0] / 255
    found = CoTracker3Predictor(small)(video, torch.zeros(0, 3))
    assert found.tracks.shape == (3, 0, 2) and found.visible.shape == (3, 0)
    assert CoTracker3Predictor(small)(video, grid=4, mask=torch.zeros(32, 40)).tracks.shape == (3, 0, 2)


def test_groups_of_queries_track_as_each_would_alone_with_its_support(small, fill):
    video, queries = _video(fill, 7, 1, 4, 48, 64)[0] / 255, _queries(fill, 7, 1, 5, 4, 48, 64)[0]
    grouped = CoTracker3Predictor(small, iters=2, support_grid=2, max_positions=6 * 4)(video, queries)
    alone = CoTracker3Predictor(small, iters=2, support_grid=2)
    for part in ([0, 1], [2, 3], [4]):
        assert (grouped.tracks[:, part] - alone(video, queries[part]).tracks).abs().max() < TRACKS_PX


@pytest.mark.parametrize(
    ("num_frames", "window", "spans"),
    [(9, 4, [(0, 4), (2, 6), (4, 8), (5, 9)]), (8, 4, [(0, 4), (2, 6), (4, 8)]), (3, 4, [(0, 3)]), (4, 4, [(0, 4)])],
)
def test_windows_cover_the_clip(num_frames, window, spans):
    assert list(window_spans(num_frames, window)) == spans


@pytest.fixture
def shifting():
    """A network that moves every position by (0.8, -0.4) pixels a refinement, whatever it sees."""
    torch.manual_seed(0)
    model = CoTracker3(model_resolution=(32, 32))
    heads = model.updateformer
    with torch.no_grad():
        for head, bias in ((heads.flow_head, [0.2, -0.1]), (heads.vis_conf_head, [4.0, -1.0])):
            head.weight.zero_()
            head.bias.copy_(torch.tensor(bias))
    return model


def test_each_window_goes_on_from_the_last(shifting):
    """Every window that holds a frame adds one shift; behind the overlap it starts from the last known position."""
    frames = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    queries = torch.tensor([[0.0, 10, 20], [4.0, 5, 6], [8.0, 16, 16]])
    predictor = CoTracker3Predictor(shifting, iters=1, support_grid=2, whole_frames=4, window_frames=4)
    found = predictor(frames, queries)
    shifts = torch.tensor([[0, 1, 2, 2, 3, 4, 4, 4, 4], [3, 3, 3, 3, 0, 3, 3, 3, 3], [4, 4, 4, 4, 3, 2, 2, 1, 0]])
    expected = queries[:, None, 1:] + shifts[..., None] * torch.tensor([0.8, -0.4])
    assert (found.tracks.transpose(0, 1) - expected).abs().max() < 1e-4
    assert bool(found.visible.all())
    confidence = torch.sigmoid(-shifts[0, 1:].float())
    assert (found.confidence[1:, 0] - confidence).abs().max() < 1e-5


def test_one_window_over_the_whole_clip_is_the_published_pass(small, fill):
    video, queries = _video(fill, 8, 1, 7, 48, 64)[0] / 255, _queries(fill, 8, 1, 4, 7, 48, 64)[0]
    queries[:, 0] = 0  # with later queries the reversed pass leaves those of frame 0 out
    published = CoTracker3Predictor(small, iters=2)(video, queries)
    windowed = CoTracker3Predictor(small, iters=2, whole_frames=3, window_frames=60)(video, queries)
    assert (windowed.tracks - published.tracks).abs().max() < TRACKS_PX


def test_a_long_clip_is_tracked_to_both_ends_a_few_frames_at_a_time(small):
    scene = Scene(3, 48, 64, num_frames=26, num_objects=2)
    frames = np.stack(list(scene.frames()))
    queries = torch.tensor([[0.0, 20, 20], [13.0, 40, 25], [25.0, 30, 30]])
    reads = []

    class OnDemand:
        def __len__(self):
            return len(frames)

        def __getitem__(self, rows):
            reads.append(frames[rows])
            return reads[-1]

    found = CoTracker3Predictor(small, iters=1, support_grid=2, whole_frames=20, window_frames=12)(OnDemand(), queries)
    assert max(len(part) for part in reads) <= 8 and sum(len(part) for part in reads) <= 2 * 26 + 1
    away_px = (found.tracks - queries[:, 1:]).norm(dim=-1)
    on_query = torch.arange(26)[:, None] == queries[:, 0]
    assert bool((away_px[on_query] < 1e-4).all()) and bool(found.visible[on_query].all())
    assert bool((away_px[~on_query] > 0).all()) and float(away_px.max()) < 25


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda v, q: (v[:, :, :2], q), r"\[B, T, 3, H, W\]"),
        (lambda v, q: (v[..., :30], q), "multiples of 4"),
        (lambda v, q: (v[..., :28], q), "32 or more"),
        (lambda v, q: (v, q[..., :2]), r"\[1, N, 3\]"),
        (lambda v, q: (v, q + 3), "frames 0..2"),
        (lambda v, q: (v, q - 1), "frames 0..2"),
        (lambda v, q: (v, q * float("nan")), "not finite"),
        (lambda v, q: (v, q, 0), "iters=0"),
    ],
)
def test_wrong_calls_of_the_network_say_the_rule(arguments, words, small):
    video, queries = torch.zeros(1, 3, 3, 32, 32), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=words):
        small(*arguments(video, queries))


@pytest.mark.parametrize(
    ("frames", "options", "words"),
    [
        (torch.zeros(2, 32, 32, 3), {"grid": 2}, "uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), {"grid": 2}, "int64"),
        (torch.full((2, 3, 32, 32), 200.0), {"grid": 2}, "0..1"),
        (torch.zeros(0, 3, 32, 32), {"grid": 2}, "no frames"),
        (torch.zeros(2, 3, 32, 32), {}, "not both"),
        (torch.zeros(2, 3, 32, 32), {"grid": 2, "queries": torch.zeros(1, 3)}, "not both"),
        (torch.zeros(2, 3, 32, 32), {"grid": 2, "grid_frame": 2}, "frames 0..1"),
        (torch.zeros(2, 3, 32, 32), {"grid": 2, "mask": torch.ones(8, 8)}, "mask"),
        (torch.zeros(2, 3, 32, 32), {"queries": torch.zeros(1, 2)}, r"\[N, 3\]"),
        (torch.zeros(2, 3, 32, 32), {"queries": torch.zeros(1, 3), "mask": torch.ones(32, 32)}, "grid"),
        (torch.zeros(2, 2, 3, 32, 32), {"queries": torch.zeros(1, 3)}, r"\[B, N, 3\]"),
    ],
)
def test_wrong_calls_of_the_predictor_say_the_rule(frames, options, words, small):
    with pytest.raises(ValueError, match=words):
        CoTracker3Predictor(small)(frames, **options)


def test_wrong_settings_say_the_rule(small):
    with pytest.raises(ValueError, match="window_frames=1"):
        CoTracker3Predictor(small, window_frames=1)
    with pytest.raises(ValueError, match="multiples of 4"):
        CoTracker3(model_resolution=(50, 64))


def test_hub_entry_loads_released_files_strictly(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "released.pth")
    with pytest.warns(NonCommercialWeightsWarning, match="CC BY-NC"):
        loaded = torch.hub.load(str(REPO_ROOT), "cotracker3", source="local", weights=str(tmp_path / "released.pth"))
    assert not loaded.training
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), small.state_dict().values(), strict=True)
    )
    state = {k: v for k, v in small.state_dict().items() if k != "corr_mlp.fc1.bias"}
    torch.save({"model": state}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="missing: corr_mlp.fc1.bias"):
        cotracker3.cotracker3(weights=tmp_path / "short.pth")
