"""Settings of the Flow Poke Transformer's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinema.configs.checks import require


@dataclass(frozen=True)
class FPTConfig:
    """The Flow Poke Transformer: what it is shown, and its size (ICCV 2025, section 3 and supplement)."""

    preset: Literal["fpt_base", "fpt_tiny", "fpt_nano"] = "fpt_base"
    """The published model, or one that trains on a CPU."""
    encoder_weights: str = field(default="", metadata={"file": True})
    """Checkpoint the image encoder starts from: file, URL, `published` (ledger) or empty (untrained, said aloud)."""
    image_px: int = 512
    """Side of the square that the loader hands over; the encoder resizes it to its own."""
    gap_s: float = 1.0
    """Time from the shown frame to the end of the motion, in seconds (published: 25 frames)."""
    num_pokes: int = 128
    """Pokes of a sample; its queries are predicted from 0 to num_pokes - 1 of them."""
    queries_per_poke: int = 15
    """Queries predicted from each number of pokes."""
    min_tracks: int = 128
    """Fewest usable tracks of a start frame; num_pokes + queries_per_poke are needed in any case."""
    queries: Literal["unbiased", "published"] = "unbiased"
    """How queries are drawn: evenly from all tracks, or by the published rule, whose late ones are mostly known."""
    allow_overlap: bool = True
    """Whether a query may ask for a point whose motion is already known."""
    allow_invisible_ends: bool = True
    """Whether tracks count that are hidden at the end of the motion."""
    allow_out_of_frame_ends: bool = True
    """Whether tracks count that have left the square at the end of the motion."""
    static_flow: float = 0.01
    """Tracks that move less stand still, in units of the square's side."""
    static_share: float = 0.4
    """The camera is called static when more than this share of the tracks stands still."""
    pck_thresholds: tuple[float, float, float] = (0.01, 0.05, 0.1)
    """Errors up to which a predicted end counts as right in the logged PCK, in units of the square's side."""

    def __post_init__(self) -> None:
        require(self.image_px >= 32, "fpt.image_px", self.image_px, "use 32 or more pixels")
        require(self.gap_s > 0, "fpt.gap_s", self.gap_s, "use a positive number of seconds")
        require(self.num_pokes >= 1, "fpt.num_pokes", self.num_pokes, "use 1 or more")
        require(self.queries_per_poke >= 1, "fpt.queries_per_poke", self.queries_per_poke, "use 1 or more")
        require(self.static_flow >= 0, "fpt.static_flow", self.static_flow, "use 0 or more")
        require(0 <= self.static_share <= 1, "fpt.static_share", self.static_share, "use a share, 0 to 1")
        require(min(self.pck_thresholds) > 0, "fpt.pck_thresholds", list(self.pck_thresholds), "use positive errors")
