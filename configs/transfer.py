"""Settings of `kinema transfer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinema.configs.checks import require
from kinema.configs.models.transfer import DEFAULT_BASE


@dataclass(frozen=True)
class TransferConfig:
    """`kinema transfer`: a motion video, a picture and a prompt in, a video out."""

    motion: str = field(default="", metadata={"file": True})
    """Video file whose motion is taken."""
    image: str = field(default="", metadata={"file": True})
    """Picture file that the new video begins with; cropped about its centre to the video's shape."""
    prompt: str = ""
    """What the new video shows; empty: no guidance by text."""
    out: str = ""
    """The new video, x.mp4."""
    base: str = DEFAULT_BASE
    """Video model: folder in diffusers' form, or a name on the hub."""
    weights: str = ""
    """The adapter: file or URL, run of `kinema train model=cogvideox5b_i2v_large`, or published (also if empty)."""
    extractor: str = ""
    """Motion extractor: run, checkpoint, models:/NAME@ALIAS, a file of the large one, or published; empty: the one
    in the adapter's file or of the adapter's run, else published."""
    fps: float = 8.0
    """Frames a second: read from the motion video, by its timestamps, and written."""
    start_s: float = 0.0
    """Where in the motion video to begin, in seconds from its start."""
    num_frames: int = 25
    """Frames of the new video, 4 n + 1; 0: as many as the motion video gives, at most 49."""
    height: int = 0
    """In pixels; 0: the base's."""
    width: int = 0
    """In pixels; 0: the base's."""
    guidance: float = 6.0
    """How far the prompt is followed, beyond what the negative prompt gives; 1: no guidance."""
    negative_prompt: str = ""
    """What guidance leads away from; empty: blur, jitter and the like."""
    steps: int = 50
    """Diffusion steps."""
    seed: int = 0
    """Of the noise that the video begins as."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the base's weights; auto: bf16 on a GPU, fp32 on a CPU."""
    tiling: bool = True
    """The autoencoder works on tiles: less memory."""
    slicing: bool = True
    """The autoencoder works on one video at a time: less memory."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep what is not at work in the CPU's memory: whole networks, or every layer (slow, least memory)."""

    def __post_init__(self) -> None:
        require(self.fps > 0, "fps", self.fps, "use a positive number of frames a second")
        require(self.start_s >= 0, "start_s", self.start_s, "use 0 or more seconds")
        fits = self.num_frames == 0 or (self.num_frames >= 5 and self.num_frames % 4 == 1)
        low = max(5, (self.num_frames - 1) // 4 * 4 + 1)
        require(fits, "num_frames", self.num_frames, f"use 4 n + 1 frames, such as {low} or {low + 4}")
        require(self.guidance >= 1, "guidance", self.guidance, "use 1 (none) or more")
        require(self.steps >= 1, "steps", self.steps, "use 1 or more")
        for name in ("height", "width"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "use pixels, or 0 for the base's")
