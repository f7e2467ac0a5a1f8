"""Autoencoders between frames and latents: TAESD's numbers through diffusers, and what stands in without it."""

import sys

import pytest
import torch
from einops import rearrange

from kinema.models.dismo.autoencoder import PixelAutoencoder, TinyAutoencoder, load_autoencoder

TOLERANCE = 3e-5


def channels_last(x):
    return rearrange(x, "b c h w -> b h w c")


@pytest.fixture(scope="module")
def tiny(fill, manifest):
    diffusers = pytest.importorskip("diffusers", reason="the extra `transfer` is not installed")
    contract = manifest("taesd_tiny_autoencoder")
    return fill.fill_(diffusers.AutoencoderTiny(**contract["constructor"]), 0, contract)


def test_tiny_autoencoder(tiny, golden, fill, manifest, assert_state_matches):
    assert_state_matches(tiny, manifest("taesd_tiny_autoencoder"))
    expected = golden("taesd_tiny_autoencoder__s0_64x96")
    autoencoder = TinyAutoencoder(tiny)
    assert (autoencoder.pixels_per_latent, autoencoder.channels) == (8, 4)
    latent = autoencoder.encode(channels_last(2 * fill.image(0, "img", 1, 64, 96) - 1))
    expected.check("latent", rearrange(latent, "b h w c -> b c h w"), atol=0, rtol=TOLERANCE)
    # Decoded frames are clamped; the recorded ones are not.
    for name, given in (("decoded", latent), ("decoded_random_latent", None)):
        given = channels_last(fill.normal(0, "latent", 1, 4, 8, 12, std=2.0)) if given is None else given
        found = rearrange(autoencoder.decode(given), "b h w c -> b c h w").flatten()[
            :: expected.meta["arrays"][name]["stride"]
        ]
        recorded = torch.from_numpy(expected.data[name]).flatten()
        assert (found - recorded.clamp(-1, 1)).abs().max() < TOLERANCE * recorded.abs().max()


def test_from_a_folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "ae")
    frames = torch.rand(1, 16, 24, 3) * 2 - 1
    loaded = load_autoencoder(str(tmp_path / "ae"))
    assert torch.equal(loaded.encode(frames), TinyAutoencoder(tiny).encode(frames))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded.*or pixels") as caught:
        load_autoencoder(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)


def test_without_the_extra_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"kinema\[transfer\]"):
        load_autoencoder("madebyollin/taesd")
    assert isinstance(load_autoencoder("pixels"), PixelAutoencoder)


def test_pixels_there_and_back():
    """A frame that is constant over every square is found again."""
    autoencoder = load_autoencoder("pixels", pixels_per_latent=4)
    latent = torch.rand(2, 3, 5, 1).expand(-1, -1, -1, 3) * 2 - 1
    frames = latent.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    torch.testing.assert_close(autoencoder.encode(frames), latent)
    assert autoencoder.decode(latent).shape == frames.shape
    louder = load_autoencoder("pixels", pixels_per_latent=4, pixel_gain=2.0)
    torch.testing.assert_close(louder.encode(frames), 2 * latent)
    torch.testing.assert_close(louder.decode(2 * latent), autoencoder.decode(latent))
    with pytest.raises(ValueError, match="not tiled"):
        autoencoder.encode(frames[:, :-1])
