"""AllTracker: published numbers, windows and streaming, losses, variants, memory, errors."""

import pytest
import torch

from kinema.kernels.convex_upsampling import convex_upsample
from kinema.models.tracks.alltracker import AllTracker, DenseTracks, alltracker
from kinema.models.tracks.alltracker import correlation as alltracker_correlation
from kinema.models.tracks.alltracker.correlation import AnchorCorrelation
from kinema.models.tracks.alltracker.loss import pair_loss, sparse_track_loss
from kinema.models.tracks.alltracker.network import window_starts

TOLERANCE = {"atol": 0, "rtol": 2e-5}


@pytest.fixture(scope="module")
def network(fill, manifest):
    """The full network with the weights of the goldens; tests leave it as it is."""
    return fill.fill_(alltracker(), 0, manifest("alltracker"))


@pytest.fixture(scope="module")
def tiny(fill, manifest):
    """The tiny one."""
    return fill.fill_(alltracker("alltracker_tiny"), 0, manifest("alltracker_tiny"))


def _video(fill, batch, num_frames, height, width, seed=0):
    frames = [
        255 * fill.image(seed, "vid", batch, height, width, shift=(1.5 * t, -1.0 * t), zoom=1.0 + 0.01 * t)
        for t in range(num_frames)
    ]
    return torch.stack(frames, dim=1)


def _inner(model, run, num_frames):
    """What `run` computes inside, under the names of the goldens."""
    block, seen, states = model.update_block, {}, []
    names = {
        "corr_step1": (block.motion_encoder, 1),
        "motion_step1": (block.motion_encoder, None),
        "time_block_step1": (block.refine[0], None),
        "space_block_step1": (block.refine[1], None),
        "state_step1": (block, None),
        "flow_head_step1": (model.flow_head, None),
        "visconf_head_step1": (model.visconf_head, None),
    }
    hooks = []
    for name, (module, argument) in names.items():

        def keep(_, given, out, name=name, argument=argument):
            seen.setdefault(name, []).append(out if argument is None else given[argument])

        hooks.append(module.register_forward_hook(keep))
    refine = model._refine

    def refined(*arguments):
        for state in refine(*arguments):
            states.append(state)
            yield state

    encode, features = model.encode, []
    model.encode = lambda video: features.append(encode(video)) or features[-1]
    model._refine = refined
    with torch.no_grad():
        out = run()
    del model._refine, model.encode
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        full = [torch.cat([model._upsampled(s.flow, s.logits, s.hidden)]) for s in states]
    rows = states[0].flow.shape[0]
    found = {name: torch.cat(maps)[:rows] for name, maps in seen.items()}
    return out, found | {
        "features": torch.cat([part.maps for part in features], dim=1).flatten(0, 1),
        "flow_per_step": torch.stack([maps[:, :2] for maps in full]),
        "visconf_logits_per_step": torch.stack([maps[:, 2:] for maps in full]),
        "flow8_last": states[-1].flow,
        "visconf8_last": states[-1].logits,
    }


@pytest.mark.parametrize("name", ["alltracker", "alltracker_tiny"])
def test_state_dict_is_the_published_one(name, manifest, assert_state_matches):
    model, expected = alltracker(name), manifest(name)
    assert_state_matches(model, expected)
    assert sum(p.numel() for p in model.parameters()) == expected["parameter_count"]
    statistics = expected["skipped_values"]["time_emb"]
    assert float(model.time_emb.double().norm()) == pytest.approx(statistics["l2"], rel=1e-6)


def test_a_pair_equals_the_published_network(network, fill, golden):
    reference, video = golden("alltracker__s0_pair_100x141"), _video(fill, 2, 2, 100, 141)
    (flow, visconf), found = _inner(network, lambda: network(video, iters=4), 1)
    found |= {"flow": flow[:, 1], "visconf": visconf[:, 1]}
    assert set(found) == set(reference.meta["arrays"])
    for name, value in found.items():
        reference.check(name, value, **TOLERANCE)
    assert not flow[:, 0].any() and bool((visconf[:, 0] == 1).all())


@pytest.mark.parametrize(
    ("name", "num_frames", "iters"), [("alltracker__s0_t12_96x128", 12, 4), ("alltracker_tiny__s0_t16_96x128", 16, 3)]
)
def test_one_window_equals_the_published_network(name, num_frames, iters, network, tiny, fill, golden):
    model, reference = tiny if "tiny" in name else network, golden(name)
    video = _video(fill, 1, num_frames, 96, 128)
    (flow, visconf), found = _inner(model, lambda: model(video, iters=iters), 16)
    missing = 16 - num_frames
    features = found["features"]  # the last frame is encoded once, however often it is repeated
    found["features"] = torch.cat([features, features[-1:].expand(missing, -1, -1, -1)])
    found |= {"flow": flow, "visconf": visconf}
    assert set(found) == set(reference.meta["arrays"])
    for key, value in found.items():
        reference.check(key, value, **TOLERANCE)


@pytest.fixture
def begins(network):
    """What every window of the network starts from, once it was called."""
    kept, begin = [], network._begin

    def keeping(*arguments):
        kept.append(begin(*arguments))
        return kept[-1]

    network._begin = keeping
    yield kept
    del network._begin


@pytest.mark.slow
def test_windows_equal_the_published_network(network, begins, fill, golden):
    reference = golden("alltracker__s0_t27_72x104")
    with torch.no_grad():
        found = network(_video(fill, 1, 27, 72, 104), iters=2)
    reference.check("window2_flow_start", begins[1][0], **TOLERANCE)
    reference.check("window2_visconf_start", begins[1][1], **TOLERANCE)
    reference.check("flow", found.flow, **TOLERANCE)
    reference.check("visconf", found.visconf, **TOLERANCE)


@pytest.mark.slow  # windows of 8 frames: test_parts_equal_the_published_ones
def test_sliding_windows_equal_the_published_network(network, begins, fill, golden):
    reference = golden("alltracker__s0_t27_72x104")
    with torch.no_grad():
        found = network.sliding(_video(fill, 1, 27, 72, 104), iters=2)
    reference.check("sliding_window3_flow_start", begins[2][0], **TOLERANCE)
    # The second window starts from the second half of the first one's end.
    half = torch.from_numpy(reference.data["window1_flow_end"]).view(16, 2, 16, 16)[8:]
    assert (begins[1][0][:8] - half).abs().max() < 2e-5
    reference.check("sliding_flow", found.flow, **TOLERANCE)
    reference.check("sliding_visconf", found.visconf, **TOLERANCE)


def test_parts_equal_the_published_ones(network, fill, golden):
    reference, blocks = golden("alltracker_probes__s0"), network.update_block.refine
    encoder = network.cnn.features
    anchor, other = fill.normal(0, "f1", 1, 256, 16, 17), fill.normal(0, "f2", 1, 256, 16, 17)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(17.0), indexing="ij")
    target = torch.stack([x, y]) + fill.uniform(0, "of", 1, 2, 16, 17, low=-6, high=6)[0]
    with torch.no_grad():
        found = {
            "time_block": blocks[0](fill.normal(0, "tb", 8, 128, 2, 2, std=1e-3), 8),
            "space_block": blocks[1](fill.normal(0, "sb", 1, 128, 5, 6, std=1e-3)),
            "stem": encoder[0](fill.normal(0, "st", 1, 3, 16, 20, std=1e-3)),
            "down8": encoder[2](fill.normal(0, "d8", 1, 96, 6, 8, std=1e-3)),
            "widen": encoder[4](fill.normal(0, "wi", 1, 192, 6, 8)),
            "time_table": network.times(16)[None],
            "time_table_8": network.times(8)[None],
            "time_table_20": network.times(20)[None],
            "time_table_1": network.times(1)[None],
            "corr": AnchorCorrelation(anchor, other[:, None]).lookup(0, target)[None],
            "upsample": convex_upsample(8 * fill.normal(0, "up", 1, 2, 4, 5), fill.normal(0, "mk", 1, 576, 4, 5)),
        }
        flow, visconf = network.sliding(_video(fill, 1, 10, 72, 80), iters=1, window_frames=8)
    found |= {"sliding_window8_flow": flow, "sliding_window8_visconf": visconf}
    assert set(found) == set(reference.meta["arrays"])
    for name, value in found.items():
        reference.check(name, value, **TOLERANCE)


def test_products_that_are_not_kept_give_the_same_windows(fill, monkeypatch):
    anchor, frames = fill.normal(0, "f1", 2, 8, 17, 19), fill.normal(0, "f2", 2, 3, 8, 17, 19)
    target = fill.uniform(0, "to", 2, 17, 19, low=-9, high=30)
    with torch.no_grad():
        kept = [AnchorCorrelation(anchor, frames).lookup(row, target) for row in range(6)]
        monkeypatch.setattr(alltracker_correlation, "MAX_KEPT_BYTES", 0)
        monkeypatch.setattr(alltracker_correlation, "MAX_PART_BYTES", 100_000)
        formed = [AnchorCorrelation(anchor, frames).lookup(row, target) for row in range(6)]
    assert max((one - other).abs().max().item() for one, other in zip(kept, formed, strict=True)) < 1e-5


def _tracks(fill):
    x0 = fill.uniform(0, "x0", 40, low=-2, high=65)
    y0 = fill.uniform(0, "y0", 40, low=-2, high=49)
    d = fill.normal(0, "dx", 1, 24, 40, 2, std=2.0)
    tracks = torch.stack([x0, y0], dim=-1) + d.cumsum(1) - d[:, :1]
    visible = (fill.uniform(0, "vis", 1, 24, 40) > 0.3).float()
    visible[:, 0] = 1
    return tracks, visible, (fill.uniform(0, "val", 1, 24, 40) > 0.1).float()


def test_losses_of_fixed_predictions_equal_the_published_ones(fill, golden):
    reference = golden("alltracker__s0_loss")
    windows = [
        [
            DenseTracks(
                fill.smooth_flow(0, f"fp{w}{i}", 16, 48, 64, amplitude=10.0)[None],
                fill.uniform(0, f"vc{w}{i}", 1, 16, 2, 48, 64, low=0.02, high=0.98),
            )
            for i in range(3)
        ]
        for w in range(2)
    ]
    for stage in (1, 2):
        loss = sparse_track_loss(windows, *_tracks(fill), stage=stage)
        names = ("total", "seq_loss_visible", "seq_loss_invisible", "vis_loss", "conf_loss")
        for name, value in zip(names, loss, strict=True):
            reference.check(f"stage{stage}_{name}", value, atol=0, rtol=1e-5)
    huber = sparse_track_loss(windows, *_tracks(fill), stage=2, huber=True)
    reference.check("stage2_huber_seq_loss_visible", huber.visible, atol=0, rtol=1e-5)
    truth, known = _flow_truth(fill)
    fixed = [fill.smooth_flow(0, f"pp{i}", 2, 65, 80, amplitude=9.0) for i in range(4)]
    reference.check("pair_fixed_loss", pair_loss(fixed, truth, known), atol=0, rtol=1e-5)


def _flow_truth(fill):
    known = (fill.uniform(0, "gv", 2, 1, 65, 80) > 0.25).float()
    return fill.smooth_flow(0, "gt", 2, 65, 80, amplitude=8.0), known


def test_training_on_pairs_gives_the_published_gradients(fill, manifest, golden):
    model = fill.fill_(AllTracker(), 0, manifest("alltracker"))
    reference = golden("alltracker__s0_loss")
    (steps,) = model.predictions(_video(fill, 2, 2, 65, 80), iters=3, time_row=5)
    reference.check("train_pair_flow", steps[-1].flow[:, 0], **TOLERANCE)
    loss = pair_loss([step.flow[:, 0] for step in steps], *_flow_truth(fill))
    reference.check("train_pair_loss", loss, atol=0, rtol=1e-5)
    loss.backward()
    names = {
        "flow_head.2.weight": "flow_head.2.weight",
        "upsample_weight.2.weight": "upsample_weight.2.weight",
        "update_block.motion_encoder.convc1.weight": "update_block.motion_encoder.convc1.weight",
        "dot_conv.weight": "dot_conv.weight",
        "cnn.features.0.0.weight": "cnn.features.0.0.weight",
        "update_block.refine.0.layer_scale": "update_block.refine.0.layer_scale",
        "visconf_head.2.weight": "visconf_head.2.weight",
    }
    for name, parameter in names.items():
        reference.check(f"grad_{name}", model.get_parameter(parameter).grad, atol=0, rtol=1e-4)


def test_training_windows_are_those_of_the_whole_clip(tiny, fill):
    video = _video(fill, 1, 24, 40, 56)
    with torch.no_grad():
        windows = tiny.predictions(video, iters=1)
        whole = tiny(video, iters=1)
    first, second = (steps[-1].flow for steps in windows)
    assert (torch.cat([first[:, :8], second], dim=1) - whole.flow).abs().max() < 1e-5
    with pytest.raises(ValueError, match="in steps of 8; this one has 18"):
        tiny.predictions(video[:, :18])


@pytest.mark.parametrize(("num_frames", "starts"), [(3, [0]), (16, [0]), (17, [0, 8]), (24, [0, 8]), (25, [0, 8, 16])])
def test_windows_reach_the_end(num_frames, starts):
    assert window_starts(num_frames, 16) == starts


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("num_frames", [2, 3, 7])
def test_a_stream_gives_every_frame_once_and_asks_for_each_once(num_frames, overwrite, tiny, fill):
    video, asked = _video(fill, 1, num_frames, 24, 32), []

    def frames(start, end):
        asked.extend(range(start, end))
        return video[:, start:end]

    with torch.no_grad():
        parts = list(tiny.stream(frames, num_frames, iters=1, overwrite=overwrite, window_frames=4))
    assert asked == list(range(num_frames))
    ends = [part.start + part.tracks.flow.shape[1] for part in parts]
    assert [part.start for part in parts] == [0, *ends[:-1]] and ends[-1] == num_frames


def test_clips_of_a_batch_do_not_see_one_another(tiny, fill):
    video = _video(fill, 2, 5, 24, 32)
    with torch.no_grad():
        both = tiny.sliding(video, iters=1, window_frames=4)
        second = tiny.sliding(video[1:], iters=1, window_frames=4)
    assert (both.flow[1:] - second.flow).abs().max() < 1e-5
    assert both.visconf.min() >= 0 and both.visconf.max() <= 1


def test_the_checkpoint_chooses_the_variant_and_a_wrong_one_lists_what_is_missing(tiny, tmp_path):
    torch.save({"model": tiny.state_dict()}, tmp_path / "released.pth")
    loaded = alltracker("alltracker", weights=tmp_path / "released.pth")
    assert loaded.tiny and torch.equal(loaded.fnet.conv1.weight, tiny.fnet.conv1.weight)
    torch.save({"cnn.other": torch.zeros(3)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"do not fit alltracker \(missing: time_emb, .* more; unexpected: cnn.other"):
        alltracker(weights=tmp_path / "wrong.pth")


def test_bad_arguments_are_refused(tiny):
    with pytest.raises(ValueError, match=r"video is \[1, 2, 4, 40, 40\]"):
        tiny(torch.zeros(1, 2, 4, 40, 40))
    with pytest.raises(ValueError, match=r"a clip of 1 frame\(s\)"):
        tiny(torch.zeros(1, 1, 3, 40, 40))
    with pytest.raises(ValueError, match="iters=0 must be at least 1"):
        tiny.sliding(torch.zeros(1, 2, 3, 40, 40), iters=0)
    with pytest.raises(ValueError, match="is no AllTracker"):
        alltracker("alltracker_huge")
