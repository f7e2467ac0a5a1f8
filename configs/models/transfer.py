"""Settings of the motion adapter's training."""

from __future__ import annotations

from dataclasses import dataclass

from kinema.configs.checks import require

DEFAULT_BASE = "THUDM/CogVideoX-5b-I2V"
"""The video model that the published adapter goes around."""


@dataclass(frozen=True)
class TransferTrainingConfig:
    """The adapter of a video model that follows motion embeddings (NeurIPS 2025, section 3.3)."""

    base: str = DEFAULT_BASE
    """Video model: folder in diffusers' form, or a name on the hub. It stays as it is."""
    extractor: str = "published"
    """Motion extractor: run, checkpoint, models:/NAME@ALIAS, a file of the large one, or published."""
    rank: int = 128
    """Of the low-rank layers; their scale is a half, whatever the rank."""
    d_cond: int = 1024
    """Width of the condition of a latent frame."""
    fps: float = 8.0
    """Frames a second of a clip; chosen by time, whatever the video's rate."""
    num_frames: int = 25
    """Frames of a clip, 4 n + 1."""
    height: int = 480
    """Of the frames, in pixels, cropped about the centre; that of the base."""
    width: int = 720
    """Of the frames, in pixels; that of the base."""
    caption_column: str = "caption"
    """Label of a video that is its prompt; clips without it have an empty one."""
    caption_dropout: float = 0.0
    """Share of prompts that are left empty, so that guidance has something to lead away from."""
    checkpoint_layers: bool = True
    """Make activations of the blocks again in the backward pass: less memory, about a third more time."""
    guidance: float = 6.0
    """How far the prompt is followed in the logged pictures."""
    sample_steps: int = 20
    """Diffusion steps of the logged pictures."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "transfer.rank", self.rank, "use 1 or more")
        require(self.d_cond >= 1, "transfer.d_cond", self.d_cond, "use 1 or more")
        require(self.fps > 0, "transfer.fps", self.fps, "use a positive number of frames a second")
        fits = self.num_frames >= 5 and self.num_frames % 4 == 1
        require(fits, "transfer.num_frames", self.num_frames, "use 4 n + 1 frames, 5 or more")
        require(0 <= self.caption_dropout < 1, "transfer.caption_dropout", self.caption_dropout, "use 0 up to, not 1")
        require(self.guidance >= 1, "transfer.guidance", self.guidance, "use 1 (none) or more")
        require(self.sample_steps >= 1, "transfer.sample_steps", self.sample_steps, "use 1 or more")
