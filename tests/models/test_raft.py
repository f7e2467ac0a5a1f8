"""RAFT and RAFT-small: published numbers, the feature cache, sizes, padding, errors."""

import pytest
import torch

from kinema.models.raft import RAFT
from kinema.models.raft_loss import flow_errors, sequence_loss

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
    windows = []
    network.update_block.encoder.convc1.register_forward_pre_hook(lambda _, args: windows.append(args[0]))
    with torch.no_grad():
        features = network.encode(first)
        reference.check("fmap1", features.fmap, atol=0, rtol=2e-5)
        reference.check("context_raw", features.context, atol=0, rtol=2e-5)
        reference.check("flow", network(first, second, iters=4), atol=0, rtol=2e-5)
    reference.check("corr_iter1", windows[0], atol=0, rtol=2e-5)


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
