"""CoTracker3: published numbers, batches, the predictor, long clips, errors."""

import pytest
import torch

from kinema.models.cotracker3 import CoTracker3, encode_motion
from kinema.models.cotracker3_correlation import window_correlation, windows
from kinema.models.cotracker3_predictor import BenchmarkTracker, CoTracker3Predictor, grid_points

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


@pytest.mark.parametrize("case", CASES)
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


@pytest.mark.parametrize("name", ["joint", "single"])
def test_benchmark_tracker_equals_the_published_wrapper(name, filled, fill, golden):
    model, reference = filled(resolution=(96, 128)), golden(f"cotracker3_evaluation__s0_{name}")
    video, queries = _video(fill, 0, 1, 8, 80, 112)[0] / 255, _queries(fill, 0, 1, 3, 8, 80, 112)[0]
    tracker = BenchmarkTracker(model, single=name == "single")
    tracks, score = tracker.scores(video, queries)
    reference.check("tracks", tracks[None], atol=TRACKS_PX, rtol=0)
    reference.check("visibility_times_confidence", score[None], atol=FLAGS, rtol=0)
    assert torch.equal(tracker(video, queries)[1], score > 0.6)
