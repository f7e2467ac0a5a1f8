"""Backbones against published outputs, and their contract: prefix tokens first, early stop, clear refusals."""

import pytest
import torch

from kinema.models.backbones.vision_transformer import CONFIGS, VisionTransformer, sincos_table, vision_transformer

# Sizes of the goldens; L/14 is minutes-free but large, so it is built once here.
GOLDENS = [
    "dino_vits16__s0_b1_96x128",
    "dino_vitb16__s0_b1_96x128",
    "dinov2_vits14__s0_b1_84x112",
    "dinov2_vitb14__s0_b1_84x112",
    "dinov2_vits14_reg__s0_b1_84x112",
    "dinov2_vitb14_reg__s0_b1_84x112",
    "dinov2_vitl14_reg__s0_b1_84x112",
    "dinov3_vits16__s0_b1_96x128",
    "mae_vitb16__s0_b1_224x224",
]


@pytest.fixture(scope="module")
def small() -> VisionTransformer:
    torch.manual_seed(0)
    return vision_transformer("dino_vits16")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("vitl14" in name)) for name in GOLDENS]
)
@torch.no_grad()
def test_tokens_equal_the_published_networks(name, golden, manifest, fill, normalised_image, assert_state_matches):
    reference = golden(name)
    variant, size = name.split("__")[0], name.split("_")[-1]
    height, width = map(int, size.split("x"))
    backbone = vision_transformer(variant)
    expected = manifest(variant)
    assert_state_matches(backbone, expected)
    for key, value in expected["skipped_values"].items():
        if key.endswith("bias_mask"):
            assert backbone.state_dict()[key].mean().item() == pytest.approx(value["mean"])
        else:
            torch.testing.assert_close(backbone.state_dict()[key], torch.tensor(value["values"]))
    fill.fill_(backbone, reference.meta["seed"], expected)
    x = normalised_image(reference.meta["seed"], "img", 1, height, width)

    blocks = [int(key.removeprefix("block")) for key in reference.data if key.startswith("block")]
    taps = dict(zip(blocks, backbone.tokens(x, blocks), strict=True))
    final = backbone(x)
    prefix = backbone.num_prefix_tokens
    computed = {f"block{block}": tokens for block, tokens in taps.items()} | {
        "norm_last": final,
        "norm_all": final,
        "cls_norm": final[:, 0],
        "x_norm_clstoken": final[:, 0],
        "x_norm_regtokens": final[:, 1:prefix],
        "x_storage_tokens": final[:, 1:prefix],
        "x_norm_patchtokens": final[:, prefix:],
    }
    if CONFIGS[variant].positions == "rotary":
        sin, cos = backbone.rope_embed(backbone.grid(height, width))
        normed = backbone.norm(taps[5])[:, prefix:].transpose(1, 2).unflatten(2, backbone.grid(height, width))
        computed |= {"rope_sin": sin, "rope_cos": cos, "intermediate_norm_reshaped_block5": normed}
    else:
        table = backbone.position_table(height, width)
        computed |= {"pos_embed_used": table, "pos_embed": table}
    if "get_intermediate_layers_n2_first" in reference.data:  # the last but one block, normed
        computed["get_intermediate_layers_n2_first"] = backbone.norm(backbone.tokens(x, [10])[0])
    for key in reference.data:
        reference.check(key, computed[key], atol=0.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "eps"), [("dino_layernorm", 1e-6), ("dinov2_layernorm", 1e-6), ("dinov3_layernorm", 1e-5)]
)
def test_norm_epsilons(key, eps, golden, fill):
    variant = {"dino": "dino_vits16", "dinov2": "dinov2_vits14", "dinov3": "dinov3_vits16"}[key.split("_")[0]]
    tiny = fill.normal(0, "tiny", 3, 32, std=1e-3)
    with torch.device("meta"):
        backbone = VisionTransformer(CONFIGS[variant])
    norms = {m.eps for m in backbone.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert norms == {eps}
    golden("norm_eps_probes").check(key, torch.nn.functional.layer_norm(tiny, (32,), eps=norms.pop()), rtol=1e-5)


@torch.no_grad()
def test_tokens_come_in_the_order_asked_for_and_stop_early(small):
    x = torch.randn(2, 3, 48, 64)
    ran = []
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(small.blocks)]
    late, early = small.tokens(x, [4, 1])
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2, 3, 4]
    torch.testing.assert_close(early, small.tokens(x, [1])[0], rtol=0, atol=0)
    continued = early
    for block in small.blocks[2:5]:
        continued = block(continued)
    torch.testing.assert_close(late, continued, rtol=0, atol=0)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    backbone = vision_transformer("dinov3_vits16")
    x = torch.randn(3, 3, 48, 80)
    together = backbone(x)
    assert together.shape == (3, 5 + 3 * 5, 384)
    torch.testing.assert_close(together[1:2], backbone(x[1:2]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_untrained_backbone_tells_images_and_places_apart(small):
    tokens = small(torch.randn(2, 3, 64, 64))
    assert tokens.isfinite().all()
    assert tokens.std(dim=0).mean() > 0.05
    assert tokens[:, 1:].std(dim=1).mean() > 0.05


@torch.no_grad()
def test_dino_floors_the_grid(small):
    assert small.grid(50, 79) == (3, 4)
    x = torch.randn(1, 3, 50, 79)
    # Only the remainder differs, and nothing sees it.
    torch.testing.assert_close(small(x), small(x[:, :, :48, :64]), rtol=0, atol=0)


@torch.no_grad()
def test_table_is_used_as_it_is_only_for_its_own_square(small):
    table = small.pos_embed
    torch.testing.assert_close(small.position_table(224, 224), table, rtol=0, atol=0)
    assert small.position_table(112, 448).shape == table.shape  # 7 x 28 patches: as many, not the same
    assert not torch.allclose(small.position_table(112, 448), table)
    torch.testing.assert_close(small.position_table(96, 128)[:, 0], table[:, 0], rtol=0, atol=0)


def test_sizes_that_a_family_refuses():
    with torch.device("meta"):
        dinov2 = VisionTransformer(CONFIGS["dinov2_vits14"])
        mae = VisionTransformer(CONFIGS["mae_vitb16"])
    with pytest.raises(ValueError, match="100x140.*multiples of 14.*98x140"):
        dinov2.grid(100, 140)
    with pytest.raises(ValueError, match="224x240.*224x224.*image_size"):
        mae.grid(224, 240)
    with pytest.raises(ValueError, match="8x64.*at least one patch"):
        VisionTransformer(CONFIGS["dino_vits16"]).grid(8, 64)


def test_blocks_that_do_not_exist(small):
    for blocks in ([12], [-1], []):
        with pytest.raises(ValueError, match="from 0 to 11"):
            small.tokens(torch.zeros(1, 3, 32, 32), blocks)


def test_unknown_backbone_lists_the_known_ones():
    with pytest.raises(ValueError, match="dinov2_vits15.*dinov2_vits14"):
        vision_transformer("dinov2_vits15")


@torch.no_grad()
def test_mae_positions_are_resampled_when_loaded_into_another_size():
    """The built-in table is a smooth function of place, so resampling it must give the other grid's table."""
    with torch.device("meta"):
        large = VisionTransformer(CONFIGS["mae_vitb16"], image_size=(448, 448))
    state = {"encoder.pos_embed": sincos_table((14, 14), 768)}
    large.adapt_state_dict(state, "encoder.")
    resampled = state["encoder.pos_embed"]
    assert resampled.shape == (1, 1 + 28 * 28, 768)
    assert not resampled[:, 0].any()
    patches = resampled[0, 1:].unflatten(0, (28, 28))
    slow = slice(180, 192)  # sines of the column at its lowest frequencies
    columns = (torch.arange(28) + 0.5) / 2 - 0.5  # places of the fine grid in steps of the coarse one
    expected = torch.sin(columns[:, None] * 10000.0 ** -(torch.arange(180, 192) / 192))
    torch.testing.assert_close(patches[14, 2:-2, slow], expected[2:-2], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_mae_of_another_size_loads_the_published_shape():
    small = VisionTransformer(CONFIGS["mae_vitb16"], image_size=(96, 64))
    state = {
        key: torch.zeros(1, 197, 768) if key == "pos_embed" else value for key, value in small.state_dict().items()
    }
    small.load_state_dict(state, strict=True)
    assert small(torch.randn(1, 3, 96, 64)).shape == (1, 1 + 6 * 4, 768)


@torch.no_grad()
def test_autocast_runs_in_bfloat16(small):
    x = torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = small(x)
    torch.testing.assert_close(low.float(), small(x), rtol=0.1, atol=0.1)
