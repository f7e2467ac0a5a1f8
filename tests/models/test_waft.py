"""WAFT: published numbers, loss, evaluation wrapper, feature cache, variants, errors."""

import pytest
import torch

from kinema.kernels.convex_upsampling import convex_upsample
from kinema.models.flow.geometry import pixel_grid, warp
from kinema.models.flow.sea_raft.loss import mixture_nll, mixture_sequence_loss
from kinema.models.flow.waft import WAFT, waft
from kinema.models.flow.waft.evaluation import predict_at_train_size
from kinema.models.flow.waft.layers import SIZES
from kinema.models.flow.waft.network import MAX_MOTION_PX, WaftFeatures, configuration_of, padding_to_patches

TOLERANCE = {"atol": 0, "rtol": 2e-5}


@pytest.fixture(scope="module")
def network(fill, manifest):
    """The network with the weights of the goldens; tests leave it as it is."""
    return fill.fill_(waft(), 0, manifest("waft_vits"))


def _pair(fill, batch, height, width, seed=0):
    first = fill.image(seed, "img", batch, height, width)
    return first, fill.image(seed, "img", batch, height, width, shift=(2.0, -1.5), zoom=1.03)


def _hooked(modules):
    """Inputs and outputs of each call of the modules, by name, and the hooks to remove."""
    seen = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda _, given, out, name=name: seen[name].append((given[0], out)))
        for name, module in modules.items()
    ]
    return seen, hooks


def test_state_dict_is_the_published_one(manifest, assert_state_matches):
    model, expected = waft(), manifest("waft_vits")
    assert_state_matches(model, expected)
    assert sum(p.numel() for p in model.parameters()) == expected["parameter_count"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == expected["trainable_parameter_count"]


def test_two_pairs_and_all_inner_maps_equal_the_published_network(network, fill, golden):
    reference, depth = golden("waft_vits__s0_b2_96x100"), network.da_feature.depth_anything
    modules = {
        "norm": depth.pretrained.norm,
        "path": depth.depth_head.scratch.refinenet1,
        "depth": network.da_feature,
        "deep": network.fnet.conv4,
        "cnn": network.fnet,
        "fmap": network.fmap_conv,
        "hidden0": network.hidden_conv,
        "mixed": network.warp_linear,
        "patches": network.refine_net.patch_embed,
        "refine_path": network.refine_net.dpt_head.scratch.refinenet1,
        "refined": network.refine_net,
        "hidden": network.refine_transform,
        "head": network.flow_head,
        "mask": network.upsample_weight,
    }
    seen, hooks = _hooked(modules)
    with torch.no_grad():
        steps = network.predictions(*_pair(fill, 2, 96, 100), iters=5)
    for hook in hooks:
        hook.remove()
    found = {
        "flow_per_iteration": torch.stack([step.flow for step in steps]),
        "info_per_iteration": torch.stack([step.info for step in steps]),
        "depth_tokens_tap4": seen["norm"][3][1][:, 1:],
        "depth_path1": seen["path"][0][1],
        "depth_out": seen["depth"][0][1],
        "cnn_out": seen["cnn"][0][1],
        "cnn_deep": seen["deep"][0][1],
        "fmap1": seen["fmap"][0][1],
        "fmap2": seen["fmap"][1][1],
        "hidden0": seen["hidden0"][0][1],
        "warp_step1": seen["mixed"][0][0][:, 64:128],
        "warp_step2": seen["mixed"][1][0][:, 64:128],
        "refine_input_step1": seen["mixed"][0][1],
        "refine_tokens_step1": seen["patches"][0][1],
        "refine_path1_step1": seen["refine_path"][0][1],
        "refine_out_step1": seen["refined"][0][1],
        "hidden_step1": seen["hidden"][0][1],
        "head_step1": seen["head"][0][1],
        "mask_logits_step1": seen["mask"][0][1],
    }
    assert set(found) == set(reference.meta["arrays"])
    for name, value in found.items():
        reference.check(name, value, **TOLERANCE)


def test_one_uneven_pair_equals_the_published_network(network, fill, golden):
    reference = golden("waft_vits__s0_b1_112x141")
    modules = {
        "depth": network.da_feature,
        "fmap": network.fmap_conv,
        "mixed": network.warp_linear,
        "refined": network.refine_net,
    }
    seen, hooks = _hooked(modules)
    with torch.no_grad():
        steps = network.predictions(*_pair(fill, 1, 112, 141), iters=3)
    for hook in hooks:
        hook.remove()
    found = {
        "flow_per_iteration": torch.stack([step.flow for step in steps]),
        "info_per_iteration": torch.stack([step.info for step in steps]),
        "depth_out": seen["depth"][0][1],
        "fmap2": seen["fmap"][1][1],
        "refine_out_step1": seen["refined"][0][1],
        "warp_step2": seen["mixed"][1][0][:, 64:128],
    }
    assert set(found) == set(reference.meta["arrays"])
    for name, value in found.items():
        reference.check(name, value, **TOLERANCE)


def test_parts_equal_the_published_ones(network, fill, golden):
    reference, depth = golden("waft_vits_probes__s0"), network.da_feature.depth_anything.pretrained
    tokens = fill.normal(0, "tok", 1, 12, 384, std=1e-3)
    flow, info = fill.normal(0, "fl", 1, 2, 5, 6), fill.normal(0, "inf", 1, 4, 5, 6)
    logits = fill.normal(0, "mk", 1, 36, 5, 6)
    positions = fill.uniform(0, "co", 1, 4, 5, 2, low=-1.5, high=7.5)
    with torch.no_grad():
        found = {
            "depth_block0": depth.blocks[0](tokens),
            "depth_norm": depth.norm(tokens),
            "refine_block0": network.refine_net.blks[0](tokens),
            "depth_pos_8x8": depth.position_table(112, 112)[0],
            "depth_pos_8x16": depth.position_table(112, 224)[0],
            "refine_pos_7x7": network.refine_net.position_table((7, 7))[0],
            "refine_pos_7x14": network.refine_net.position_table((7, 14))[0],
            "up_flow": convex_upsample(2 * flow, logits),
            "up_info": convex_upsample(info, logits),
            "cnn_tail": network.fnet(fill.normal(0, "cnn", 1, 35, 32, 64)),
            "sampler": _sampled(fill.normal(0, "im", 1, 3, 6, 7), positions),
        }
    assert set(found) == set(reference.meta["arrays"])
    for name, value in found.items():
        reference.check(name, value, **TOLERANCE)


def _sampled(picture, positions):
    """`warp` reads at pixel + flow: the flow that leads to the positions."""
    flow = positions.permute(0, 3, 1, 2) - pixel_grid(*positions.shape[1:3], like=positions)
    return warp(picture, flow, outside="zeros")[0]


def _truth(fill):
    flow_gt = fill.smooth_flow(0, "flow_gt", 1, 80, 97, amplitude=6.0)
    flow_gt[:, :, :4, :4] = 40000
    flow_gt[:, :, 10:12, 10:12] = 500
    return flow_gt, (fill.uniform(0, "valid", 1, 80, 97) > 0.2).float()


def test_loss_of_fixed_predictions_equals_the_published_one(fill, golden):
    reference, (flow_gt, valid) = golden("waft_vits__s0_loss"), _truth(fill)
    fixed = [
        (
            fill.smooth_flow(0, f"pred{i}", 1, 80, 97, amplitude=8.0),
            fill.normal(0, f"info{i}", 1, 4, 80, 97, std=3.0),
        )
        for i in range(3)
    ]
    for i, prediction in enumerate(fixed):
        reference.check(f"fixed_nf_{i}", mixture_nll(*prediction, flow_gt), **TOLERANCE)
    loss = mixture_sequence_loss(fixed, flow_gt, valid, gamma=0.85, max_motion_px=MAX_MOTION_PX)
    reference.check("fixed_loss", loss, atol=0, rtol=1e-5)


def test_loss_and_gradients_equal_the_published_ones(fill, manifest, golden):
    model = fill.fill_(waft(), 0, manifest("waft_vits"))
    reference, (flow_gt, valid) = golden("waft_vits__s0_loss"), _truth(fill)
    steps = model.predictions(*_pair(fill, 1, 80, 97), iters=2)
    reference.check("nf_last", mixture_nll(*steps[-1], flow_gt), **TOLERANCE)
    loss = mixture_sequence_loss(steps, flow_gt, valid, max_motion_px=MAX_MOTION_PX)
    reference.check("loss", loss, atol=0, rtol=1e-5)
    loss.backward()
    gradients = {
        "flow_head.2.weight": 1e-3,
        "warp_linear.weight": 1e-3,
        "refine_net.pos_embed": 1e-3,
        "fmap_conv.weight": 1e-3,
        "fnet.ds1.conv.1.weight": 1e-2,
    }
    for name, tolerance in gradients.items():
        reference.check(f"grad_{name}", model.get_parameter(name).grad, atol=0, rtol=tolerance)
    unused = {id(parameter) for parameter in model.unused_parameters()}
    for name, parameter in model.named_parameters():
        has_none = parameter.grad is None
        assert has_none == (id(parameter) in unused or not parameter.requires_grad), name


def test_training_mode_uses_the_statistics_of_each_image(fill, manifest, golden):
    model = fill.fill_(waft(), 0, manifest("waft_vits")).train()
    reference, (flow_gt, valid) = golden("waft_vits__s0_loss"), _truth(fill)
    with torch.no_grad():
        steps = model.predictions(*_pair(fill, 1, 80, 97), iters=2)
    reference.check("train_mode_flow_last", steps[-1].flow, **TOLERANCE)
    loss = mixture_sequence_loss(steps, flow_gt, valid, max_motion_px=MAX_MOTION_PX)
    reference.check("train_mode_loss", loss, atol=0, rtol=1e-5)
    norm = model.fnet.conv1[0].bn1
    reference.check("train_mode_running_mean_after", norm.running_mean, **TOLERANCE)
    reference.check("train_mode_running_var_after", norm.running_var, **TOLERANCE)


def test_scaled_padded_and_tiled_evaluation_equal_the_published_ones(network, fill, golden):
    reference = golden("waft_vits_wrapper__s0")
    network.scale = -1
    with torch.no_grad():
        half = network.with_info(*_pair(fill, 1, 180, 204), iters=2)
    network.scale = 0
    with torch.no_grad():
        tiled = predict_at_train_size(network, *_pair(fill, 1, 120, 150), (96, 100), tile=True, iters=2)
        padded = predict_at_train_size(network, *_pair(fill, 1, 60, 80), (96, 100), iters=2)
    reference.check("half_flow", half.flow, **TOLERANCE)
    reference.check("half_info", half.info, **TOLERANCE)
    reference.check("tiled_flow", tiled.flow, **TOLERANCE)
    reference.check("tiled_info", tiled.info, **TOLERANCE)
    reference.check("padded_flow", padded.flow, **TOLERANCE)


@pytest.mark.parametrize(("side", "padded"), [(103, 112), (104, 224), (112, 224), (1, 112), (1080, 1120)])
def test_padding_is_the_published_one(side, padded):
    margins = padding_to_patches(side, 141)
    assert margins.top + side + margins.bottom == padded and margins.bottom - margins.top in (0, 1)
    assert (margins.left, margins.right) == (41, 42)


def test_cached_features_give_the_direct_result(network, fill):
    video = torch.cat(_pair(fill, 2, 70, 90, seed=5))
    starts, targets = [0, 1, 3], [1, 2, 0]
    with torch.no_grad():
        direct = network.with_info(video[starts], video[targets], iters=2)
        features = WaftFeatures.stack([network.encode(frame) for frame in video.split(1)])
        cached = network.prediction_from_features(features[starts], features[targets], iters=2)
        alone = network(video[3:], video[:1], iters=2)
    assert (cached.flow - direct.flow).abs().max() < 1e-4
    assert (cached.info - direct.info).abs().max() < 1e-4
    assert (alone - direct.flow[2:]).abs().max() < 1e-4
    assert direct.flow.shape == (3, 2, 70, 90) and direct.flow.dtype == torch.float32


def test_uncertainty_is_in_pixels_of_the_given_image(network):
    info = torch.tensor([[50.0, -50.0, 2.0, 0.0]]).view(1, 4, 1, 1)
    full = network.uncertainty(info).item()
    assert full == pytest.approx(1.62323 * 7.389056, rel=1e-4)
    network.scale = -1
    half = network.uncertainty(info).item()
    network.scale = 0
    assert half == pytest.approx(2 * full)


def test_shapes_of_a_checkpoint_choose_the_variant():
    depth, refine = "vitb", "vitt"
    with torch.device("meta"):
        state = {key: torch.empty(value.shape) for key, value in WAFT(depth, refine).state_dict().items()}
    assert configuration_of(state) == (depth, refine)
    channels, depth_channels = SIZES[refine].decoder, SIZES[depth].decoder // 2
    assert state["fmap_conv.weight"].shape == (channels, 64 + depth_channels, 1, 1)
    assert state["fnet.ds1.conv.1.weight"].shape == (64, depth_channels + 3, 7, 7)


def test_small_variant_loads_from_its_file_and_runs(fill, tmp_path):
    model = WAFT("vits", "vitt").eval()
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "tiny.pth")
    loaded = waft(weights=tmp_path / "tiny.pth", iters=1)
    assert loaded.refine_net.size is SIZES["vitt"]
    pair = _pair(fill, 1, 60, 70)
    with torch.no_grad():
        assert torch.equal(loaded(*pair), model(*pair, iters=1))


def test_a_wrong_checkpoint_lists_what_is_missing(tmp_path):
    with torch.device("meta"):
        state = {key: torch.empty(0) for key in ("fnet.up_4.weight", "other")}
    torch.save({key: torch.zeros(3) for key in state}, tmp_path / "wrong.pth")
    with pytest.raises(
        ValueError, match=r"missing: da_feature\.depth_anything\..* more; unexpected: other; wrong shape"
    ):
        waft(weights=tmp_path / "wrong.pth")


def test_bad_arguments_are_refused(network, fill):
    first, second = _pair(fill, 1, 40, 40)
    with pytest.raises(ValueError, match="iters=0 must be at least 1"):
        network(first, second, iters=0)
    with pytest.raises(ValueError, match="shapes must agree"):
        network(first, second[..., :-1])
    with pytest.raises(ValueError, match="no size of WAFT's"):
        waft("vitx")
    with pytest.raises(ValueError, match="scale=3 is not"):
        WAFT(scale=3)
    with pytest.raises(ValueError, match="cannot be fetched by a program: take them from https://drive"):
        waft(pretrained=True)
