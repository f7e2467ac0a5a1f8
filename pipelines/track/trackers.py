"""The point trackers behind one call: a clip and queries in, tracks out.

`chain` follows stored flow (models/tracks/chaining.py) and needs no weights; its tracks are in pixels of the flow.
Networks look at the frames (models/tracks/); their tracks are in pixels of the clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, UInt8

from kinema.configs.checks import require_choice
from kinema.configs.models.row import TrackerFacts, resolve
from kinema.configs.models.table import MODELS
from kinema.models.tracks.alltracker.network import alltracker
from kinema.models.tracks.alltracker.predictor import AllTrackerPredictor
from kinema.models.tracks.chaining import chain_tracks
from kinema.models.tracks.cotracker3.network import cotracker3
from kinema.models.tracks.cotracker3.predictor import CoTracker3Predictor
from kinema.models.weights import file_sha256, local_file
from kinema.pipelines.loader.clip import Clip
from kinema.pipelines.precision import autocast
from kinema.pipelines.sidecars.sidecar import BadResult
from kinema.pipelines.sidecars.tracks_codec import Tracks

ABSURD_DIAGONALS = 2.0


class BadTracks(BadResult):
    """The tracker's positions are not finite, or far outside of the picture; the clip is quarantined."""


class Tracker(Protocol):
    """What the stage needs of a tracker."""

    def size(self, clip: Clip) -> tuple[int, int]:
        """(height, width) of the frames whose pixels queries and tracks are in."""

    def __call__(self, clip: Clip, queries: Float32[np.ndarray, "N 3"]) -> Tracks:
        """Tracks of the points (t, x, y) through the whole clip."""


@dataclass(frozen=True)
class TrackerSpec:
    """All that decides a tracker's numbers, and where it runs. Travels to actors; weights go by path."""

    name: str
    """A tracker of the table of models."""
    weights: str = ""
    """Local path of the checkpoint; empty for a tracker without."""
    weights_hash: str = ""
    """sha256 of that file; empty for a tracker without."""
    iters: int = 0
    """Refinements; 0 for a tracker without."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 1
    """CPU threads."""
    precision: str = "fp32"
    """fp32, or bf16 autocast."""

    def load(self) -> Tracker:
        """Build the tracker and load its weights. Raises: ValueError for weights that do not fit."""
        tracker = load_tracker(self.name, self.weights, iters=self.iters, device=self.device)
        return tracker if self.precision == "fp32" else _InPrecision(tracker, self.precision, self.device)


def load_tracker(name: str, weights: str | Path = "", *, iters: int = 0, device: str = "cpu") -> Tracker:
    """A tracker by name.

    Args: weights, a local file, or a path, URL or nothing as `locate_weights` takes them; iters, refinements (0: the
        published number).
    Raises: ValueError for an unknown name, or weights that do not fit.
    """
    path, _ = locate_weights(name, str(weights))
    return resolve(facts_of(name).load)(path, iters, device)


def facts_of(name: str) -> TrackerFacts:
    """What the table of models says of a tracker. Raises: ValueError for another name."""
    require_choice("tracker", name, MODELS.trackers())
    facts = MODELS[name].tracker
    assert facts is not None
    return facts


def locate_weights(name: str, weights: str) -> tuple[str, str]:
    """Local file and sha256 of a tracker's weights; both empty for a tracker without.

    Args: weights, a path or http(s) URL; empty means the published file.
    Raises: ValueError, one line that names weights=, when there is none.
    """
    if not facts_of(name).needs_weights:
        if weights:
            raise ValueError(f"weights={weights}: the tracker {name} has none; use a network or leave it out")
        return "", ""
    path = local_file(weights, MODELS[name].weights)
    return str(path), file_sha256(path)


def starting_frames(num_frames: int, wanted: Sequence[int], spread: int = 0) -> list[int]:
    """Frames of one clip in which grids are started, ascending, each once.

    Args: wanted, negative ones counted from the clip's end; a frame that the clip lacks becomes its nearest one;
        spread, instead so many frames at equal distances from the first to the last.
    """
    if spread:
        frames = np.rint(np.linspace(0, num_frames - 1, spread)).astype(int).tolist()
    else:
        frames = [min(max(t if t >= 0 else num_frames + t, 0), num_frames - 1) for t in wanted]
    return sorted(set(frames))


def check_tracks(tracks: Tracks) -> None:
    """Raises: BadTracks for positions that are not finite or absurdly far outside."""
    bad = int((~np.isfinite(tracks.points_px)).any(2).sum())
    if bad:
        raise BadTracks(f"{bad} of {tracks.visible.size} track positions are not finite")
    height, width = tracks.size
    limit_px = ABSURD_DIAGONALS * math.hypot(height, width)
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    farthest_px = float(np.sqrt(np.square(tracks.points_px - middle).sum(2)).max(initial=0.0))
    if farthest_px > limit_px:
        raise BadTracks(
            f"a track reaches {farthest_px:.0f} px from the middle of the frame, more than {limit_px:.0f} px "
            "(twice the picture's diagonal)"
        )


class _InPrecision:
    """A tracker whose matrix products are in another precision; positions and logits stay float32."""

    def __init__(self, tracker: Tracker, precision: str, device: str):
        self.tracker, self.precision, self.device = tracker, precision, device
        self.size = tracker.size

    def __call__(self, clip: Clip, queries: Float32[np.ndarray, "N 3"]) -> Tracks:
        with autocast(self.precision, self.device):
            return self.tracker(clip, queries)


class ChainTracker:
    """Chained flow of the clip's flow sidecar; has neither weights nor refinements."""

    def __init__(self, weights: str = "", iters: int = 0, device: str = "cpu"):
        assert not weights and not iters

    def size(self, clip: Clip) -> tuple[int, int]:
        """That of the stored flow."""
        return clip.flow_size

    def __call__(self, clip: Clip, queries: Float32[np.ndarray, "N 3"]) -> Tracks:
        """Raises: ValueError when the flow lacks gap 1 in either direction."""
        size = clip.flow_size
        found = chain_tracks(clip.flow, clip.flow_pairs, clip.num_frames, queries, *size)
        return Tracks(found.points_px, found.visible, size, queries)


class CoTracker3Tracker:
    """CoTracker3 offline; in windows where the clip is longer than the network sees at once."""

    def __init__(self, weights: str, iters: int = 0, device: str = "cpu"):
        settings: dict[str, Any] = {"iters": iters} if iters else {}
        self.predict = CoTracker3Predictor(cotracker3(weights=weights).to(device).eval(), **settings)

    def size(self, clip: Clip) -> tuple[int, int]:
        """That of the clip."""
        return clip.height, clip.width

    def __call__(self, clip: Clip, queries: Float32[np.ndarray, "N 3"]) -> Tracks:
        """Tracked forwards and backwards from every query."""
        found = self.predict(ClipFrames(clip), queries, backward=True)
        points_px, visible = found.tracks.float().cpu().numpy(), found.visible.cpu().numpy()
        return Tracks(points_px, visible, (clip.height, clip.width), queries)


class AllTrackerTracker:
    """AllTracker: all points of a frame in one pass, in windows whatever the clip's length."""

    def __init__(self, weights: str, iters: int = 0, device: str = "cpu"):
        settings: dict[str, Any] = {"iters": iters} if iters else {}
        self.predict = AllTrackerPredictor(alltracker(weights=weights).to(device), **settings)

    def size(self, clip: Clip) -> tuple[int, int]:
        """That of the clip."""
        return clip.height, clip.width

    def __call__(self, clip: Clip, queries: Float32[np.ndarray, "N 3"]) -> Tracks:
        """Tracked forwards and backwards from every query."""
        found = self.predict(ClipFrames(clip), queries)
        points_px, visible = found.tracks.float().cpu().numpy(), found.visible.cpu().numpy()
        return Tracks(points_px, visible, (clip.height, clip.width), queries)


class ClipFrames:
    """A clip as something to slice: only the frames asked for are decoded and held."""

    def __init__(self, clip: Clip):
        self.clip = clip

    def __len__(self) -> int:
        return self.clip.num_frames

    def __getitem__(self, frames: slice) -> UInt8[np.ndarray, "n H W 3"]:
        return self.clip.frames(range(*frames.indices(len(self))))
