"""Motion transfer on a tiny video model: what is made, what it depends on, what is trained, what is refused."""

import sys

import pytest
import torch
from torch import nn

from kinema.models.dismo import MotionExtractor
from kinema.models.dismo.presets import PRESETS
from kinema.models.dismo.transfer.base import load_base
from kinema.models.dismo.transfer.model import MotionTransfer, assemble, fit_frames
from kinema.models.dismo.transfer.objective import signal_shares

HEIGHT, WIDTH = 64, 96


def new_model(folder, rank=4) -> MotionTransfer:
    torch.manual_seed(0)
    extractor = MotionExtractor(**PRESETS["dismo_tiny"]["motion_extractor_params"])
    model = MotionTransfer(load_base(str(folder)), extractor, rank=rank, d_cond=16)
    # A new adapter changes nothing: give its closed ends, and what the extractor adds to its queries, something.
    with torch.no_grad():
        for name, value in model.named_parameters():
            if (name in model.adapter_names or name.startswith("motion_extractor.")) and not value.any():
                value.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def model(tiny_video_base):
    return new_model(tiny_video_base)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "motion_videos": torch.randint(0, 256, (1, 9, 40, 56, 3), dtype=torch.uint8, generator=generator),
        "images": [torch.randint(0, 256, (50, 90, 3), dtype=torch.uint8, generator=generator)],
        "prompts": ["a dog runs"],
    }


def made(model, inputs, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    return model.sample(**(inputs | {"n_steps": 2, "generator": generator} | changes))


@pytest.fixture(scope="module")
def video(model, inputs):
    return made(model, inputs)


def test_a_video_as_asked_for(model, inputs, video):
    assert video.shape == (1, 9, HEIGHT, WIDTH, 3) and video.dtype == torch.uint8
    assert torch.equal(made(model, inputs), video), "the same seed, the same video"
    unlike = {
        "another seed": made(model, inputs, seed=1),
        "another guidance": made(model, inputs, text_guidance_scale=1.0),
        "another prompt": made(model, inputs, prompts=["a cat"]),
        "another motion": made(model, inputs, motion_videos=inputs["motion_videos"].flip(1)),
        "no motion": made(model, inputs, motion_videos=None, num_frames=9),
        "another picture": made(model, inputs, images=[255 - inputs["images"][0]]),
    }
    assert [what for what, other in unlike.items() if torch.equal(other, video)] == []


def test_without_motion_it_is_diffusers_own_video(model, inputs, tiny_video_base):
    """The adapter is off: the same as the pipeline on the base as it lies in its folder."""
    from diffusers import CogVideoXImageToVideoPipeline

    plain = CogVideoXImageToVideoPipeline.from_pretrained(tiny_video_base)
    plain.vae.enable_slicing()
    plain.vae.enable_tiling()
    plain.set_progress_bar_config(disable=True)
    picture = fit_frames(inputs["images"][0][None].float() / 127.5 - 1, HEIGHT, WIDTH).permute(0, 3, 1, 2) / 2 + 0.5
    expected = plain(
        image=picture, prompt="a dog runs", negative_prompt="blur", height=HEIGHT, width=WIDTH, num_frames=9,
        num_inference_steps=2, guidance_scale=6.0, generator=torch.Generator().manual_seed(0), max_sequence_length=12,
        output_type="pt",
    ).frames[0]  # fmt: skip
    found = made(model, inputs, motion_videos=None, num_frames=9, negative_prompt="blur")[0]
    torch.testing.assert_close(found.permute(0, 3, 1, 2) / 255, expected, atol=1 / 255, rtol=0)


def test_several_videos_have_their_own_generators(model, inputs):
    twice = {name: value * 2 for name, value in inputs.items() if name != "motion_videos"}
    twice["motion_videos"] = inputs["motion_videos"].repeat(2, 1, 1, 1, 1)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 0)]
    videos = model.sample(**twice, n_steps=1, generator=generators)
    assert torch.equal(videos[1], made(model, inputs, n_steps=1)[0]) and not torch.equal(videos[0], videos[1])


def test_published_keys_load_and_only_the_frozen_base_is_missing(model, tiny_video_base):
    published = model.adapter_state() | {
        f"motion_extractor.{k}": v for k, v in model.motion_extractor.state_dict().items()
    }
    other = new_model(tiny_video_base)
    missing, unexpected = other.load_state_dict(published, strict=False)
    assert unexpected == [] and missing
    assert {name.partition(".")[0] for name in missing} == {"transformer", "vae", "text_encoder"}
    assert not any("lora_" in name for name in missing)


def test_schedule_and_positions_are_the_bases_own(model):
    from diffusers import CogVideoXImageToVideoPipeline

    base = model.base
    torch.testing.assert_close(base.signal_shares, signal_shares(), atol=1e-6, rtol=1e-5)
    pipeline = CogVideoXImageToVideoPipeline(
        base.tokenizer, base.text_encoder, base.vae, base.transformer, base.scheduler
    )
    expected = pipeline._prepare_rotary_positional_embeddings(HEIGHT, WIDTH, 3, torch.device("cpu"))
    for found, wanted in zip(base.rotary(3, 8, 12, torch.device("cpu")), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def gradients(model, frames):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in model.adapter_names)
        parameter.grad = None
    torch.manual_seed(5)
    loss = model.train().training_loss(frames, ["a dog", ""])[0]
    assert loss.shape == (2,)
    loss.mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_only_the_adapter_learns_and_blocks_may_be_run_again(tiny_video_base):
    model = new_model(tiny_video_base)
    frames = torch.rand(2, 5, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(2)) * 2 - 1
    kept = gradients(model, frames)
    assert set(kept) == model.adapter_names and all(value.any() for value in kept.values())
    model.keep_only_block_inputs()
    for name, value in gradients(model, frames).items():
        torch.testing.assert_close(value, kept[name], atol=1e-6, rtol=1e-4, msg=name)
    assert not any(part.training for part in (model.vae, model.text_encoder, model.motion_extractor))


def test_pictures_are_cropped_about_their_centre():
    ramp = torch.linspace(-1, 1, 101).view(1, 1, 101, 1).expand(1, 40, 101, 3)
    fitted = fit_frames(ramp, 20, 20)[0, 10, :, 0]
    assert fitted.shape == (20,)
    torch.testing.assert_close(fitted.mean(), torch.tensor(0.0), atol=0.02, rtol=0)
    assert fitted[-1] - fitted[0] == pytest.approx(2 * 38 / 100, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"motion_videos": torch.zeros(1, 4, 40, 40, 3)}, "4 frames: a video has 4 n \\+ 1 of them, 5 or more"),
        ({"num_frames": 13}, "motion videos have 9 frames, num_frames=13"),
        ({"height": 96, "width": 64}, "size 96x64: .* makes videos of 64x96 only"),
        ({"prompts": ["dogs " * 9]}, r"prompt 'dogs .* tokens, at most 12 fit; shorten it"),
        ({"images": None}, "images is missing"),
        ({"prompts": ["a", "b"]}, "1 images, 1 motion_videos, 2 prompts"),
        ({"n_steps": 0}, "at least one step"),
        ({"generator": []}, "0 generators for 1 videos"),
    ],
)
def test_inputs_that_do_not_go_together(model, inputs, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        model.sample(**(inputs | {"negative_prompt": "blur"} | change))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit(model, tiny_video_base):
    state = model.adapter_state()
    name = "gru.weight_hh"
    some = {key: value for key, value in state.items() if key != name}
    with pytest.raises(ValueError, match=f"weights=x.pt do not fit the adapter .missing: {name}"):
        assemble(load_base(str(tiny_video_base)), some, "x.pt", model.motion_extractor)
    with pytest.raises(ValueError, match="weights=x.pt do not fit the adapter .missing: .*lora_A"):
        assemble(load_base(str(tiny_video_base)), {"fc.weight": torch.zeros(2)}, "x.pt", model.motion_extractor)
    wide = MotionExtractor(**PRESETS["dismo_tiny"]["motion_extractor_params"] | {"d_motion": 16})
    with pytest.raises(ValueError, match="embeddings of 32 numbers, the motion extractor makes 16"):
        assemble(load_base(str(tiny_video_base)), state, "x.pt", wide)
    whole = assemble(load_base(str(tiny_video_base)), state, "x.pt", model.motion_extractor)
    assert all(torch.equal(value, state[key]) for key, value in whole.adapter_state().items())


def test_folders_that_are_no_base(tiny_video_base, tmp_path):
    from tests.tiny_video_model import write_base

    with pytest.raises(ValueError, match="base=/nowhere/x is no folder"):
        load_base("/nowhere/x")
    (tmp_path / "part" / "vae").mkdir(parents=True)
    with pytest.raises(ValueError, match="lacks scheduler, text_encoder, tokenizer, transformer; give a folder"):
        load_base(str(tmp_path / "part"))
    text_only = write_base(tmp_path / "t2v", in_channels=4)
    with pytest.raises(ValueError, match="makes no videos of pictures") as caught:
        load_base(str(text_only))
    assert "\n" not in str(caught.value)


def test_without_the_extra_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"kinema\[transfer\]"):
        load_base()


def test_trained_and_frozen_parameters_of_the_published_size(manifest):
    """On no memory: 1019 tensors ask for gradients, and the network needs no more than it has."""
    diffusers = pytest.importorskip("diffusers")
    from kinema.models.dismo.transfer.video_transformer import MotionVideoTransformer

    contract = manifest("dismo_cogvideox_5b_i2v_trainable")
    with torch.device("meta"):
        network = MotionVideoTransformer(diffusers.CogVideoXTransformer3DModel(**contract["transformer_config"]))
    assert network.adapter_names == set(contract["tensors"])
    assert sum(p.numel() for n, p in network.named_parameters() if n in network.adapter_names) == 376_318_976
    assert isinstance(network, nn.Module)
