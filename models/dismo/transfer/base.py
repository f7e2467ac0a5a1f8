"""The frozen video model under the adapter: CogVideoX (image to video), its autoencoder and its text encoder.

All of it is diffusers' and transformers' own (optional extra `transfer`), read from a folder or from the hub.

Source: Yang et al., CogVideoX, arXiv:2408.06072.

Shape legend: B batch, T frames, F latent frames, H W pixels, c h w latent, L text tokens, E text width, S steps.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kinema.models.dismo.autoencoder import EXTRA

DEFAULT_BASE = "THUDM/CogVideoX-5b-I2V"
"""As in kinema.configs.models.transfer, which needs more than a hub entry may ask for."""
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
_PIPELINE = "CogVideoXImageToVideoPipeline"
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class VideoBase:
    """The parts of the video model, and what its configuration says."""

    name: str
    """Folder, or name on the hub."""
    transformer: Any
    """CogVideoXTransformer3DModel."""
    vae: Any
    """AutoencoderKLCogVideoX."""
    text_encoder: Any
    """T5EncoderModel."""
    tokenizer: Any
    """Of the text encoder."""
    scheduler: Any
    """CogVideoXDPMScheduler; holds how much signal is left at every diffusion step."""

    @property
    def pixels_per_latent(self) -> int:
        """Side of the square of pixels that a latent stands for."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def frames_per_latent(self) -> int:
        """Frames that a latent frame stands for; the first one stands for a single frame."""
        return int(self.vae.config.temporal_compression_ratio)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its videos, in pixels."""
        config = self.transformer.config
        return config.sample_height * self.pixels_per_latent, config.sample_width * self.pixels_per_latent

    @property
    def max_tokens(self) -> int:
        """Length to which prompts are padded."""
        return int(self.transformer.config.max_text_seq_length)

    @property
    def signal_shares(self) -> Float[Tensor, "S"]:
        """Share of the signal's power in the noisy latent at every step of training."""
        return self.scheduler.alphas_cumprod.float()

    def check_size(self, height: int, width: int) -> None:
        """Raises: ValueError for a size that the transformer has no positions for."""
        side = self.pixels_per_latent * self.transformer.config.patch_size
        if self.transformer.config.use_learned_positional_embeddings and (height, width) != self.size:
            raise ValueError(
                f"size {height}x{width}: {self.name} makes videos of {self.size[0]}x{self.size[1]} only (height x "
                "width); leave height and width out"
            )
        if height % side or width % side or height < side or width < side:
            raise ValueError(f"size {height}x{width}: both sides must be multiples of {side} pixels")

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises: ValueError for a prompt with more tokens than the transformer reads."""
        for prompt in prompts:
            count = len(self.tokenizer(prompt, truncation=False).input_ids)
            if count > self.max_tokens:
                shown = prompt if len(prompt) <= _SHOWN_CHARACTERS else f"{prompt[:_SHOWN_CHARACTERS]}..."
                raise ValueError(f"prompt {shown!r} has {count} tokens, at most {self.max_tokens} fit; shorten it")

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Float[Tensor, "B L E"]:
        """Text tokens of prompts, padded. Raises: ValueError as `check_prompts`."""
        self.check_prompts(prompts)
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=self.max_tokens, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0]

    @torch.no_grad()
    def encode_frames(self, frames: Float[Tensor, "B T H W 3"]) -> Float[Tensor, "B F c h w"]:
        """Scaled latents, drawn from the autoencoder's distribution, of frames in -1..1."""
        planes = rearrange(frames, "b t h w c -> b c t h w").to(self.vae.dtype)
        latents = self.vae.encode(planes).latent_dist.sample() * self.vae.config.scaling_factor
        return rearrange(latents, "b c f h w -> b f c h w")

    def rotary(self, num_latent_frames: int, height: int, width: int, device: torch.device) -> Any:
        """(cos, sin) tables of a latent's cells, at whole positions; None for a transformer without.

        Args: height, width, of the latent.
        """
        config = self.transformer.config
        if not config.use_rotary_positional_embeddings:
            return None
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        grid = (height // config.patch_size, width // config.patch_size)
        return get_3d_rotary_pos_embed(
            config.attention_head_dim, None, grid, num_latent_frames, grid_type="slice", max_size=grid, device=device
        )


def load_base(name: str = DEFAULT_BASE, dtype: torch.dtype = torch.float32) -> VideoBase:
    """The video model, frozen and in eval mode, on the CPU.

    Args: name, a folder that diffusers' pipeline wrote, or a name on the hub.
    Raises: ValueError if the extra is not installed, or there is no such model.
    """
    diffusers, transformers = need_libraries()
    _check_folder(name)
    loaders = {
        "tokenizer": (transformers.AutoTokenizer, {}),
        "text_encoder": (transformers.T5EncoderModel, {"dtype": dtype}),
        "transformer": (diffusers.CogVideoXTransformer3DModel, {"torch_dtype": dtype}),
        "vae": (diffusers.AutoencoderKLCogVideoX, {"torch_dtype": dtype}),
        "scheduler": (diffusers.CogVideoXDPMScheduler, {}),
    }
    parts: dict[str, Any] = {}
    for part, (loader, options) in loaders.items():
        try:
            parts[part] = loader.from_pretrained(name, subfolder=part, **options)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise ValueError(f"base={name}: its {part} cannot be loaded ({reason}); {_WANTED}") from None
    base = VideoBase(name, **parts)
    _check_parts(base)
    for network in (base.transformer, base.vae, base.text_encoder):
        network.eval().requires_grad_(False)
    return base


_WANTED = f"give a folder that diffusers' {_PIPELINE} wrote, or a name on the hub such as {DEFAULT_BASE}"


def need_libraries() -> tuple[Any, Any]:
    """diffusers and transformers. Raises: ValueError that names the extra, if they are not installed."""
    try:
        import diffusers  # optional dependencies
        import transformers
    except ImportError as error:
        raise ValueError(
            f"motion transfer needs diffusers and transformers, which are not installed ({error}): {EXTRA}"
        ) from None
    return diffusers, transformers


def _check_folder(name: str) -> None:
    """Raises: ValueError, before anything large is read, for a folder that holds no such model."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith(("~", ".")) or name.count("/") != 1:
            raise ValueError(f"base={name} is no folder; {_WANTED}")
        return
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ValueError(f"base={name} lacks {', '.join(missing)}; {_WANTED}")
    index = folder / "model_index.json"
    found = json.loads(index.read_text()).get("_class_name", "") if index.is_file() else _PIPELINE
    if found != _PIPELINE:
        raise ValueError(f"base={name} is a {found}; {_WANTED}")


def _check_parts(base: VideoBase) -> None:
    """Raises: ValueError for parts that do not fit one another, or a model of another kind."""
    config, latent = base.transformer.config, base.vae.config.latent_channels
    if config.patch_size_t is not None:
        raise ValueError(f"base={base.name} is a CogVideoX 1.5; the adapter is made for CogVideoX 1.0: {_WANTED}")
    if config.in_channels != 2 * latent or config.out_channels != latent:
        raise ValueError(
            f"base={base.name} takes {config.in_channels} channels where a video and a picture of {latent} latent "
            f"channels each are given: it makes no videos of pictures; {_WANTED}"
        )
    if config.text_embed_dim != base.text_encoder.config.d_model:
        raise ValueError(
            f"base={base.name}: its transformer reads text of width {config.text_embed_dim}, its text encoder makes "
            f"{base.text_encoder.config.d_model}; {_WANTED}"
        )
