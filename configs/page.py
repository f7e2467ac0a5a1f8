"""Settings of `kinema demo fpt`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kinema.configs.checks import require


@dataclass(frozen=True)
class PageConfig:
    """`kinema demo fpt`: the Flow Poke Transformer on a page in your browser."""

    model: str = "fpt_base"
    """`fpt_base` or `fpt_tiny` with weights=, or a run folder, checkpoint or registry URI (models:/...)."""
    weights: str = ""
    """Checkpoint file or URL for fpt_base or fpt_tiny; `published` downloads; empty: random weights."""
    clips: str = ""
    """A clips artifact whose frames can be chosen on the page."""
    port: int = 0
    """Port on 127.0.0.1; 0 takes a free one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    precision: Literal["fp32", "fp16_weights", "bf16"] = "fp32"
    """Of matrix products. fp16_weights (x86 CPUs) draws one sample in 0.6 of the time, measured on a Zen 3, with
    weights rounded to fp16 and all else in fp32; bf16 answers sooner on CPUs with instructions for it. Rounding is part
    of what is shown (how much: `python -m kinema.pipelines.bench fpt_sampling`)."""
    grid: int = 32
    """Points a side of dense pictures; while a poke is dragged, as many as a quarter of a second allows."""
    cached_images: int = 4
    """Images that stay embedded; one takes 80 MB with fpt_base."""
    max_upload_mb: float = 10.0
    """Largest picture file, in millions of bytes."""
    max_megapixels: float = 40.0
    """Largest picture, in millions of pixels."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", self.port, "use 1024 to 65535, or 0 for a free one")
        require(4 <= self.grid <= 64, "grid", self.grid, "use 4 to 64 points a side")
        require(self.cached_images >= 1, "cached_images", self.cached_images, "use 1 or more")
        require(self.max_upload_mb > 0, "max_upload_mb", self.max_upload_mb, "use a positive number")
        require(self.max_megapixels > 0, "max_megapixels", self.max_megapixels, "use a positive number")
