"""SMURF: published numbers and names, sizes, and that training goes through the renamed state."""

import copy

import pytest
import torch

from kinema.models.flow.geometry import px_to_half
from kinema.models.flow.smurf.network import SMURF, smurf


@pytest.fixture(scope="module")
def filled(fill, manifest):
    """The network with the weights of the goldens, in eval mode."""
    return fill.fill_(SMURF(), 0, manifest("smurf_raft")).eval()


def _pair(fill, height, width, seed=0, shift=(2.0, -1.5), zoom=1.03):
    return fill.image(seed, "img", 1, height, width), fill.image(seed, "img", 1, height, width, shift=shift, zoom=zoom)


def test_state_dict_is_the_ports(manifest, assert_state_matches):
    network = SMURF()
    assert_state_matches(network, manifest("smurf_raft"))
    assert sum(p.numel() for p in network.parameters()) == manifest("smurf_raft")["parameter_count"]
    storages = {value.data_ptr() for value in network.state_dict().values()}
    assert storages == {p.data_ptr() for p in network.parameters()}


@pytest.mark.parametrize("lookup", ["volume", "on_demand"])
def test_flow_equals_the_port(lookup, filled, fill, golden):
    reference, windows = golden("smurf_raft__s0_128x160"), []
    network = copy.deepcopy(filled)
    network.lookup = lookup
    network.update_block.encoder.convc1.register_forward_pre_hook(lambda _, args: windows.append(args[0]))
    first, second = _pair(fill, 128, 160)
    with torch.no_grad():
        reference.check("context_raw", network.encode(first).context, atol=0, rtol=2e-5)
        predictions = network.predictions(first, second, iters=4)
        flow = network(first, second, iters=4)
    reference.check("corr_iter1", windows[0], atol=0, rtol=2e-5)
    reference.check("flow_first", predictions[0], atol=0, rtol=2e-5)
    reference.check("flow", flow, atol=0, rtol=2e-5)


def test_flow_in_half_image_units_is_that_of_flowfeats_published_teacher(filled, fill, golden):
    with torch.no_grad():
        flow_half = px_to_half(filled(*_pair(fill, 136, 168)))
    golden("flowfeat_teacher__s0").check("smurf_teacher_flow", flow_half, atol=0, rtol=2e-5)


def test_cached_features_give_the_direct_result(filled, fill):
    first, second = _pair(fill, 131, 150, seed=5)
    with torch.no_grad():
        direct = filled(first, second, iters=2)
        features = filled.encode(torch.cat([first, second]))
        cached = filled.flow_from_features(features[:1], features[1:], iters=2)
    assert direct.shape == (1, 2, 131, 150)
    assert (cached - direct).abs().max() < 2e-5 * direct.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (7, 90), (127, 121)])
def test_small_images_give_finite_flow_of_their_size(size, filled, fill):
    with torch.no_grad():
        flow = filled(*_pair(fill, *size), iters=1)
    assert flow.shape == (1, 2, *size) and torch.isfinite(flow).all()


def test_weights_load_with_and_without_prefix_and_faults_have_the_ports_names(filled, tmp_path):
    state = filled.state_dict()
    for prefix in ("", "module."):
        torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pt")
        loaded = smurf(weights=tmp_path / "w.pt")
        assert not loaded.training
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in state.items())
    torch.save({key: value for key, value in state.items() if "mask" not in key}, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"do not fit smurf \(missing: mask_predictor\.convrelu\.0\.weight, "):
        smurf(weights=tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="no published weights are known for 'smurf'"):
        smurf(pretrained=True)


def test_as_part_of_a_module_its_state_survives_saving_and_loading(filled):
    whole, other = torch.nn.ModuleDict({"teacher": filled}), torch.nn.ModuleDict({"teacher": SMURF()})
    assert "teacher.mask_predictor.conv.bias" in whole.state_dict()
    other.load_state_dict(whole.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in whole.state_dict().items() if "convz" not in k}, strict=True)


def test_gradients_reach_every_parameter(filled, fill):
    network = copy.deepcopy(filled).train()
    torch.stack(network.predictions(*_pair(fill, 128, 128), iters=2)).abs().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
