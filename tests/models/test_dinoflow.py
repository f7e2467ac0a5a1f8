"""DinoFlow: its parts against published outputs, both readings of its head, sizes, weights, gradients."""

import math
import warnings

import pytest
import torch
from safetensors.torch import save_file

from kinema.kernels.local_correlation.reference import local_correlation_plain
from kinema.models.dinoflow import FlowModel, FlowModelConfig, dinoflow_vits16
from kinema.models.dinoflow.dysample import DySample
from kinema.models.dinoflow.head import FlowHead, MotionFrontEnd
from kinema.models.dinoflow.model import DinoFlowFeatures, UntrainedEncoderWarning
from kinema.models.dinoflow.sdt import SDTHead
from kinema.models.weights import load_weights

UPSAMPLERS = [f"{style}_x{scale}{scope}" for style in ("lp", "pl") for scale in (2, 4) for scope in ("", "_scope")]
PARAMETERS = {"A": 6_884_198, "B": 6_884_710}
NANO = FlowModelConfig("nano_vit8", width=16, freeze_encoder=False)


@pytest.fixture
def nano() -> FlowModel:
    torch.manual_seed(0)
    return FlowModel(NANO).eval()


@pytest.mark.parametrize("case", UPSAMPLERS)
@torch.no_grad()
def test_learnt_upsampling_equals_the_published_one(case, golden, manifest, fill, assert_state_matches):
    reference, expected = golden("dysample__s0"), manifest(f"dysample_c64_{case}")
    module = DySample(**expected["constructor"])
    assert_state_matches(module, expected)
    fill.fill_(module, 0, expected)
    reference.check(f"{case}_init_pos", module.init_pos, atol=0, rtol=0)
    reference.check(case, module(2 * fill.image(0, "x", 2, 5, 7, channels=64) - 1), atol=0, rtol=1e-5)


def test_positions_do_not_depend_on_the_maps_precision():
    """256 columns in bfloat16: a step of the number format would be a pixel, the ramp would show it."""
    torch.manual_seed(0)
    module = DySample(4, groups=4)
    ramp = torch.linspace(0, 1, 256).expand(1, 4, 2, 256).contiguous()
    offsets = module.offsets(ramp.to(torch.float32))
    assert offsets.dtype == torch.float32
    exact = module.sample(ramp, offsets)
    coarse = module.bfloat16().sample(ramp.bfloat16(), offsets).float()
    assert coarse.shape == (1, 4, 4, 512)
    # What is left is the rounding of the values themselves, half a unit in the last of 8 bits, twice.
    assert (coarse - exact).abs().max() <= 2 * 2.0**-9
    with torch.autocast("cpu", torch.bfloat16):
        assert module.float().offsets(ramp).dtype == torch.float32


def test_fresh_upsampling_is_bilinear():
    """Untrained offsets are next to nothing: positions are those of the finer pixels' centres."""
    torch.manual_seed(0)
    x = torch.rand(2, 8, 5, 6)
    wanted = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert (DySample(8, 2, dyscope=True)(x) - wanted).abs().max() < 0.01


@pytest.mark.parametrize("arguments", [(6, 2, "lp", 4), (8, 0), (8, 2, "x"), (12, 4, "pl")])
def test_upsampling_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="must be|is not one of"):
        DySample(*arguments)


@pytest.mark.parametrize("name", ["sdt_head_small", "sdt_head_vits256"])
@torch.no_grad()
def test_head_equals_the_published_one(name, golden, manifest, fill, assert_state_matches):
    reference, expected = golden(f"{name}__s0"), manifest(name)
    head = SDTHead(**expected["constructor"]).eval()
    assert_state_matches(head, expected)
    assert sum(p.numel() for p in head.parameters()) == expected["parameter_count"]
    fill.fill_(head, 0, expected)
    widths, fused = expected["constructor"]["in_channels"], expected["constructor"]["fusion_channels"]
    batch = reference.meta["arrays"]["fusion_cls"]["shape"][0]
    features = [fill.normal(0, f"feat{i}", batch, width, 4, 6) for i, width in enumerate(widths)]
    cls = [fill.normal(0, f"cls{i}", batch, width) for i, width in enumerate(widths)]
    grid = fill.normal(0, "grid", batch, fused, 4, 6)
    computed = {
        "fusion_no_cls": head.weighted_fusion(features),
        "fusion_cls": head.weighted_fusion(features, cls),
        "detail_enhancer": head.detail_enhancer(grid),
        "upsample_1": head.upsample_1(grid),
        "head_no_cls": head(features),
        "head_cls": head(features, cls),
    }
    computed["detail_enhancer_train_mode"] = head.train().detail_enhancer(grid)
    computed["running_mean_after"] = head.detail_enhancer.norm.running_mean
    computed["running_var_after"] = head.detail_enhancer.norm.running_var
    assert set(computed) == set(reference.data)
    for key, value in computed.items():
        reference.check(key, value, atol=0, rtol=1e-5)


@pytest.mark.parametrize("reading", PARAMETERS)
def test_size_of_the_head_is_the_published_one(reading):
    head = FlowHead([384] * 4, reading=reading)
    assert sum(p.numel() for p in head.parameters()) == PARAMETERS[reading]
    assert head.state_dict()["output_conv.4.weight"].shape == (2, 32, 1, 1)


@pytest.mark.parametrize("reading", PARAMETERS)
@torch.no_grad()
def test_motion_signal_is_correlation_and_difference(reading):
    """Against the correlation's definition and the layers one by one."""
    torch.manual_seed(0)
    front = MotionFrontEnd(8, reading).eval()
    one, two = torch.randn(2, 2, 8, 5, 7)
    signal = [local_correlation_plain(one, two, 4), two - one]
    signal = torch.cat([one, *signal] if reading == "A" else signal, dim=1)
    first = torch.relu(front[1](front[0](signal)))
    wanted = first if reading == "A" else torch.relu(front[4](front[3](first)))
    assert len(front) == (3 if reading == "A" else 6)
    assert torch.allclose(front(one, two), wanted, atol=1e-5)


@torch.no_grad()
def test_taps_are_the_published_backbones(golden, manifest, fill):
    """What the head gets of DINOv3 ViT-S/16: blocks 2, 5, 8, 11 with four storage tokens cut off, normed."""
    reference = golden("dinov3_vits16__s0_b1_96x128")
    model = FlowModel(FlowModelConfig(width=16))
    assert model.taps == (2, 5, 8, 11) and not model.encoder.training
    fill.fill_(model.encoder, 0, manifest("dinov3_vits16"))
    seen = []
    model.head.fuse = lambda maps, cls: seen.append((maps, cls)) or torch.zeros(1, 16, 6, 8)
    model.encode(fill.image(0, "img", 1, 96, 128))
    maps, cls = seen[0]
    reference.check("intermediate_norm_reshaped_block5", maps[1], atol=0, rtol=1e-5)
    reference.check("x_norm_clstoken", cls[3], atol=0, rtol=1e-5)
    tokens = maps[3].flatten(2).transpose(1, 2)
    reference.check("x_norm_patchtokens", tokens, atol=0, rtol=1e-5)


@torch.no_grad()
def test_encoders_epsilon(golden, fill):
    """Inputs so small that epsilon decides."""
    norm = FlowModel(FlowModelConfig(width=16)).encoder.norm
    found = torch.nn.functional.layer_norm(fill.normal(0, "tiny", 3, 32, std=1e-3), (32,), eps=norm.eps)
    golden("norm_eps_probes").check("dinov3_layernorm", found, atol=0, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (16, 24), (37, 50), (64, 41)])
@torch.no_grad()
def test_any_size_gives_finite_flow_of_that_size(size, nano):
    flow = nano(*torch.rand(2, 2, 3, *size), iters=3)
    assert flow.shape == (2, 2, *size) and flow.dtype == torch.float32 and flow.isfinite().all()


@torch.no_grad()
def test_padding_inside_equals_padding_outside(nano):
    pair = torch.rand(2, 1, 3, 37, 50)
    padded = [torch.nn.functional.pad(image, (3, 3, 1, 2), mode="replicate") for image in pair]
    assert torch.equal(nano(*pair), nano(*padded)[..., 1:-2, 3:-3])


@pytest.mark.parametrize(
    "backbone", ["dino_vits16", "dinov2_vits14", "dinov2_vits14_reg", "vits16", "mae_vitb16", "nano_vit8", "nano_conv4"]
)
@torch.no_grad()
def test_every_backbone_gives_flow(backbone):
    model = FlowModel(FlowModelConfig(backbone, width=8, image_size=(32, 48))).eval()
    size = (32, 48) if "mae" in backbone else (31, 45)
    assert model(*torch.rand(2, 1, 3, *size)).shape == (1, 2, *size)


@torch.no_grad()
def test_features_of_frames_give_the_same_flow(nano):
    frames = torch.rand(3, 3, 30, 40)
    features = nano.encode(frames)
    stacked = DinoFlowFeatures.stack([features[1:2], features[0:1]])
    flow = nano.flow_from_features(features[1:], stacked)
    wanted = nano(frames[[1, 2]], frames[[1, 0]])
    assert torch.allclose(flow, wanted, atol=1e-5 * wanted.abs().max().item())


def test_frozen_encoder_gets_no_gradient_and_stays_in_eval_mode():
    torch.manual_seed(0)
    model = FlowModel(FlowModelConfig("nano_vit8", width=16)).train()
    assert not model.encoder.training and model.head.training
    model(*torch.rand(2, 2, 3, 32, 32)).abs().mean().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())


@pytest.mark.parametrize("backbone", ["nano_vit8", "dinov2_vits14"])
def test_a_free_encoder_gets_gradients_in_every_parameter(backbone):
    torch.manual_seed(0)
    model = FlowModel(FlowModelConfig(backbone, width=16, freeze_encoder=False)).train()
    model(*torch.rand(2, 2, 3, 28, 28)).abs().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_calls_that_make_no_sense_are_refused(nano):
    image = torch.rand(1, 3, 16, 16)
    for arguments, message in [
        ((image, image[..., 1:]), "shapes must agree"),
        ((image, image, None, torch.zeros(1, 2, 2, 2)), "takes no flow_init"),
        ((image, image, -1), "must not be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            nano(*arguments)
    with pytest.raises(ValueError, match="backbone='x' is not one of"):
        FlowModelConfig("x")
    with pytest.raises(ValueError, match="width=6 is not a positive multiple of 4"):
        FlowModelConfig(width=6)
    with pytest.raises(ValueError, match="reading='C'"):
        FlowModel(FlowModelConfig("nano_vit8", width=8, reading="C"))


@pytest.mark.parametrize("names", ["own", "foreign", "nested"])
@pytest.mark.parametrize("reading", PARAMETERS)
@torch.no_grad()
def test_a_heads_shapes_say_which_reading_it_is(reading, names, fill, tmp_path):
    """As the published page does it: a model, then the head's file, whatever its front end is called there."""
    other = {"A": "B", "B": "A"}[reading]
    torch.manual_seed(0)
    saved = fill.fill_(FlowHead([64] * 4, 16, factors=(4, 2), reading=reading), 1).eval()
    layers = {"own": "motion.{}", "foreign": "front.{}", "nested": "corr_proj.block{}.0"}[names]
    state = {
        layers.format(key.split(".")[1]) + "." + key.rsplit(".", 1)[1] if key.startswith("motion.") else key: value
        for key, value in saved.state_dict().items()
    }
    save_file(state, tmp_path / "head.safetensors")
    with warnings.catch_warnings(record=True):
        model = FlowModel.from_pretrained(FlowModelConfig("nano_vit8", width=16, reading=other))
    model.head.load_state_dict(state)
    again = FlowModel(FlowModelConfig("nano_vit8", width=16, reading=other)).eval()
    again.encoder_is_trained = True
    again.encoder.load_state_dict(model.encoder.state_dict())
    load_weights(again, tmp_path / "head.safetensors", "dinoflow_vits16")
    one, two = torch.randn(2, 1, 16, 4, 5)
    for found in (model.head, again.head):
        assert found.motion.reading == reading
        assert torch.equal(found.flow(one, two), saved.flow(one, two))
    pair = torch.rand(2, 1, 3, 16, 16)
    assert torch.equal(model(*pair), again(*pair))


def test_a_head_that_does_not_fit_is_refused(tmp_path, nano):
    state = FlowHead([64] * 4, 32, factors=(4, 2)).state_dict()
    save_file(state, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"head\.detail_enhancer\.norm\.bias \[32\] instead of \[16\]"):
        nano.encoder_is_trained = True
        load_weights(nano, tmp_path / "wide.safetensors", "dinoflow_vits16")
    del state["motion.4.weight"]
    with pytest.raises(RuntimeError, match=r"motion\.4\.weight"):
        FlowHead([64] * 4, 32, factors=(4, 2)).load_state_dict(state)


def test_the_whole_model_loads_from_one_file(tmp_path, nano):
    save_file(nano.state_dict(), tmp_path / "model.safetensors")
    other = FlowModel(FlowModelConfig("nano_vit8", width=16, reading="A"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(other, tmp_path / "model.safetensors", "dinoflow_vits16")
    pair = torch.rand(2, 1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(other.eval()(*pair), nano(*pair))


def test_an_untrained_encoder_is_said_aloud(tmp_path):
    with pytest.warns(UntrainedEncoderWarning, match="gated, see https.*backbone_weights=FILE"):
        model = FlowModel.from_pretrained(FlowModelConfig(backbone="vits16"))
    assert not model.training
    save_file(model.head.state_dict(), tmp_path / "head.safetensors")
    torch.save(model.encoder.state_dict(), tmp_path / "encoder.pth")
    with pytest.warns(UntrainedEncoderWarning, match="dinov3_vits16 is untrained"):
        dinoflow_vits16(weights=tmp_path / "head.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dinoflow_vits16(weights=tmp_path / "head.safetensors", backbone_weights=tmp_path / "encoder.pth")
        FlowModel.from_pretrained(FlowModelConfig(), backbone_weights=tmp_path / "encoder.pth")
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in model.state_dict().items())


def test_bfloat16_autocast_moves_the_flow_by_little(nano):
    with torch.no_grad():
        pair = torch.rand(2, 1, 3, 48, 64)
        exact = nano(*pair)
        with torch.autocast("cpu", torch.bfloat16):
            rough = nano(*pair)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.05 * math.sqrt(float(exact.square().mean())) + 0.02


@pytest.mark.parametrize("reading", ["A", "B"])
def test_a_front_end_that_reads_waves_tells_displacements_of_both_axes(reading):
    """One correlation of 81 stands out over a common level: a linear readout of the channels says which."""
    front_end = MotionFrontEnd(32, reading)
    others = front_end[0].weight.clone()
    front_end.read_waves()
    weight = front_end[0].weight.detach()
    start = 32 if reading == "A" else 0
    seen = weight[:, start : start + 81, 1, 1]
    torch.testing.assert_close(seen.sum(dim=1), torch.zeros(32), atol=1e-4, rtol=0)
    y, x = torch.meshgrid(torch.arange(-4.0, 5), torch.arange(-4.0, 5), indexing="ij")
    displacements = torch.stack([x.flatten(), y.flatten()], dim=1)
    inner = displacements.abs().amax(dim=1) <= 3  # waves turn round at the rim
    channels = (seen @ torch.eye(81)).T[inner]
    # The channels depend on one another but for rounding: float32 cannot solve for them.
    channels = torch.cat([channels, torch.ones(len(channels), 1)], dim=1).double()
    readout = torch.linalg.lstsq(channels, displacements[inner].double(), driver="gelsd").solution
    assert (channels @ readout - displacements[inner]).abs().max() < 0.2
    kept = [c for c in range(weight.shape[1]) if not start <= c < start + 81]
    assert torch.equal(weight[:, kept], others[:, kept])
