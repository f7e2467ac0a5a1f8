"""FlowFeat's seven variants against published outputs, and what a user may feed them."""

import pytest
import torch

from kinema.models.backbones.dpt import ChannelNorm, DPTDecoder, tokens_to_map
from kinema.models.flowfeat.model import VARIANTS, FlowFeat, encoder_maps, flowfeat

GOLDENS = [
    "flowfeat_dino_vits16_yt__s0_b1_96x128",
    "flowfeat_dino_vitb16_yt__s0_b1_96x128",
    "flowfeat_dino_vitb16_kt__s3_b1_64x96",
    "flowfeat_dinov2_vits14_yt__s0_b1_84x112",
    "flowfeat_dinov2_vitb14_yt__s0_b1_84x112",
    "flowfeat_dinov2_vitb14_kt__s3_b1_56x84",
    "flowfeat_mae_vitb16_kt__s0_b1_224x224",
]
# Larger forms of what the others show: MAE's is the one base-sized encoder of the ordinary run.
SLOW = {name for name in GOLDENS if "dino_vitb" in name or "dinov2_vitb" in name}
DECODER_MILLIONS = {"dinov2_vits14_yt": 9.31, "dinov2_vitb14_yt": 25.68, "mae_vitb16_kt": 11.04}


@pytest.fixture(scope="module")
def small() -> FlowFeat:
    torch.manual_seed(0)
    return flowfeat("dino_vits16_yt")


def test_every_published_variant_has_a_golden():
    assert {name.split("__")[0].removeprefix("flowfeat_") for name in GOLDENS} == set(VARIANTS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in GOLDENS])
@torch.no_grad()
def test_features_equal_the_published_networks(name, golden, manifest, fill, normalised_image, assert_state_matches):
    reference = golden(name)
    variant, size = name.split("__")[0], name.split("_")[-1]
    height, width = map(int, size.split("x"))
    model = flowfeat(variant.removeprefix("flowfeat_"))
    assert_state_matches(model, manifest(variant))
    fill.fill_(model, reference.meta["seed"], manifest(variant))
    x = normalised_image(reference.meta["seed"], "img", 1, height, width)
    y_enc, y_dec = model(x)
    reference.check("y_enc", y_enc, atol=0.0, rtol=1e-5)
    reference.check("y_dec", y_dec, atol=0.0, rtol=2e-5)
    maps, _ = encoder_maps(model.encoder, x)
    hidden = model.decoder.hidden(maps, (height, width)).permute(0, 2, 3, 1)
    unnormed = model.decoder.unnormed_head(hidden).permute(0, 3, 1, 2)
    reference.check("y_dec_unnormed", unnormed, atol=0.0, rtol=2e-5)


@pytest.mark.parametrize(("name", "millions"), DECODER_MILLIONS.items())
def test_decoder_sizes(name, millions):
    with torch.device("meta"):
        model = FlowFeat(VARIANTS[name])
    assert sum(p.numel() for p in model.decoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_decoder_norm_epsilon(golden, fill):
    tiny = fill.normal(0, "tiny", 3, 32, std=1e-3).reshape(1, 3, 32, 1).permute(0, 2, 1, 3)
    with torch.device("meta"):
        assert FlowFeat("dino_vits16").decoder.norm.norm.eps == ChannelNorm(32).norm.eps
    x = tiny.permute(0, 1, 3, 2)
    golden("norm_eps_probes").check("flowfeat_decoder_norm", ChannelNorm(32)(x), atol=0.0, rtol=1e-5)


@pytest.mark.parametrize("size", [(80, 112), (48, 48), (50, 75), (16, 16)])
@torch.no_grad()
def test_odd_grids_and_remainders_give_features_at_image_size(small, size):
    y_enc, y_dec = small(torch.randn(2, 3, *size))
    assert y_enc.shape == (2, 384, size[0] // 16, size[1] // 16)
    assert y_dec.shape == (2, 128, *size)
    assert y_dec.isfinite().all()


@torch.no_grad()
def test_odd_grid_keeps_features_in_place(small):
    """What moves in the image moves in the features: nothing is shifted by the resize of odd grids."""
    small_patch = torch.zeros(1, 3, 80, 80)
    bright = small_patch.clone()
    bright[:, :, 64:, 64:] = 3.0  # the last of 5 x 5 patches
    change = (small(bright)[1] - small(small_patch)[1]).norm(dim=1)[0]
    rows, cols = torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="ij")
    centre = [float((change * axis).sum() / change.sum()) for axis in (rows, cols)]
    assert min(centre) > 45


@torch.no_grad()
def test_batch_equals_single_images(small):
    x = torch.randn(2, 3, 32, 48)
    for together, alone in zip(small(x), small(x[1:]), strict=True):
        torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_decoder_rectifies_its_input_without_changing_it(small):
    maps = [torch.randn(1, 384, 2, 2) for _ in range(4)]
    before = [m.clone() for m in maps]
    with torch.no_grad():
        small.decoder(maps, (32, 32))
    for kept, original in zip(maps, before, strict=True):
        torch.testing.assert_close(kept, original, rtol=0, atol=0)


def test_frozen_encoder_gets_no_gradient_and_stays_in_eval():
    model = FlowFeat("dino_vits16").train()
    assert not model.encoder.training and model.decoder.training
    y_enc, y_dec = model(torch.randn(1, 3, 32, 32))
    assert not y_enc.requires_grad
    y_dec.square().mean().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert model.decoder.scratch.output_conv0.weight.grad.abs().sum() > 0


def test_encoder_can_be_trained_along():
    model = FlowFeat("dino_vits16", freeze_encoder=False).train()
    _, y_dec = model(torch.randn(1, 3, 32, 32))
    y_dec.square().mean().backward()
    assert model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


def test_tokens_to_map_drops_any_prefix():
    tokens = torch.arange(2 * 11 * 4.0).reshape(2, 11, 4)
    image = tokens_to_map(tokens, (2, 3))
    torch.testing.assert_close(image[1, :, 1, 2], tokens[1, 10])
    torch.testing.assert_close(image[0, :, 0, 0], tokens[0, 5])


def test_unknown_variant_lists_the_known_ones():
    with pytest.raises(ValueError, match="dinov2_vits14_kt.*dinov2_vits14_yt"):
        flowfeat("dinov2_vits14_kt")


def test_decoder_wants_four_maps():
    with pytest.raises(ValueError):
        DPTDecoder(8, (8, 8, 8), 8)
