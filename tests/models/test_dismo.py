"""DisMo: the published networks' numbers, sliding over long videos, and what their users rely on."""

import pytest
import torch
from einops import rearrange

from kinema.models.dismo import DisMo, FrameGenerator, MotionExtractor
from kinema.models.dismo.frame_generator import frame_generator_large
from kinema.models.dismo.layers import FrameEncoder
from kinema.models.dismo.motion_extractor import motion_extractor

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
# Small enough to be called on hundreds of frames: 2 layers of 2 heads, 2 x 2 cells.
TINY_ENCODER = {"model_version": "tiny_vit8", "image_size": 16, "gradient_last_blocks": None}
MINIATURE = {
    "width": 32,
    "depth": 2,
    "d_head": 16,
    "d_motion": 8,
    "frame_encoder_params": TINY_ENCODER,
    "max_delta_time": 4,
    "train_resolution": [8, 16, 16],
}
TINY_GENERATOR = {
    "width": 32,
    "depth": 2,
    "d_head": 16,
    "d_motion": 8,
    "source_encoder_params": TINY_ENCODER,
    "mapping_width": 16,
}


def moving_picture(fill, num_frames, side, seed=0):
    """The recorded runs' video, [1, T, H, W, 3] in -1..1."""
    frames = [
        fill.image(seed, "vid", 1, side, side, shift=(1.5 * t, -1.0 * t), zoom=1 + 0.01 * t) for t in range(num_frames)
    ]
    return rearrange(2 * torch.stack(frames, dim=1) - 1, "b t c h w -> b t h w c")


def channels_last(x):
    return rearrange(x, "b c h w -> b h w c")


@pytest.fixture(scope="module")
def small(fill, manifest):
    contract = manifest("dismo_motion_small")
    return fill.fill_(MotionExtractor(**contract["constructor"]).eval(), 0, contract)


@pytest.fixture(scope="module")
def small_generator(fill, manifest):
    contract = manifest("dismo_generator_small")
    return fill.fill_(FrameGenerator(**contract["constructor"]).eval(), 0, contract)


@pytest.fixture(scope="module")
def miniature(fill):
    model = MotionExtractor(**MINIATURE).eval()
    return fill.fill_(model, 0, skip=("pos_emb.spatial_freqs", "pos_emb.temporal_freqs"))


@pytest.fixture(scope="module")
def miniature_generator(fill):
    return fill.fill_(FrameGenerator(**TINY_GENERATOR).eval(), 0, skip=("transformer.pos_emb.freqs",))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dismo_motion_small", MotionExtractor),
        ("dismo_generator_small", FrameGenerator),
        ("dismo_small", DisMo),
        ("dismo_motion_large", MotionExtractor),
        ("dismo_generator_large", FrameGenerator),
    ],
)
def test_state_and_what_is_trained(name, kind, manifest, assert_state_matches):
    """Keys, shapes, parameter counts and constants; the large ones without memory for their weights."""
    contract = manifest(name)
    with torch.device("meta" if name.endswith("large") else "cpu"):
        model = kind(**contract.get("constructor", {}))
    assert_state_matches(model, contract)
    assert {key for key, _ in model.named_buffers()} == set(contract["buffer_keys"])
    assert sum(p.numel() for p in model.parameters()) == contract["parameter_count"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == contract["trainable_parameter_count"]
    if not name.endswith("large"):
        state = model.state_dict()
        for key, constant in contract["skipped_values"].items():
            torch.testing.assert_close(state[key].flatten(), torch.tensor(constant["values"]), atol=0, rtol=1e-6)


def test_frequencies_of_the_large_extractor(manifest):
    """Its rotary tables, built alone, against the recorded statistics."""
    from kinema.models.dismo.layers import SpaceTimeRotary

    tables = SpaceTimeRotary(64, 16).state_dict()
    for key, constant in manifest("dismo_motion_large")["skipped_values"].items():
        table = tables[key.removeprefix("pos_emb.")].double()
        torch.testing.assert_close(table.flatten()[:8], torch.tensor(constant["first8"]).double(), atol=0, rtol=1e-6)
        assert table.norm().item() == pytest.approx(constant["l2"], rel=1e-6)


@pytest.mark.parametrize("num_frames", [5, 8])
@torch.no_grad()
def test_small_motion(num_frames, small, golden, fill):
    expected = golden(f"dismo_motion_small__s0_t{num_frames}")
    x = moving_picture(fill, num_frames, 112)
    found = {
        "motion": small(x),
        "motion_sliding": small.forward_sliding(x),
        "motion_sliding_lookahead1": small.forward_sliding(x, lookahead=1),
        "frame_features": small.frame_encoder(x[:, 0]),
    }
    for name in expected.data:
        expected.check(name, found[name], atol=0, rtol=TOLERANCE)


@pytest.mark.slow
@torch.no_grad()
def test_large_motion(golden, fill, manifest):
    model = fill.fill_(motion_extractor(), 0, manifest("dismo_motion_large"))
    assert not model.training
    expected = golden("dismo_motion_large__s0_t6")
    x = moving_picture(fill, 6, 256)
    expected.check("motion", model(x), atol=0, rtol=TOLERANCE)
    expected.check("frame_features", model.frame_encoder(x[:, 0]), atol=0, rtol=TOLERANCE)


def generator_inputs(fill, batch, side, d_motion):
    return {
        "latent": fill.normal(0, "latent", batch, side, side, 4),
        "source_frames": channels_last(
            2 * fill.image(0, "src", batch, *((112, 112) if side == 16 else (256, 256))) - 1
        ),
        "motion": fill.normal(0, "motion", batch, d_motion),
        "delta_times": fill.uniform(0, "dt", batch, low=0, high=4),
        "noise": fill.normal(0, "noise", batch, side, side, 4),
        "t": fill.uniform(0, "t", batch),
    }


@torch.no_grad()
def check_generator(model, fill, expected, batch, side, d_motion, mapping_width):
    given = generator_inputs(fill, batch, side, d_motion)
    seen = {}
    hook = model.token_merge.register_forward_hook(lambda *call: seen.update(merged_tokens=call[-1]))
    share = given["t"].view(-1, 1, 1, 1)
    z = (1 - share) * given["latent"] + share * given["noise"]
    conditions = given["source_frames"], given["motion"], given["delta_times"]
    found = {
        "velocity": model(z, given["t"], *conditions),
        "loss_per_sample": model.loss(**given),
        "cond_norm": model.conditioning(given["t"], *conditions[1:]),
        "mapping_of_fixed": model.mapping(fill.normal(0, "map_in", 3, mapping_width)),
        "time_embedding": model.time_emb(given["t"]),
        "merged_tokens": seen["merged_tokens"],
    }
    hook.remove()
    for name, value in found.items():
        expected.check(name, value, atol=0, rtol=TOLERANCE)


def test_small_generator(small_generator, golden, fill):
    check_generator(small_generator, fill, golden("dismo_generator_small__s0"), 2, 16, 32, 96)


@pytest.mark.slow
def test_large_generator(golden, fill, manifest):
    model = fill.fill_(frame_generator_large(), 0, manifest("dismo_generator_large"))
    check_generator(model, fill, golden("dismo_generator_large__s0"), 1, 32, 128, 1024)


def test_positions_and_embeddings_of_the_generator(golden, fill):
    """Recorded positions are (y, x) in -1..1; ours (x, y) in 0..1."""
    from kinema.models.backbones.rotary_layers import cell_centres
    from kinema.models.dismo.layers import sinusoidal_features

    expected = golden("dismo_generator_small__s0")
    merged = cell_centres(8, 8).flip(-1) * 2 - 1
    expected.check("merged_pos", merged.expand(2, -1, -1, -1), atol=1e-6, rtol=0)
    expected.check("source_pos", merged.flatten(0, 1), atol=1e-6, rtol=0)
    dt = fill.uniform(0, "dt", 2, low=0, high=4)
    expected.check("dt_embedding", sinusoidal_features(dt * 100, 96), atol=TOLERANCE, rtol=0)


def test_training_loss_and_gradients(golden, fill, manifest):
    expected = golden("dismo_small__s0_train")
    contract = manifest("dismo_small")
    model = fill.fill_(DisMo(**contract["constructor"]), 0, contract)
    result = model(
        moving_picture(fill, 5, 112),
        rearrange(2 * fill.image(0, "src", 3, 112, 112) - 1, "p c h w -> 1 p h w c"),
        fill.normal(0, "latent", 3, 16, 16, 4),
        fill.uniform(0, "dt", 1, 3, low=0, high=4),
        fill.normal(0, "noise", 3, 16, 16, 4),
        fill.uniform(0, "t", 3),
    )
    result.loss.backward()
    for name in ("loss", "motion_std_batch", "motion_std_video"):
        expected.check(name, getattr(result, name), atol=0, rtol=TOLERANCE)
    extractor, generator = model.motion_extractor, model.frame_generator
    gradients = {
        "grad_query_tokens": extractor.query_tokens.grad,
        "grad_motion_proj": generator.motion_proj.weight.grad,
        "grad_token_split_proj": generator.token_split.proj.weight.grad,
        "grad_motion_encoder_last_block_fc2": extractor.frame_encoder.model.blocks[11].mlp.fc2.weight.grad,
    }
    for name, gradient in gradients.items():
        expected.check(name, gradient, atol=0, rtol=GRADIENT_TOLERANCE)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    blocks = {name for name in frozen if ".blocks." in name}
    assert frozen - blocks == set(expected.meta["frozen_note"])
    assert not any(f".blocks.{block}." in name for name in blocks for block in ("10", "11"))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("num_frames", [5, 6, 7, 8, 9, 12, 16, 17, 31, 64, 200])
@torch.no_grad()
def test_sliding_in_chunks_equals_windows_in_one_shot(num_frames, miniature, fill):
    video = fill.normal(num_frames, "video", 1, num_frames, 18, 20, 3, std=0.5).clamp(-1, 1)
    window = min(8, num_frames)
    windows = video[0].unfold(0, window, 1).movedim(-1, 1)  # [W, t, H, W, 3]
    each = miniature(windows)
    expected = torch.cat([each[0, :-1], each[:, -1]])[None]
    assert expected.shape == (1, num_frames - 4, 8)
    for chunk in (5, 1000):
        torch.testing.assert_close(miniature.forward_sliding(video, chunk=chunk), expected, atol=1e-5, rtol=0)


@pytest.fixture
def convolutional():
    """The form of the smallest preset: convolutions over space, then time, and embeddings that are kept apart."""
    torch.manual_seed(0)
    encoder = {"model_version": "micro_conv4", "image_size": 16, "gradient_last_blocks": None}
    return MotionExtractor(**MINIATURE | {"frame_encoder_params": encoder, "temporal_stem": True, "spread": True})


@pytest.mark.parametrize("num_frames", [5, 8, 17])
@torch.no_grad()
def test_sliding_sees_time_in_windows(num_frames, convolutional, fill):
    """Convolutions over time do not reach beyond a window, wherever chunks begin."""
    model = convolutional.eval()
    video = fill.normal(num_frames, "video", 1, num_frames, 18, 20, 3, std=0.5).clamp(-1, 1)
    each = model(video[0].unfold(0, min(8, num_frames), 1).movedim(-1, 1))
    expected = torch.cat([each[0, :-1], each[:, -1]])[None]
    for chunk in (5, 1000):
        torch.testing.assert_close(model.forward_sliding(video, chunk=chunk), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_stands_still_looks_alike_to_a_temporal_stem(convolutional, fill):
    model = convolutional.eval()
    pictures = moving_picture(fill, 1, 16), -moving_picture(fill, 1, 16, seed=1)
    one, other = (model.stem(model._encode(picture.expand(-1, 8, -1, -1, -1))) for picture in pictures)
    moving = model.stem(model._encode(moving_picture(fill, 8, 16)))
    assert (one - other).abs().max() < 1e-2 < (moving - one).abs().max()


def test_embeddings_are_kept_apart_however_alike_they_were(convolutional):
    """Also where nearly all of an embedding is common to all clips; then the average of many batches counts."""
    norm = convolutional.train().head[-1]
    motion = 5 + 0.1 * torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(0))
    spread = torch.stack([norm(motion) for _ in range(200)])[-1]
    torch.testing.assert_close(spread.mean(dim=(0, 1)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(spread.std(dim=(0, 1)), torch.ones(8), atol=1e-2, rtol=0)
    torch.testing.assert_close(norm.eval()(motion[:1]), spread[:1], atol=2e-2, rtol=0)


@torch.no_grad()
def test_sliding_never_holds_more_than_a_chunk(miniature, fill, monkeypatch):
    """Memory does not grow with length: no more frames than a chunk are encoded, nor windows embedded, at a time."""
    sizes = []
    encode, embed = miniature.frame_encoder.forward, miniature._embed
    monkeypatch.setattr(miniature.frame_encoder, "forward", lambda x: sizes.append(len(x)) or encode(x))
    monkeypatch.setattr(miniature, "_embed", lambda x, n: sizes.append(len(x)) or embed(x, n))
    miniature.forward_sliding(torch.zeros(1, 150, 16, 16, 3), chunk=6)
    assert max(sizes) == 6
    assert sum(sizes) == 150 + 143  # each frame is encoded once, each window embedded once


@torch.no_grad()
def test_uint8_video_is_the_same_video(miniature):
    video = torch.randint(0, 256, (1, 12, 20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floating = video.float() / 127.5 - 1
    assert torch.equal(miniature.forward_sliding(video), miniature.forward_sliding(floating))
    assert torch.equal(miniature(video), miniature(floating))


@torch.no_grad()
def test_bfloat16_stays_near(miniature):
    video = torch.rand(1, 8, 16, 16, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    exact = miniature(video)
    cast = MotionExtractor(**MINIATURE).bfloat16().eval()
    cast.load_state_dict(miniature.state_dict())
    assert cast.pos_emb.spatial_freqs.dtype == torch.float32
    assert (cast(video).float() - exact).abs().max() < 0.25
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (miniature(video).float() - exact).abs().max() < 0.25


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(1, 4, 16, 16, 3), "4 frames.*at least 5"),
        (torch.zeros(8, 16, 16, 3), r"shape \[8, 16, 16, 3\]"),
        (torch.zeros(1, 8, 3, 16, 16), "frames, height, width, 3"),
        (torch.zeros(1, 8, 16, 16, 3, dtype=torch.int64), "int64"),
    ],
)
def test_bad_videos_are_refused_in_one_line(video, message, miniature):
    for call in (miniature, miniature.forward_sliding):
        with pytest.raises(ValueError, match=message) as caught:
            call(video)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_head": 12}, "multiple of 8"),
        ({"max_delta_time": 8}, "less than a window"),
        ({"frame_encoder_params": {"model_version": "vit"}}, "not known"),
        ({"frame_encoder_params": {"model_version": "tiny_vit8", "image_size": 20}}, "multiple"),
        ({"frame_encoder_params": {**TINY_ENCODER, "gradient_last_blocks": 9}}, "has 4 blocks"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MotionExtractor(**{**MINIATURE, **change})


@torch.no_grad()
def test_frame_encoder_sees_the_central_square_at_its_size():
    """A frame k times as large, each pixel repeated, is averaged back to the same picture."""
    encoder = FrameEncoder("tiny_vit8", image_size=16).eval()
    frame = torch.rand(1, 16, 16, 3) * 2 - 1
    large = frame.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)
    torch.testing.assert_close(encoder(large), encoder(frame), atol=1e-5, rtol=0)
    wide = torch.cat([torch.rand(1, 16, 4, 3), frame, torch.rand(1, 16, 4, 3)], dim=2)
    assert torch.equal(encoder(wide), encoder(frame))


@torch.no_grad()
def test_sampling_follows_the_velocity(miniature_generator, fill):
    """Euler steps from noise, against the rule written out."""
    source = fill.uniform(0, "src", 2, 16, 16, 3, low=-1, high=1)
    motion, dt, noise = fill.normal(0, "m", 2, 8), torch.tensor([1.0, 3.0]), fill.normal(0, "z", 2, 4, 6, 4)
    z = noise
    for t in (1.0, 0.75, 0.5, 0.25):
        z = z - miniature_generator(z, torch.full((2,), t), source, motion, dt) / 4
    found = miniature_generator.sample(source, motion, dt, num_steps=4, noise=noise)
    torch.testing.assert_close(found, z, atol=1e-5, rtol=1e-5)


def test_sampling_is_seeded_and_takes_its_size_from_the_source(miniature_generator):
    source, motion, dt = torch.zeros(1, 32, 48, 3), torch.zeros(1, 8), torch.ones(1)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return miniature_generator.sample(source, motion, dt, num_steps=2, generator=generator)

    assert sample(0).shape == (1, 4, 6, 4)
    assert torch.equal(sample(0), sample(0)) and not torch.equal(sample(0), sample(1))
    with pytest.raises(ValueError, match="not tiled"):
        miniature_generator.sample(source, motion, dt, latent_size=(3, 4))
    with pytest.raises(ValueError, match="num_steps=0"):
        miniature_generator.sample(source, motion, dt, num_steps=0)


@torch.no_grad()
def test_loss_and_sampler_agree(miniature_generator, fill, monkeypatch):
    """Under the velocity that leads straight to one target, the loss of that target is zero and sampling ends there."""
    target = fill.normal(0, "target", 2, 4, 6, 4)

    def straight(z, t, *_):
        return (z - target) / t[:, None, None, None]

    monkeypatch.setattr(miniature_generator, "_velocity", straight)
    conditions = torch.zeros(2, 16, 16, 3), torch.zeros(2, 8), torch.ones(2)
    assert miniature_generator.loss(target, *conditions).max() < 1e-8
    torch.testing.assert_close(miniature_generator.sample(*conditions, num_steps=7, latent_size=(4, 6)), target)


def test_recomputed_layers_give_the_same_gradients(miniature):
    video = torch.rand(1, 8, 16, 16, 3, generator=torch.Generator().manual_seed(2))
    gradients = []
    for recompute in (False, True):
        miniature.checkpoint_layers = recompute
        miniature.zero_grad()
        miniature(video).square().sum().backward()
        gradients.append(miniature.layers[0].self_qkv.weight.grad.clone())
    miniature.checkpoint_layers = False
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)
