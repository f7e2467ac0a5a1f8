"""Motion transfer: a video that continues a picture and moves as another video does.

Source: Ressler-Antal et al., DisMo, NeurIPS 2025, arXiv:2511.23428, section 3.3; the call of `sample` is the published
one. Deviations: pictures are cropped and resized with antialiasing, each video has its own generator where several are
given, prompts that are too long are refused instead of cut.

Shape legend: B batch, T frames, F latent frames, H W pixels, h w pixels of the new videos, C condition width.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from kinema.models.dismo.motion_extractor import MotionExtractor, motion_extractor
from kinema.models.dismo.transfer.base import DEFAULT_BASE, VideoBase, load_base
from kinema.models.dismo.transfer.objective import add_noise, image_noise, latent_loss
from kinema.models.dismo.transfer.video_transformer import ALPHA, D_COND, EXTRACTOR, RANK, MotionVideoTransformer
from kinema.models.weights import (
    NonCommercialWeightsWarning,
    check_keys,
    licence_notice,
    local_file,
    published_file,
    read_state_dict,
)

NAME = "cogvideox5b_i2v_large"
NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"
"""What guidance leads away from where nothing else is asked for; the published default."""
GUIDANCE = 6.0
NUM_STEPS = 50
Offload = Literal["none", "model", "sequential"]


class MotionTransfer(MotionVideoTransformer):
    """The adapted video model with its frozen parts: motion extractor, text encoder, autoencoder.

    Args:
        base: changed in place.
        extractor: makes the embeddings that the adapter follows.
        vae_slicing: the autoencoder works on one video at a time.
        vae_tiling: the autoencoder works on overlapping tiles: less memory, edges blended.
    """

    def __init__(
        self,
        base: VideoBase,
        extractor: MotionExtractor,
        rank: int = RANK,
        d_cond: int = D_COND,
        vae_slicing: bool = True,
        vae_tiling: bool = True,
    ):
        super().__init__(base.transformer, rank, rank * ALPHA / RANK, extractor.d_motion, d_cond)
        self.base = base
        self.motion_extractor = extractor.requires_grad_(False)
        self.vae = base.vae
        self.text_encoder = base.text_encoder
        self.offload: Offload = "none"
        if vae_slicing:
            self.vae.enable_slicing()
        if vae_tiling:
            self.vae.enable_tiling()
        self.eval()

    def train(self, mode: bool = True) -> "MotionTransfer":
        """Frozen parts stay in eval mode."""
        super().train(mode)
        for frozen in (self.motion_extractor, self.vae, self.text_encoder):
            frozen.eval()
        return self

    def condition_of(self, videos: Shaped[Tensor, "B T H W 3"]) -> Float[Tensor, "B F C"]:
        """Conditions of the latent frames of videos that move like these, uint8 or -1..1, of any size.

        Raises: ValueError for a number of frames that is not 1 + 4 n, n at least 1.
        """
        conditioning: Any = self.conditioning
        least = 1 + conditioning.motions_per_latent
        if videos.shape[1] < least:
            raise ValueError(f"the motion video has {videos.shape[1]} frames; at least {least} are needed")
        place = self.init_gru_state.device
        frames = rearrange(_unit_range(videos.to(place)), "b t h w c -> (b t) c h w")
        small = F.interpolate(frames, self.motion_extractor.train_size, mode="bilinear", antialias=True)
        small = rearrange(small, "(b t) c h w -> b t h w c", b=len(videos))
        with torch.no_grad():
            extractor: Any = self.motion_extractor
            embeddings = extractor.forward_sliding(small)
        return conditioning(embeddings.to(self.init_gru_state.dtype))

    def training_loss(
        self, frames: Float[Tensor, "B T H W 3"], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, "B"], Int[Tensor, "B"]]:
        """Loss of each video, in -1..1 and of the base's size, and the diffusion step it was taken at.

        The first frame, under a little noise, is the picture; the video's own motion is the condition.
        """
        text = self.base.encode_text(prompts)
        latents = self.base.encode_frames(frames)
        picture = self.base.encode_frames(image_noise(frames[:, :1]))
        picture = torch.cat([picture, torch.zeros_like(latents[:, 1:])], dim=1)
        shares = self.base.signal_shares
        steps = torch.randint(len(shares), (len(frames),), device=frames.device)
        noisy = add_noise(latents, torch.randn_like(latents), steps, shares)
        rotary = self.base.rotary(latents.shape[1], latents.shape[-2], latents.shape[-1], device=frames.device)
        inputs = torch.cat([noisy, picture], dim=2)
        velocity = self(inputs, text.to(inputs.dtype), steps, self.condition_of(frames), rotary)
        return latent_loss(velocity.float(), latents.float(), noisy.float(), steps, shares), steps

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str] | None = None,
        images: Sequence[Tensor] | Tensor | None = None,
        motion_videos: Shaped[Tensor, "B T H W 3"] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        text_guidance_scale: float = GUIDANCE,
        n_steps: int = NUM_STEPS,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        negative_prompt: str | None = None,
        progress_bar: bool = False,
        on_step: Callable[[int], None] | None = None,
    ) -> UInt8[Tensor, "B T h w 3"]:
        """A video for each picture.

        Args:
            prompts: what the videos show; without, there is no guidance.
            images: the pictures that the videos begin with, [H, W, 3] each, uint8 or -1..1; others than of the videos'
                size are cropped to its shape about their centre, and resized.
            motion_videos: videos to move like, uint8 or -1..1, with as many frames as the videos that are made; None
                for the base alone.
            width, height: of the videos in pixels; the base's by default, which CogVideoX-5B-I2V needs.
            num_frames: 1 + 4 n; by default as many as the motion videos have.
            text_guidance_scale: how far the prompt is followed, beyond what the negative prompt gives; 1 for none.
            n_steps: diffusion steps.
            generator: one for all videos in turn, or one for each.
            negative_prompt: what to lead away from; `NEGATIVE_PROMPT` by default.
            progress_bar: diffusers' own, on stderr.
            on_step: called with the number of finished steps of the present video.
        Raises: ValueError for inputs that cannot be used together.
        """
        height, width = height or self.base.size[0], width or self.base.size[1]
        pictures = self._pictures(images, motion_videos, prompts, height, width)
        num_frames = self._num_frames(motion_videos, num_frames)
        guidance = text_guidance_scale if prompts is not None else 1.0
        # The default is cut where a base reads less than that; what was asked for is not.
        self.base.check_prompts([*(prompts or ()), *filter(None, [negative_prompt])])
        if n_steps < 1:
            raise ValueError(f"n_steps={n_steps}: at least one step is needed")
        generators = _for_each(generator, len(pictures))
        pipeline = self._pipeline(progress_bar)
        videos = []
        for number, picture in enumerate(pictures):
            condition = None if motion_videos is None else self.condition_of(motion_videos[number : number + 1])
            if condition is not None and guidance > 1:
                condition = torch.cat([condition, condition])  # both halves of guidance move alike
            with self.state.following(condition, self.base.max_tokens):
                made = pipeline(
                    image=picture[None],
                    prompt=prompts[number] if prompts is not None else "",
                    negative_prompt=negative_prompt or NEGATIVE_PROMPT,
                    height=height,
                    width=width,
                    num_frames=num_frames,
                    num_inference_steps=n_steps,
                    guidance_scale=guidance,
                    generator=generators[number],
                    max_sequence_length=self.base.max_tokens,
                    callback_on_step_end=_reporter(on_step),
                    output_type="pt",
                    return_dict=False,
                )[0]
            # Of an even number of latent frames the autoencoder makes four of the first one as well: its last is kept.
            pixels = (made[0][-num_frames:].float() * 255).round().byte()
            videos.append(rearrange(pixels, "t c h w -> t h w c").cpu())
        return torch.stack(videos)

    def _pipeline(self, progress_bar: bool) -> Any:
        from diffusers import CogVideoXImageToVideoPipeline  # the base is diffusers'

        base = self.base
        pipeline: Any = CogVideoXImageToVideoPipeline(
            base.tokenizer, base.text_encoder, base.vae, self.transformer, base.scheduler
        )
        pipeline.set_progress_bar_config(disable=not progress_bar)
        if self.offload != "none":
            place = self.init_gru_state.device
            if place.type == "cpu":
                raise ValueError(f"offload={self.offload} keeps weights away from a GPU, and there is none in use")
            offload = (
                pipeline.enable_model_cpu_offload if self.offload == "model" else pipeline.enable_sequential_cpu_offload
            )
            offload(device=place)
        return pipeline

    def _pictures(
        self,
        images: Sequence[Tensor] | Tensor | None,
        motion_videos: Tensor | None,
        prompts: Sequence[str] | None,
        height: int,
        width: int,
    ) -> list[Float[Tensor, "3 H W"]]:
        """In 0..1 and of the videos' size."""
        self.base.check_size(height, width)
        if images is None:
            raise ValueError("images is missing: the model continues a picture; give one for each video")
        counts = {"images": len(images)}
        counts |= {} if motion_videos is None else {"motion_videos": len(motion_videos)}
        counts |= {} if prompts is None else {"prompts": len(prompts)}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(f"{listed}: give as many of each as videos are wanted")
        return [fit_frames(_unit_range(image)[None], height, width)[0].permute(2, 0, 1) / 2 + 0.5 for image in images]

    def _num_frames(self, motion_videos: Tensor | None, num_frames: int | None) -> int:
        per = self.base.frames_per_latent
        found = None if motion_videos is None else motion_videos.shape[1]
        count = num_frames or found or self.base.transformer.config.sample_frames
        if count % per != 1 or count < 1 + per:
            raise ValueError(f"{count} frames: a video has {per} n + 1 of them, {per + 1} or more")
        if found is not None and found != count:
            raise ValueError(f"the motion videos have {found} frames, num_frames={count}; they must agree")
        return count


def fit_frames(frames: Float[Tensor, "B H W 3"], height: int, width: int) -> Float[Tensor, "B h w 3"]:
    """The largest central part of frames with the shape height x width, resized to it; values stay in -1..1."""
    rows, cols = frames.shape[1:3]
    if (rows, cols) == (height, width):
        return frames
    scale = min(rows / height, cols / width)
    h, w = min(rows, round(height * scale)), min(cols, round(width * scale))
    top, left = (rows - h) // 2, (cols - w) // 2
    planes = rearrange(frames[:, top : top + h, left : left + w], "b h w c -> b c h w")
    fitted = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return rearrange(fitted, "b c h w -> b h w c").clamp(-1, 1)


def cogvideox5b_i2v_large(
    pretrained: bool = False,
    weights: str | Path | None = None,
    base: str = DEFAULT_BASE,
    dtype: torch.dtype | None = None,
    vae_slicing: bool = True,
    vae_tiling: bool = True,
) -> MotionTransfer:
    """CogVideoX-5B-I2V under DisMo's motion adapter, in eval mode on the CPU.

    Args:
        pretrained: download the published adapter (once) and load it; the motion extractor is in the same file.
        weights: path or URL of an adapter to load instead.
        base: folder of the video model, or its name on the hub.
        dtype: of the video model; by default bfloat16 where there is a GPU, else float32.
        vae_slicing, vae_tiling: see `MotionTransfer`.
    Raises: ValueError without the extra `transfer`, for a base that is none, and for weights that do not fit.
    """
    given = weights is not None or pretrained
    source = str(weights) if weights is not None else "published"
    tensors = read_adapter(source) if given else None
    dtype = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    found = load_base(base, dtype)
    return assemble(found, tensors, source, None, vae_slicing, vae_tiling, pretrained)


def read_adapter(source: str) -> dict[str, Tensor]:
    """Tensors of an adapter. Args: source, a file, a URL, or `published`. Raises: ValueError."""
    if source != "published":
        return read_state_dict(local_file(source, NAME))
    warnings.warn(licence_notice(NAME), NonCommercialWeightsWarning, stacklevel=3)
    return read_state_dict(published_file(NAME))


def assemble(
    base: VideoBase,
    tensors: Mapping[str, Tensor] | None,
    source: str,
    extractor: MotionExtractor | None,
    vae_slicing: bool = True,
    vae_tiling: bool = True,
    pretrained: bool = True,
) -> MotionTransfer:
    """The model with an adapter's tensors, whose shapes say how large it is; None for a new adapter.

    Args:
        source: where the tensors are from, for messages.
        extractor: by default the large one, with the weights that the tensors hold, else the published ones if
            `pretrained`.
    Raises: ValueError for tensors that do not fit the base, or an extractor that does not fit them.
    """
    adapter = {} if tensors is None else {k: v for k, v in tensors.items() if not k.startswith(EXTRACTOR)}
    rank = next((int(value.shape[0]) for key, value in adapter.items() if ".lora_A." in key), RANK)
    d_cond = next((int(value.shape[1]) for key, value in adapter.items() if ".lora_emb_gamma." in key), D_COND)
    extractor = extractor or _large_extractor(tensors or {}, source, pretrained)
    if "gru.weight_ih" in adapter and adapter["gru.weight_ih"].shape[1] != extractor.d_motion:
        raise ValueError(
            f"the adapter {source} follows embeddings of {adapter['gru.weight_ih'].shape[1]} numbers, the motion "
            f"extractor makes {extractor.d_motion}; give the extractor that it was trained with: extractor="
        )
    model = MotionTransfer(base, extractor, rank, d_cond, vae_slicing, vae_tiling)
    if tensors is not None:
        model.load_adapter(adapter, source)
    return model.requires_grad_(False)


def _large_extractor(tensors: Mapping[str, Tensor], source: str, pretrained: bool) -> MotionExtractor:
    found = {key.removeprefix(EXTRACTOR): value for key, value in tensors.items() if key.startswith(EXTRACTOR)}
    extractor = motion_extractor(pretrained=pretrained and not found)
    if found:
        check_keys(extractor.state_dict(), found, source, "the motion extractor")
        extractor.load_state_dict(found)
    return extractor


def _unit_range(frames: Tensor) -> Tensor:
    return frames.float() / 127.5 - 1 if frames.dtype == torch.uint8 else frames.float()


def _for_each(generator: Any, count: int) -> Sequence[torch.Generator | None]:
    if isinstance(generator, torch.Generator) or generator is None:
        return [generator] * count
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} videos; give one, or one for each")
    return generator


def _reporter(on_step: Callable[[int], None] | None) -> Any:
    """As diffusers calls it: (pipeline, number of the step, time, tensors) -> tensors to put in their place."""
    if on_step is None:
        return None

    def report(_pipeline: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1)
        return tensors

    return report
