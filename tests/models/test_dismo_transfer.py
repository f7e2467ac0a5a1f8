"""The motion adapter of the video transformer: the published layer's, conditioning's and transformer's numbers."""

import pytest
import torch
from torch import nn

from kinema.models.dismo.transfer.conditional_lora import AdapterState, ConditionalLoRA, adapt_linear_layers
from kinema.models.dismo.transfer.conditioning import MotionConditioning
from kinema.models.dismo.transfer.objective import add_noise, clean_latent, image_noise, latent_loss, signal_shares
from kinema.models.dismo.transfer.video_transformer import MotionVideoTransformer

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


@pytest.fixture
def layer(fill, manifest):
    contract = manifest("dismo_conditional_lora")
    sizes = contract["constructor"]
    base = nn.Linear(sizes["in"], sizes["out"])
    made = ConditionalLoRA(base, sizes["r"], sizes["lora_alpha"], sizes["d_cond"], AdapterState())
    return fill.fill_(made, 0, contract)


def test_conditional_lora(layer, golden, fill, manifest, assert_state_matches):
    assert_state_matches(layer, manifest("dismo_conditional_lora"))
    expected = golden("dismo_conditional_lora__s0")
    x, cond = fill.normal(0, "x", 2, 19, 12), fill.normal(0, "cond", 2, 3, 7)
    with layer.state.following(cond, 4):
        found = layer(x)
    expected.check("output", found, atol=0, rtol=TOLERANCE)
    expected.check("base_output", layer(x), atol=0, rtol=TOLERANCE)
    with layer.state.following(cond, 0):
        expected.check("output_no_text", layer(x[:, 4:]), atol=0, rtol=TOLERANCE)
    (found * fill.normal(0, "w", 2, 19, 10)).sum().backward()
    for name, parameter in layer.named_parameters():
        expected.check(f"grad.{name}", parameter.grad, atol=0, rtol=GRADIENT_TOLERANCE)
    with pytest.raises(ValueError, match="19 video tokens.*3 frames"), layer.state.following(cond, 0):
        layer(x)


def test_a_new_adapter_changes_nothing_and_only_it_is_trained():
    network = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    x, cond = torch.randn(2, 8, 6), torch.randn(2, 4, 5)
    before = network(x)
    state = adapt_linear_layers(network, ("0", "2"), rank=3, alpha=2, cond_width=5)
    with state.following(cond, 0):
        assert torch.equal(network(x), before)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)
    with pytest.raises(ValueError, match="no linear layers named to_q"):
        adapt_linear_layers(nn.Sequential(nn.ReLU()), ("to_q",), 3, 2, 5)


@pytest.mark.parametrize(
    ("name", "seed", "sizes"), [("", 1, (1, 21, 128)), ("_small", 0, (2, 13, 8))], ids=["large", "small"]
)
def test_conditioning(name, seed, sizes, golden, fill, manifest, assert_state_matches):
    contract = manifest(f"dismo_cogvideox_motion{name}")
    arguments = {k: v for k, v in contract["constructor"].items() if k != "mapping_ff"}
    module = MotionConditioning(**arguments)
    assert_state_matches(module, contract)
    fill.fill_(module, seed, contract)
    motion = fill.normal(seed, "motion", *sizes)
    expected = golden(f"dismo_cogvideox_motion{name}__s{seed}")
    with torch.no_grad():
        expected.check("condition", module(motion), atol=0, rtol=TOLERANCE)
        expected.check("first_hidden", module.fold(motion[:, :1]), atol=0, rtol=TOLERANCE)
        with pytest.raises(ValueError, match=r"cannot be grouped as 1 \+ 4 n"):
            module(motion[:, :-1])


def test_objective(golden, fill):
    expected = golden("cogvideox_loss__s0")
    steps = torch.tensor(expected.meta["inputs"]["timesteps"])
    latent, noise, velocity = (fill.normal(0, name, 6, 2, 3, 4, 5) for name in ("latent", "noise", "pred"))
    shares = signal_shares()
    noisy = add_noise(latent, noise, steps, shares)
    loss = latent_loss(velocity, latent, noisy, steps, shares)
    expected.check("alphas_cumprod", shares, atol=0, rtol=1e-5)
    expected.check("noisy", noisy, atol=0, rtol=1e-5)
    expected.check("latent_from_prediction", clean_latent(noisy, velocity, steps, shares), atol=0, rtol=1e-5)
    expected.check("weight", 1 / (1 - shares[steps]), atol=0, rtol=1e-4)
    expected.check("loss_per_sample", loss, atol=0, rtol=1e-4)
    expected.check("loss", loss.mean(), atol=0, rtol=1e-4)


def test_noise_of_the_condition_picture():
    torch.manual_seed(0)
    sizes = image_noise(torch.zeros(2000, 400)).std(dim=1).log()
    assert abs(sizes.mean() + 3) < 0.05 and abs(sizes.std() - 0.5) < 0.05


@pytest.fixture(scope="module")
def tiny(manifest):
    diffusers = pytest.importorskip("diffusers", reason="the extra `transfer` is not installed")
    contract = manifest("dismo_cogvideox_tiny")
    lora = contract["lora"]
    transformer = diffusers.CogVideoXTransformer3DModel(**contract["transformer_config"])
    return MotionVideoTransformer(
        transformer, lora["r"], lora["lora_alpha"], d_motion=8, d_cond=lora["conditioning_width"]
    ).eval()


@pytest.mark.parametrize(("frames", "seed"), [(25, 0), (49, 1)])
def test_tiny_video_transformer(frames, seed, tiny, golden, fill, manifest, assert_state_matches):
    contract = manifest("dismo_cogvideox_tiny")
    assert_state_matches(tiny.transformer, contract)
    fill.fill_(tiny.transformer, seed, contract)
    expected = golden(f"dismo_cogvideox_tiny__s{seed}_{frames}frames")
    latent_frames = (frames - 1) // 4 + 1
    inputs = (
        fill.normal(seed, "latent", 1, latent_frames, 8, 8, 12),
        fill.normal(seed, "text", 1, 6, 24),
        fill.integers(seed, "timestep", 0, 1000, 1),
    )
    cond = fill.normal(seed, "cond", 1, latent_frames, 20)
    rotary = tuple(torch.from_numpy(expected.data[f"rotary_{name}"]) for name in ("cos", "sin"))
    with torch.no_grad():
        expected.check("output", tiny(*inputs, cond, rotary), atol=0, rtol=TOLERANCE)
        zero = tiny(*inputs, torch.zeros_like(cond), rotary)
        expected.check("output_zero_condition", zero, atol=0, rtol=TOLERANCE)
        expected.check("output_adapter_off", tiny(*inputs, None, rotary), atol=0, rtol=TOLERANCE)


def test_published_adapter_keys(manifest):
    """Of the 5 B model, built without memory: exactly the published keys and shapes are trained."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `transfer` is not installed")
    contract = manifest("dismo_cogvideox_5b_i2v_trainable")
    with torch.device("meta"):
        model = MotionVideoTransformer(diffusers.CogVideoXTransformer3DModel(**contract["transformer_config"]))
    found = {name: list(value.shape) for name, value in model.adapter_state().items()}
    assert found == {name: spec["shape"] for name, spec in contract["tensors"].items()}
    base = manifest("cogvideox_5b_i2v_transformer_with_adapter_base")["tensors"]
    assert {n: list(v.shape) for n, v in model.state_dict().items() if n not in found} == {
        name: spec["shape"] for name, spec in base.items()
    }


def test_adapters_load_without_the_base(tiny):
    state = {name: torch.full_like(value, 0.5) for name, value in tiny.adapter_state().items()}
    tiny.load_adapter({**state, "motion_extractor.proj.weight": torch.zeros(1)})
    assert all((value == 0.5).all() for value in tiny.adapter_state().values())
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"missing: {name}"):
        tiny.load_adapter({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match="unexpected: other"):
        tiny.load_adapter({**state, "other": torch.zeros(1)})
