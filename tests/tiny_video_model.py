"""A CogVideoX of a few thousand weights from diffusers' own classes, with a text encoder and a tokenizer made here.

Also a DisMo run whose motion extractor answers, without a training.
"""

from pathlib import Path

import torch

from kinema.configs import DisMoConfig, TrainConfig
from kinema.configs.load import to_mapping
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.recipes.choose import make_recipe

HEIGHT, WIDTH, MAX_TOKENS = 64, 96, 12
LETTERS = "abcdefghijklmnopqrstuvwxyz,."


def write_base(folder: Path, seed: int = 0, **transformer) -> Path:
    """A folder as diffusers' pipeline writes it; random weights, no network. Args: transformer, other settings."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDPMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    sizes = dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=16,
        text_embed_dim=16, num_layers=2, sample_width=WIDTH // 8, sample_height=HEIGHT // 8, sample_frames=49,
        max_text_seq_length=MAX_TOKENS, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True,
    )  # fmt: skip
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = CogVideoXImageToVideoPipeline(
            T5Tokenizer(vocab=pieces, extra_ids=0),
            T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
            AutoencoderKLCogVideoX(
                block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
                sample_height=HEIGHT, sample_width=WIDTH, scaling_factor=0.7,
            ),
            CogVideoXTransformer3DModel(**(sizes | transformer)),
            CogVideoXDPMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=1.0, clip_sample=False,
            ),
        )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def write_dismo_run(folder: Path) -> Path:
    """A run with one checkpoint of the tiny DisMo, its weights random."""
    settings = DisMoConfig(preset="dismo_tiny", autoencoder="pixels", pixels_per_latent=4, frame_px=32)
    config = TrainConfig(model="dismo", settings=settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make_recipe(config).build()
        with torch.no_grad():
            for value in module.average.ema_model.motion_extractor.parameters():
                value.add_(0.05 * torch.randn_like(value))
    meta = {"identity": {}, "train_config": to_mapping(config), "loss": 1.0, "samples_per_second": 1.0}
    checkpoint.save_checkpoint(folder, 1, module.state_dict(), {}, meta, keep=1)
    return folder
