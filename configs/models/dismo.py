"""Settings of DisMo's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinema.configs.checks import require


@dataclass(frozen=True)
class DisMoConfig:
    """DisMo: what it is shown, and its size (NeurIPS 2025, section 3 and appendix)."""

    preset: Literal["dismo_large", "dismo_tiny", "dismo_nano"] = "dismo_large"
    """The paper's model, or one that trains on a CPU within an hour, or within minutes."""
    encoder_weights: str = field(default="", metadata={"file": True})
    """Checkpoint both image encoders start from: file, URL, `published` (ledger) or empty (untrained, said aloud)."""
    autoencoder: str = "madebyollin/taesd"
    """Between frames and latents: folder or hub name of diffusers' AutoencoderTiny (extra `transfer`), or `pixels`."""
    pixels_per_latent: int = 8
    """Side of the square of pixels that a latent of `pixels` stands for."""
    pixel_gain: float = 1.0
    """Factor of the latents of `pixels`; TAESD's vary about as much as the noise, plain pixels about half as much."""
    fps: float = 6.0
    """Frames a second of a clip; chosen by time, whatever the video's rate."""
    offset_rate_per_s: float = 12.0
    """Targets lie Gamma(3, this) seconds behind their sources, 3 / this before it is cut off: lower is further."""
    frame_px: int = 256
    """Side of the frames after augmentation."""
    motion_scale: tuple[float, float] = (0.25, 1.0)
    """Share of the frame's area that the motion branch keeps."""
    motion_aspect: tuple[float, float] = (0.666, 1.5)
    """Width over height of that part, before it is stretched to a square."""
    motion_angle_deg: float = 30.0
    """Largest rotation of the motion branch, either way."""
    motion_colours: tuple[float, float] = (0.5, 1.5)
    """Factors of brightness, contrast and saturation in the motion branch."""
    motion_hue: float = 0.0
    """Largest turn of the hue in the motion branch, either way, as a share of the full circle; 0, as published, leaves
    colours their names."""
    content_scale: tuple[float, float] = (0.7, 1.0)
    """Share of the frame's area that a source and its target keep."""
    content_colours: tuple[float, float] = (0.8, 1.2)
    """Factors of brightness and saturation of a source and its target."""
    aspect_limits: tuple[float, float] = (0.75, 1.333)
    """Width over height that frames are trimmed to first."""
    noise_shift: float = 0.0
    """Mean of the normal whose sigmoid is a pair's share of noise; 0 as published, above it there is more noise, and
    more that only the motion tells."""
    initial_spread: float = 0.0
    """Size at the start, relative to usual ones, of the weights that end the motion extractor's blocks. 0, as
    published: embeddings are all alike at first, and small models leave them so."""
    ema_decay: float = 0.9999
    """Largest decay of the averaged weights."""
    ema_every: int = 10
    """Steps between updates of the averaged weights."""
    checkpoint_layers: bool = False
    """Make activations of the transformers again in the backward pass: less memory, about a third more time."""
    collapse_spread: float = 0.05
    """Spread of the embeddings over clips, relative to their size, under which a collapse is reported."""
    sample_steps: int = 20
    """Steps of the generated frames in the logged pictures."""

    def __post_init__(self) -> None:
        require(self.pixel_gain > 0, "dismo.pixel_gain", self.pixel_gain, "use a positive factor")
        require(self.fps > 0, "dismo.fps", self.fps, "use a positive number of frames a second")
        require(self.offset_rate_per_s > 0, "dismo.offset_rate_per_s", self.offset_rate_per_s, "use a positive rate")
        require(self.frame_px >= 16, "dismo.frame_px", self.frame_px, "use 16 or more pixels")
        require(self.pixels_per_latent >= 1, "dismo.pixels_per_latent", self.pixels_per_latent, "use 1 or more pixels")
        require(0 <= self.motion_angle_deg <= 180, "dismo.motion_angle_deg", self.motion_angle_deg, "use 0 to 180")
        for name in ("motion_scale", "content_scale"):
            low, high = getattr(self, name)
            require(0 < low <= high <= 1, f"dismo.{name}", [low, high], "use an increasing range within 0..1")
        for name in ("motion_aspect", "aspect_limits", "motion_colours", "content_colours"):
            low, high = getattr(self, name)
            require(0 < low <= high, f"dismo.{name}", [low, high], "use an increasing range of positive numbers")
        require(0 <= self.motion_hue <= 0.5, "dismo.motion_hue", self.motion_hue, "use 0 to 0.5")
        require(self.initial_spread >= 0, "dismo.initial_spread", self.initial_spread, "use 0 or more")
        require(0 <= self.ema_decay < 1, "dismo.ema_decay", self.ema_decay, "use 0 up to, but not, 1")
        require(self.ema_every >= 1, "dismo.ema_every", self.ema_every, "use 1 or more steps")
        require(self.collapse_spread >= 0, "dismo.collapse_spread", self.collapse_spread, "use 0 or more")
        require(self.sample_steps >= 1, "dismo.sample_steps", self.sample_steps, "use 1 or more")
