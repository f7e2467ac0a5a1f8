"""Settings of `kinema search`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinema.configs.checks import require

KEY_DIGITS = 32
"""Hex digits of a clip's key."""


def is_clip_key(text: str) -> bool:
    """Whether a text has the form of a clip's key, as opposed to a path."""
    return len(text) == KEY_DIGITS and all(letter in "0123456789abcdef" for letter in text)


@dataclass(frozen=True)
class SearchConfig:
    """`kinema search`: motion embeddings and a query in, the clips that move alike out."""

    clips: str = ""
    """The clips artifact."""
    features: str = field(default="", metadata={"file": True})
    """Its motion embeddings: the folder that `kinema embed` wrote with a DisMo."""
    query: str = field(default="", metadata={"file": True})
    """A clip's key (32 hex digits, see samples.parquet), or a video file."""
    out: str = ""
    """Folder for the page, its films and results.json."""
    model: str = ""
    """Query by video: what made the features (registry address, run or checkpoint); empty: found in the registry."""
    k: int = 10
    """Clips to find."""
    copies: bool = False
    """Whether near duplicates of the query, and of clips found already, are listed too."""
    method: Literal["auto", "exact", "approximate"] = "auto"
    """Compare with every window, or with those that an index proposes; auto: exact up to `exact_up_to` windows."""
    exact_up_to: int = 1_000_000
    """Windows up to which auto compares with every one."""
    index: str = field(default="", metadata={"file": True})
    """Approximate: the index's folder, made where it is missing, or models:/NAME@ALIAS for the one registered there;
    empty: OUT/index."""
    register: bool = False
    """Approximate: whether the index goes into the MLflow registry, beside the model that made the features."""
    block_windows: int = 16_384
    """Windows held in memory at a time."""
    num_probes: int = 16
    """Approximate: parts of the index that are looked at for each window of the query."""
    candidates: int = 200
    """Approximate: nearest windows to each of the query's, whose clips are then compared exactly."""
    recall_queries: int = 20
    """Approximate: clips with which a new index is compared with exact search; 0 means not at all."""
    max_seconds: float = 10.0
    """Query by video: of a longer one, its beginning."""

    def __post_init__(self) -> None:
        for name in ("k", "block_windows", "num_probes", "candidates"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        for name in ("exact_up_to", "recall_queries"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "use 0 or more")
        require(self.max_seconds > 0, "max_seconds", self.max_seconds, "use a positive number of seconds")
