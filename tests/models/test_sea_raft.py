"""SEA-RAFT: published numbers, mixture, scale, feature cache, checkpoints, errors."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kinema.models.flow.sea_raft.loss import expected_error_px, mixture_nll, mixture_sequence_loss
from kinema.models.flow.sea_raft.network import (
    RESNET18,
    RESNET34,
    SEARAFT,
    SeaRaftFeatures,
    configuration_of,
    sea_raft,
    sea_raft_l,
    sea_raft_m,
    sea_raft_s,
)

BUILDERS = {"sea_raft_s": sea_raft_s, "sea_raft_m": sea_raft_m, "sea_raft_l": sea_raft_l}


@pytest.fixture(scope="module")
def filled(fill, manifest):
    """`filled("sea_raft_s", seed, **options)`: the network with the weights of the goldens, in eval mode."""
    return lambda name, seed=0, **options: fill.fill_(BUILDERS[name](**options), seed, manifest(name))


@pytest.fixture(scope="module")
def small(filled):
    """One network for the tests that are not about its depth; they leave it as it is."""
    return filled("sea_raft_s")


def _pair(fill, batch, height, width, seed=5):
    first = fill.image(seed, "img", batch, height, width)
    return first, fill.image(seed, "img", batch, height, width, shift=(1.5, -1.0), zoom=1.02)


@pytest.mark.parametrize("name", BUILDERS)
def test_state_dict_is_the_published_one(name, manifest, assert_state_matches):
    network = BUILDERS[name]()
    assert_state_matches(network, manifest(name))
    assert sum(p.numel() for p in network.parameters()) == manifest(name)["parameter_count"]
    state, aliases = network.state_dict(), manifest(name)["aliases"]
    assert all(state[k].data_ptr() == state[other].data_ptr() for k, other in aliases.items())


@pytest.mark.parametrize("lookup", ["volume", "on_demand"])
@pytest.mark.parametrize("name", BUILDERS)
def test_flow_and_info_equal_the_published_network(name, lookup, filled, fill, golden):
    network, reference = filled(name), golden(f"{name}__s0_128x152")
    network.lookup = lookup
    first = fill.image(0, "img", 1, 128, 152)
    second = fill.image(0, "img", 1, 128, 152, shift=(2.0, -1.5), zoom=1.03)
    windows = []
    network.update_block.encoder.convc1.register_forward_pre_hook(lambda _, args: windows.append(args[0]))
    iters = reference.meta["iters"]
    with torch.no_grad():
        predictions = network.predictions(first, second, iters=iters)
    assert len(predictions) == iters + 1
    reference.check("flow_iter0", predictions[0].flow, atol=0, rtol=2e-5)
    reference.check("info_iter0", predictions[0].info, atol=0, rtol=2e-5)
    reference.check("corr_iter1", windows[0], atol=0, rtol=2e-5)
    reference.check("flow", predictions[-1].flow, atol=0, rtol=2e-5)
    reference.check("info", predictions[-1].info, atol=0, rtol=2e-5)


@pytest.mark.parametrize("lookup", ["volume", "on_demand"])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_arrangement_for_speed_gives_the_published_numbers_too(name, lookup, filled, fill, golden):
    """Above, a hook sees the layers; without one, and without gradient, they are not called."""
    network, reference = filled(name), golden(f"{name}__s0_128x152")
    network.lookup = lookup
    first = fill.image(0, "img", 1, 128, 152)
    second = fill.image(0, "img", 1, 128, 152, shift=(2.0, -1.5), zoom=1.03)
    with torch.no_grad():
        flow, info = network.with_info(first, second, iters=reference.meta["iters"])
        regressed = network.with_info(first, second, iters=0)
    reference.check("flow_iter0", regressed.flow, atol=0, rtol=2e-5)
    reference.check("info_iter0", regressed.info, atol=0, rtol=2e-5)
    reference.check("flow", flow, atol=0, rtol=2e-5)
    reference.check("info", info, atol=0, rtol=2e-5)


def test_bf16_products_leave_the_flow_and_a_state_of_float32(filled, fill):
    network = filled("sea_raft_s")
    first, second = _pair(fill, 2, 128, 136)
    with torch.no_grad():
        flow, info = network.with_info(first, second, iters=2)
        with torch.autocast("cpu", torch.bfloat16):
            features = network.encode(first)
            rough = network.with_info(first, second, iters=2)
    assert features.fmap.dtype == rough.flow.dtype == torch.float32
    assert 0 < (rough.flow - flow).abs().mean() < 0.01 * flow.abs().mean()
    assert 0 < (rough.info - info).abs().mean() < 0.02 * info.abs().mean()


def test_norms_that_gather_statistics_are_called(filled, fill):
    """In training mode the arrangement for speed would take the stored statistics."""
    network = filled("sea_raft_s")
    first, second = _pair(fill, 1, 128, 136)
    with torch.no_grad():
        frozen = network(first, second, iters=1)
        before = network.cnet.bn1.running_mean.clone()
        moving = network.train()(first, second, iters=1)
    assert not torch.equal(network.cnet.bn1.running_mean, before)
    assert (moving - frozen).abs().max() > 1e-3


def test_loss_and_gradients_equal_the_published_ones(filled, fill, golden):
    network, reference = filled("sea_raft_m"), golden("sea_raft_m__s0_loss")
    flow_gt = fill.smooth_flow(0, "flow_gt", 1, 128, 136, amplitude=6.0)
    flow_gt[:, :, :4, :4] = 500
    valid = (fill.uniform(0, "valid", 1, 128, 136) > 0.2).float()
    first = fill.image(0, "img", 1, 128, 136)
    second = fill.image(0, "img", 1, 128, 136, shift=(2.0, -1.5), zoom=1.03)
    predictions = network.predictions(first, second, iters=2)
    reference.check("nf_first", mixture_nll(*predictions[0], flow_gt), atol=0, rtol=2e-5)
    reference.check("nf_last", mixture_nll(*predictions[-1], flow_gt), atol=0, rtol=2e-5)
    loss = mixture_sequence_loss(predictions, flow_gt, valid)
    reference.check("loss", loss, atol=0, rtol=1e-5)
    loss.backward()
    reference.check("grad_flow_head_2_weight", network.flow_head[2].weight.grad, atol=0, rtol=1e-4)
    reference.check("grad_cnet_conv1_weight", network.cnet.conv1.weight.grad, atol=0, rtol=5e-2)
    reference.check("grad_fnet_conv1_weight", network.fnet.conv1.weight.grad, atol=0, rtol=5e-2)


def test_unknown_ground_truth_has_no_loss_and_no_gradient():
    flow, info = torch.zeros(1, 2, 2, 2, requires_grad=True), torch.zeros(1, 4, 2, 2)
    flow_gt, valid = torch.ones(1, 2, 2, 2), torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    flow_gt[0, :, 0, 0], flow_gt[0, 0, 0, 1] = float("nan"), 400.0
    loss = mixture_sequence_loss([(flow, info), (flow, info)], flow_gt, valid, gamma=0.5)
    loss.backward()
    # The one pixel left: two unit Laplace components at distance 1, -log(exp(-1) / 2).
    assert loss.item() == pytest.approx(1.5 * (1 + 0.6931472), abs=1e-5)
    assert flow.grad[0, 0].flatten().tolist() == pytest.approx([0, 0, 0, -0.75])
    nothing = mixture_sequence_loss([(flow, info)], flow_gt, torch.zeros(1, 2, 2))
    assert nothing.item() == 0


@pytest.mark.parametrize(
    "info", [(0.0, -30.0, 0.0, 0.0), (30.0, -30.0, 2.0, 5.0), (0.5, -0.5, 1.2, -3.0), (-1.0, 1.0, 3.0, 9.0)]
)
def test_expected_error_is_the_mean_length_of_draws(info):
    """Two flow channels drawn independently from the mixture; component 1 has a scale of 1 px."""
    weight = torch.tensor(info[:2]).softmax(0)[0]
    generator = torch.Generator().manual_seed(0)
    draws = 400_000
    wide = torch.rand(2, draws, generator=generator) < weight
    scale = torch.where(wide, torch.tensor(info[2]).clamp(0, 10).exp(), 1.0)
    laplace = -torch.log1p(-torch.rand(2, draws, generator=generator)) * scale
    mean, spread = laplace.norm(dim=0).mean(), laplace.norm(dim=0).std()
    expected = expected_error_px(torch.tensor(info).view(1, 4, 1, 1))
    assert abs(expected.item() - mean) < 5 * spread / draws**0.5


def test_uncertainty_of_the_largest_scale_is_finite_and_its_unit_is_a_pixel_of_the_image(filled):
    info = torch.tensor([[50.0, -50.0, 99.0, 0.0]]).view(1, 4, 1, 1)
    full, half = filled("sea_raft_s"), filled("sea_raft_s", scale=-1)
    assert full.uncertainty(info).item() == pytest.approx(1.62323 * 22026.47, rel=1e-4)
    assert half.uncertainty(info).item() == pytest.approx(2 * full.uncertainty(info).item())


def test_flow_and_info_belong_together(small, fill):
    """`forward`, `with_info` and the last of `predictions` are the same flow."""
    first, second = _pair(fill, 1, 131, 150)
    with torch.no_grad():
        flow, info = small.with_info(first, second, iters=2)
        last = small.predictions(first, second, iters=2)[-1]
        assert torch.allclose(small(first, second, iters=2), flow, atol=1e-6)
        assert torch.equal(flow, last.flow) and torch.equal(info, last.info)
    assert flow.shape == (1, 2, 131, 150) and info.shape == (1, 4, 131, 150)


def test_iterations_default_to_the_variants(fill, filled):
    first, second = _pair(fill, 1, 128, 128)
    assert [filled(name).iters for name in BUILDERS] == [4, 4, 12]
    network = filled("sea_raft_s")
    network.iters = 2
    with torch.no_grad():
        assert torch.equal(network(first, second), network(first, second, iters=2))


def test_cached_features_give_the_direct_result(small, fill):
    video = torch.cat(_pair(fill, 2, 131, 150))
    starts, targets = [0, 1, 3], [1, 2, 0]
    with torch.no_grad():
        direct = small.with_info(video[starts], video[targets], iters=2)
        features = SeaRaftFeatures.stack([small.encode(frame) for frame in video.split(1)])
        cached = small.prediction_from_features(features[starts], features[targets], iters=2)
        flow = small.flow_from_features(features[3:], small.encode(video[:1]), iters=2)
    scale = direct.flow.abs().max()
    assert len(features) == 4
    assert (cached.flow - direct.flow).abs().max() < 2e-5 * scale
    assert (cached.info - direct.info).abs().max() < 2e-5 * direct.info.abs().max()
    assert (flow - direct.flow[2:]).abs().max() < 2e-5 * scale


def test_a_batch_gives_what_its_pairs_give(small, fill):
    first, second = _pair(fill, 2, 128, 137)
    with torch.no_grad():
        together = small(first, second, iters=2)
        alone = torch.cat([small(first[i : i + 1], second[i : i + 1], iters=2) for i in range(2)])
    assert (together - alone).abs().max() < 2e-5 * alone.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (7, 90), (127, 121)])
@pytest.mark.parametrize("scale", [0, -1, 1])
def test_small_images_give_finite_flow_of_their_size(size, scale, filled, fill):
    network, (first, second) = filled("sea_raft_s", scale=scale), _pair(fill, 1, *size)
    with torch.no_grad():
        flow, info = network.with_info(first, second, iters=1)
    assert flow.shape == (1, 2, *size) and info.shape == (1, 4, *size)
    assert torch.isfinite(flow).all() and torch.isfinite(info).all()


@pytest.mark.parametrize(("scale", "size"), [(-1, (144, 176)), (1, (72, 80))])
def test_scale_is_resizing_outside(scale, size, filled, fill):
    """As published: images resized bilinearly without antialias, flow back and rescaled, info by area."""
    scaled, plain = filled("sea_raft_s", scale=scale), filled("sea_raft_s")
    first, second = _pair(fill, 1, *size)
    resized = [F.interpolate(x, scale_factor=2.0**scale, mode="bilinear", align_corners=False) for x in (first, second)]
    with torch.no_grad():
        got, inner = scaled.with_info(first, second, iters=1), plain.with_info(*resized, iters=1)
        assert torch.allclose(scaled(first, second, iters=1), got.flow, atol=1e-5)
    factor = 2.0**-scale
    flow = factor * F.interpolate(inner.flow, scale_factor=factor, mode="bilinear", align_corners=False)
    assert torch.allclose(got.flow, flow, atol=1e-5)
    assert torch.allclose(got.info, F.interpolate(inner.info, scale_factor=factor, mode="area"), atol=1e-6)


def test_scale_of_odd_sizes_keeps_pixels_where_they_are(filled, fill):
    """As if the border had been repeated by hand to a size that divides; only the extra pixels are gone."""
    network, (first, second) = filled("sea_raft_s", scale=-1), _pair(fill, 1, 143, 175)
    padded = [F.pad(x, (0, 1, 0, 1), mode="replicate") for x in (first, second)]
    with torch.no_grad():
        assert torch.equal(network(first, second, iters=1), network(*padded, iters=1)[..., :-1, :-1])


@pytest.mark.parametrize(
    ("size", "scale", "cells"), [((128, 136), 0, (16, 17)), ((60, 91), 0, (8, 12)), ((261, 270), -1, (17, 17))]
)
def test_an_initial_flow_takes_the_place_of_the_regressed_one(size, scale, cells, filled, fill):
    network, (first, second) = filled("sea_raft_s", scale=scale), _pair(fill, 1, *size)
    start = torch.full((1, 2, *cells), 1.5)
    with torch.no_grad():
        placed = network(first, second, 0, start)
        inner = placed[..., 30:-30, 30:-30] if min(size) > 100 else placed[..., 28:32, 40:50]
        # The border mixes in zeros from beyond the map; in a padded image also from beyond the image.
        assert torch.allclose(inner, torch.full_like(inner, 12.0 * 2**-scale), atol=1e-3)
        assert (network(first, second, 1, start) - network(first, second, 1)).abs().max() > 0.1
        with pytest.raises(ValueError, match=r"it must be \[1, 2, "):
            network(first, second, 1, start[..., 1:])


def test_gradients_reach_every_parameter(fill, filled):
    network, (first, second) = filled("sea_raft_s").train(), _pair(fill, 1, 128, 128)
    predictions = network.predictions(first, second, iters=1)
    mixture_sequence_loss(predictions, torch.ones(1, 2, 128, 128), torch.ones(1, 128, 128)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_weights_load_with_and_without_prefix_and_without_aliases(filled, tmp_path):
    state = filled("sea_raft_s").state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "prefixed.pth")
    for dropped in (".downsample.1.", ".bn3."):
        shared = {key: value.clone() for key, value in state.items() if dropped not in key}
        save_file(shared, tmp_path / f"without{dropped}safetensors")
    for file in ("prefixed.pth", "without.downsample.1.safetensors", "without.bn3.safetensors"):
        loaded = sea_raft_s(weights=tmp_path / file).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    with pytest.raises(ValueError, match=r"do not fit sea_raft_m \(missing: .*layer1\.2\.conv1"):
        sea_raft_m(weights=tmp_path / "prefixed.pth")


def test_configuration_is_told_by_the_checkpoint(filled, tmp_path):
    assert configuration_of(filled("sea_raft_s").state_dict())["depths"] == RESNET18
    assert configuration_of(filled("sea_raft_l").state_dict())["depths"] == RESNET34
    other = SEARAFT(depths=(1, 2, 1), num_blocks=3, radius=3)
    torch.save({"model": {f"module.{key}": value for key, value in other.state_dict().items()}}, tmp_path / "o.pth")
    network = sea_raft(tmp_path / "o.pth", iters=2, scale=-1)
    assert (network.depths, len(network.update_block.refine), network.radius) == ((1, 2, 1), 3, 3)
    assert (network.iters, network.scale, network.training) == (2, -1, False)
    with torch.no_grad():
        assert network(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)).shape == (1, 2, 32, 32)
    torch.save({"fnet.conv1.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"wrong\.pth do not fit sea_raft: no SEA-RAFT encoders"):
        sea_raft(tmp_path / "wrong.pth")


def test_autocast_changes_digits_only(small, fill):
    first, second = _pair(fill, 1, 128, 128)
    with torch.no_grad():
        exact = small(first, second, iters=1)
        with torch.autocast("cpu", torch.bfloat16):
            features = small.encode(torch.cat([first, second]))
            flow, info = small.prediction_from_features(features[:1], features[1:], iters=1)
    assert flow.dtype == info.dtype == torch.float32
    assert (flow - exact).abs().max() < 0.05 * exact.abs().max()


def test_bad_arguments_are_named(small):
    image = torch.rand(1, 3, 128, 128)
    with pytest.raises(ValueError, match="shapes must agree"):
        small(image, image[..., 1:])
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        small(image[:, :2], image[:, :2])
    with pytest.raises(ValueError, match="iters=-1"):
        small(image, image, iters=-1)
    with pytest.raises(ValueError, match="numbers and sizes"):
        small.flow_from_features(small.encode(image), small.encode(torch.rand(2, 3, 128, 128)))
    with pytest.raises(ValueError, match="lookup='fast'"):
        SEARAFT(lookup="fast")
    with pytest.raises(ValueError, match="scale=9 is not a whole number in -4..2"):
        SEARAFT(scale=9)
