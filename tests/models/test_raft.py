"""RAFT and RAFT-small: published numbers, the feature cache, sizes, padding, errors."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kinema.models.flow.geometry import px_to_half
from kinema.models.flow.raft.loss import flow_errors, sequence_loss
from kinema.models.flow.raft.network import RAFT, raft, raft_small
from kinema.pipelines.sidecars.flow_files import read_flow

VARIANTS = {"raft": "large", "raft_small": "small"}


@pytest.fixture(scope="module")
def filled(fill, manifest):
    """`filled("raft", seed)`: the network with the weights of the goldens, in eval mode."""
    return lambda name, seed=0: fill.fill_(RAFT(VARIANTS[name]), seed, manifest(name)).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_state_dict_is_the_published_one(name, manifest, assert_state_matches):
    network = RAFT(VARIANTS[name])
    assert_state_matches(network, manifest(name))
    assert sum(p.numel() for p in network.parameters()) == manifest(name)["parameter_count"]
    state, aliases = network.state_dict(), manifest(name)["aliases"]
    assert all(state[k].data_ptr() == state[other].data_ptr() for k, other in aliases.items())


@pytest.mark.parametrize("lookup", ["volume", "on_demand"])
@pytest.mark.parametrize("name", VARIANTS)
def test_flow_equals_the_published_network(name, lookup, filled, fill, golden):
    network, reference = filled(name), golden(f"{name}__s0_128x160")
    network.lookup = lookup
    first = fill.image(0, "img", 1, 128, 160)
    second = fill.image(0, "img", 1, 128, 160, shift=(2.0, -1.5), zoom=1.03)
    with torch.no_grad():
        features = network.encode(first)
        reference.check("fmap1", features.fmap, atol=0, rtol=2e-5)
        reference.check("context_raw", features.context, atol=0, rtol=2e-5)
        reference.check("flow", network(first, second, iters=4), atol=0, rtol=2e-5)
    windows = []  # a hook makes the layers themselves run, which they do not otherwise without gradient
    network.update_block.encoder.convc1.register_forward_pre_hook(lambda _, args: windows.append(args[0]))
    with torch.no_grad():
        reference.check("flow", network(first, second, iters=4), atol=0, rtol=2e-5)
    reference.check("corr_iter1", windows[0], atol=0, rtol=2e-5)


def test_flow_in_half_image_units_is_that_of_flowfeats_published_teacher(filled, fill, golden):
    first = fill.image(0, "img", 1, 140, 168)
    second = fill.image(0, "img", 1, 140, 168, shift=(2.0, -1.5), zoom=1.03)
    with torch.no_grad():
        flow_half = px_to_half(filled("raft")(first, second, iters=20))
    golden("flowfeat_teacher__s0").check("raft_teacher_flow", flow_half, atol=0, rtol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_sequence_loss_and_gradients_equal_the_published_ones(name, filled, fill, golden):
    network, reference = filled(name), golden(f"{name}__s0_seqloss")
    flow_gt = fill.smooth_flow(0, "flow_gt", 1, 128, 136, amplitude=6.0)
    flow_gt[:, :, :4, :4] = 500
    valid = (fill.uniform(0, "valid", 1, 128, 136) > 0.2).float()
    first = fill.image(0, "img", 1, 128, 136)
    second = fill.image(0, "img", 1, 128, 136, shift=(2.0, -1.5), zoom=1.03)
    predictions = network.predictions(first, second, iters=3)
    reference.check("flow_preds", torch.stack(predictions), atol=0, rtol=2e-5)
    loss = sequence_loss(predictions, flow_gt, valid, gamma=0.8)
    reference.check("loss", loss, atol=0, rtol=2e-5)
    for key, value in flow_errors(predictions[-1], flow_gt, valid).items():
        reference.check(key, torch.tensor(value), atol=1e-6, rtol=2e-5)
    loss.backward()
    reference.check("grad_flow_head_conv2_weight", network.update_block.flow_head.conv2.weight.grad, atol=0, rtol=1e-4)
    reference.check("grad_fnet_conv1_weight", network.fnet.conv1.weight.grad, atol=0, rtol=5e-2)
    reference.check("grad_cnet_conv1_weight", network.cnet.conv1.weight.grad, atol=0, rtol=5e-2)


def _pair(fill, batch, height, width, seed=5):
    first = fill.image(seed, "img", batch, height, width)
    return first, fill.image(seed, "img", batch, height, width, shift=(1.5, -1.0), zoom=1.02)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_features_give_the_direct_result(name, filled, fill):
    network, video = filled(name), torch.cat(_pair(fill, 2, 131, 150))
    starts, targets = [0, 1, 3], [1, 2, 0]
    with torch.no_grad():
        direct = network(video[starts], video[targets], iters=3)
        features = network.encode(video)
        cached = network.flow_from_features(features[starts], features[targets], iters=3)
        single = network.flow_from_features(features[3:], network.encode(video[:1], context=False), iters=3)
    scale = direct.abs().max()
    assert direct.shape == (3, 2, 131, 150) and len(features) == 4
    assert (cached - direct).abs().max() < 2e-5 * scale
    assert (single - direct[2:]).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_gives_what_its_pairs_give(name, filled, fill):
    network, (first, second) = filled(name), _pair(fill, 2, 128, 137)
    with torch.no_grad():
        together = network(first, second, iters=2)
        alone = torch.cat([network(first[i : i + 1], second[i : i + 1], iters=2) for i in range(2)])
    assert (together - alone).abs().max() < 2e-5 * alone.abs().max()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_last_prediction_is_the_result(name, filled, fill):
    network, (first, second) = filled(name), _pair(fill, 1, 128, 128)
    with torch.no_grad():
        predictions = network.predictions(first, second, iters=3)
        assert len(predictions) == 3
        for n, flow in enumerate(predictions, 1):
            assert (network(first, second, iters=n) - flow).abs().max() < 2e-5 * flow.abs().max()


def test_padding_outside_equals_padding_inside(filled, fill):
    """Odd sizes: as if the images had been padded by hand, borders repeated, the odd pixel right and below."""
    network, (first, second) = filled("raft_small"), _pair(fill, 1, 131, 150)
    by_hand = [torch.nn.functional.pad(x, (1, 1, 2, 3), mode="replicate") for x in (first, second)]
    with torch.no_grad():
        flow, padded = network(first, second, iters=2), network(*by_hand, iters=2)
        assert torch.equal(flow, padded[..., 2:-3, 1:-1])
        network.padding = "kitti"
        by_hand = [torch.nn.functional.pad(x, (1, 1, 0, 5), mode="replicate") for x in (first, second)]
        assert torch.equal(network(first, second, iters=2), network(*by_hand, iters=2)[..., :-5, 1:-1])


@pytest.mark.parametrize("size", [(1, 1), (7, 90), (64, 64), (100, 130), (127, 121)])
@pytest.mark.parametrize("name", VARIANTS)
def test_small_images_give_finite_flow_of_their_size(name, size, filled, fill):
    network, (first, second) = filled(name), _pair(fill, 1, *size)
    with torch.no_grad():
        flow = network(first, second, iters=2)
    assert flow.shape == (1, 2, *size) and torch.isfinite(flow).all()


def test_small_images_with_published_weights_show_the_motion(fill, shared_data):
    network = raft_small(weights=shared_data / "weights" / "raft-small.pth")
    first = fill.image(0, "small", 1, 64, 96)
    second = fill.image(0, "small", 1, 64, 96, shift=(3.0, -2.0))
    with torch.no_grad():
        flow = network(first, second)[..., 12:-12, 12:-12].flatten(2).median(2).values[0]
    assert torch.allclose(flow, torch.tensor([3.0, -2.0]), atol=0.3)


@pytest.mark.parametrize("size", [(128, 136), (131, 150), (60, 90)])
def test_an_initial_flow_is_where_refinement_starts(size, filled, fill):
    """Zeros change nothing, half a cell does, and another size is refused."""
    network, (first, second) = filled("raft_small"), _pair(fill, 1, *size)
    cells = [-(-side // 8) for side in size]
    with torch.no_grad():
        plain = network(first, second, iters=1)
        assert torch.equal(network(first, second, 1, torch.zeros(1, 2, *cells)), plain)
        moved = network(first, second, 1, torch.full((1, 2, *cells), 0.5))
        assert (moved - plain).abs().max() > 0.1
        with pytest.raises(ValueError, match=r"it must be \[1, 2, "):
            network(first, second, 1, torch.zeros(1, 2, cells[0] + 1, cells[1]))


def test_an_initial_flow_reaches_the_motion_encoder(filled, fill):
    network, (first, second) = filled("raft_small"), _pair(fill, 1, 128, 136)
    start = fill.smooth_flow(0, "start", 1, 16, 17, amplitude=2.0)
    seen = []
    network.update_block.encoder.convf1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(first, second, 1, start)
    assert torch.allclose(seen[0], start, atol=1e-5)


@pytest.mark.parametrize("lookup", ["volume", "on_demand"])
@pytest.mark.parametrize("name", VARIANTS)
def test_without_gradient_every_step_is_that_with_gradient(name, lookup, filled, fill):
    """Two ways through the update: at odd sizes, from a first guess that leads out of the image, for two pairs."""
    network, (first, second) = filled(name), _pair(fill, 2, 131, 150)
    network.lookup = lookup
    guess = fill.smooth_flow(0, "guess", 2, 17, 19, amplitude=30.0)
    wanted = network.predictions(first, second, 3, guess)
    with torch.no_grad():
        found = network.predictions(first, second, 3, guess)
    assert len(found) == 3 and guess.abs().max() > 19
    for flow, of_layers in zip(found, wanted, strict=True):
        assert not flow.requires_grad
        assert (flow - of_layers).abs().max() < 2e-5 * of_layers.abs().max()


def test_changed_weights_change_the_next_result(filled, fill):
    """The fast path keeps no copy of the weights between calls."""
    network, (first, second) = filled("raft_small"), _pair(fill, 1, 128, 128)
    with torch.no_grad():
        network(first, second, iters=2)
        for module in (network.update_block.flow_head.conv2, network.update_block.gru.convq):
            module.weight.mul_(1.5)
        found = network(first, second, iters=2)
    wanted = network(first, second, iters=2)
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_the_plan_says_how_and_why(filled):
    network = filled("raft")
    small, large = network.lookup_plan(448, 448), network.lookup_plan(1080, 1920)
    assert (small.kind, large.kind) == ("volume", "on_demand")
    assert "56x56 maps" in small.reason and "135x240 maps needs 5.18 GiB" in large.reason
    network.lookup = "volume"
    assert network.lookup_plan(1080, 1920).kind == "volume"
    with pytest.raises(ValueError, match="iters=0"):
        network.lookup_plan(448, 448, iters=0)


@pytest.mark.slow
def test_full_hd_takes_less_than_2_gigabytes():
    """A fresh process, from the images to the flow; the volume of all products alone would take 5.2 GiB."""
    script = """
import torch
from pathlib import Path
from kinema.models.flow.raft.network import RAFT
torch.set_num_threads(1)
with torch.inference_mode():
    RAFT().eval()(*torch.rand(2, 1, 3, 1080, 1920), iters=2)
peak = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak[0].split()[1]) * 1024)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 2e9


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name, filled, fill):
    network, (first, second) = filled(name), _pair(fill, 1, 128, 128)
    network.train()
    torch.stack(network.predictions(first, second, iters=2)).abs().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_published_weights_give_the_published_fields(shared_data):
    network = raft_small(weights=shared_data / "weights" / "raft-small.pth")
    folder = shared_data / "flow"
    images = [
        torch.from_numpy(np.array(Image.open(folder / f"middlebury/RubberWhale{n}.png"))).permute(2, 0, 1)[None] / 255
        for n in (1, 2)
    ]
    with torch.no_grad():
        flow = network(*images, iters=12)[0].numpy()
    assert np.abs(flow - read_flow(folder / "golden_raft_small/rubberwhale_it12_sintel.flo")).max() < 0.01


def test_weights_load_with_and_without_prefix_and_without_aliases(filled, tmp_path):
    state = filled("raft").state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "prefixed.pth")
    shared = {key: value.clone() for key, value in state.items() if ".norm3." not in key}
    save_file(shared, tmp_path / "deduplicated.safetensors")
    for file in ("prefixed.pth", "deduplicated.safetensors"):
        loaded = raft(weights=tmp_path / file).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    torch.save({"fnet.conv1.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"missing: update_block\.encoder\.convc1\.weight.* and \d+ more"):
        raft(weights=tmp_path / "wrong.pth")


def test_autocast_changes_digits_only(filled, fill):
    network, (first, second) = filled("raft_small"), _pair(fill, 1, 128, 128)
    with torch.no_grad():
        exact = network(first, second, iters=1)
        with torch.autocast("cpu", torch.bfloat16):
            features = network.encode(torch.cat([first, second]))
            flow = network.flow_from_features(features[:1], features[1:], iters=1)
        later = network.flow_from_features(features[:1], features[1:], iters=1)
    assert flow.dtype == later.dtype == torch.float32
    assert (flow - exact).abs().max() < 0.05 * exact.abs().max()
    assert (later - exact).abs().max() < 0.05 * exact.abs().max()


def test_unknown_ground_truth_has_no_loss_and_no_gradient():
    flow = torch.ones(1, 2, 2, 2, requires_grad=True)
    flow_gt = torch.zeros(1, 2, 2, 2)
    flow_gt[0, :, 0, 0], flow_gt[0, 0, 0, 1] = float("nan"), 400.0
    loss = sequence_loss([flow, flow], flow_gt, torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), gamma=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(1.5 * 2 / 8)
    assert flow.grad[0, 0].tolist() == [[0, 0], [0, pytest.approx(1.5 / 8)]]


def test_features_iterate_over_frames(filled):
    with torch.no_grad():
        features = filled("raft_small").encode(torch.rand(2, 3, 128, 128))
    frames = list(features)
    assert [len(frame) for frame in frames] == [1, 1]
    assert torch.equal(features[-1].fmap, features.fmap[1:])


def test_bad_arguments_are_named(filled):
    network, image = filled("raft_small"), torch.rand(1, 3, 128, 128)
    with pytest.raises(ValueError, match="shapes must agree"):
        network(image, image[..., 1:])
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        network(image[:, :2], image[:, :2])
    with pytest.raises(ValueError, match="iters=0"):
        network(image, image, iters=0)
    with pytest.raises(ValueError, match="at least one pair"):
        network(image[:0], image[:0])
    with pytest.raises(ValueError, match="context=True"):
        features = network.encode(image, context=False)
        network.flow_from_features(features, features)
    with pytest.raises(ValueError, match="numbers and sizes"):
        network.flow_from_features(network.encode(image), network.encode(torch.rand(2, 3, 128, 128)))
    with pytest.raises(ValueError, match="variant='tiny'"):
        RAFT("tiny")
    with pytest.raises(ValueError, match="padding mode 'zero'"):
        RAFT("small", padding="zero")
    with pytest.raises(ValueError, match="lookup='fast'"):
        RAFT("small", lookup="fast")
