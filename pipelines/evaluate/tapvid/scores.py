"""`evaluate` for trackers: TAP-Vid's benchmark files, or rendered scenes whose tracks are known.

As in the benchmark, videos are looked at in 256 x 256 pixels (Lanczos), and a stored position p of 0..1 is pixel
255 p, as in CoTracker's evaluation (TAP-Vid's own code takes 256 p; predictions and truth move together).
Source: Doersch et al., NeurIPS 2022, arXiv:2211.03726.
"""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from kinema.pipelines.evaluate.tapvid.files import TapVidFiles, TapVidVideo
from kinema.pipelines.evaluate.tapvid.metrics import QueryMode, mean_metrics, tapvid_metrics
from kinema.pipelines.scenes import Scene

SIDE_PX = 256
QUERY_STRIDE = 5
SCENES = "scenes"
"""`data=scenes` asks for rendered scenes instead of files (a folder of that name is `data=./scenes`)."""


class Tracker(Protocol):
    """What is evaluated: frames uint8 [T, H, W, 3] and queries [N, 3] (frame, x, y in pixels) to positions
    [T, N, 2] in pixels and visible flags [T, N], in frames before the query too."""

    def __call__(self, frames: np.ndarray, queries: np.ndarray, /) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class TapVidScores:
    """What a tracker reached."""

    mean: dict[str, float]
    """Each measure's mean over the videos; names as in `tapvid_metrics`."""
    videos: dict[str, dict[str, float]]
    """Each video's measures."""

    def write_csv(self, path: str | Path) -> None:
        """One row per video."""
        with open(path, "w", newline="") as handle:
            rows = csv.writer(handle)
            rows.writerow(["video", *self.mean])
            rows.writerows([name, *values.values()] for name, values in self.videos.items())


def evaluate_tapvid(
    tracker: Tracker,
    source: str | Path | Iterable[TapVidVideo],
    mode: QueryMode = "first",
    progress: Callable[[int, str], None] | None = None,
) -> TapVidScores:
    """Measure a tracker on TAP-Vid's files (see `TapVidFiles`) or on videos given directly.

    Args: mode, "first": every point is given where it is first seen; "strided": in every 5th frame in which it is
        seen. progress is called with (videos done, name) after every video.
    Raises: ValueError for files of another form, no videos, or tracks of another shape than asked for.
    """
    videos: dict[str, dict[str, float]] = {}
    for video in TapVidFiles(source) if isinstance(source, str | Path) else source:
        frames, tracks = at_benchmark_size(video)
        queries, rows = sample_queries(tracks, video.occluded, mode)
        if len(queries):
            found, visible = (_numpy(x) for x in tracker(frames, queries))
            if found.shape != (len(frames), len(queries), 2) or visible.shape != found.shape[:2]:
                raise ValueError(
                    f"{video.name}: the tracker gave tracks {list(found.shape)} and flags {list(visible.shape)} "
                    f"for {len(frames)} frames and {len(queries)} queries; they must be [T, N, 2] and [T, N]"
                )
            name = video.name if video.name not in videos else f"{video.name} ({len(videos)})"
            videos[name] = tapvid_metrics(
                queries[:, 0].astype(np.int64),
                tracks[rows],
                video.occluded[rows],
                found.transpose(1, 0, 2),
                ~visible.astype(bool).T,
                mode,
            )
        if progress is not None:
            progress(len(videos), video.name)
    if not videos:
        raise ValueError("no video with a visible point to evaluate")
    return TapVidScores(mean_metrics(list(videos.values())), videos)


def at_benchmark_size(
    video: TapVidVideo,
) -> tuple[UInt8[np.ndarray, "T 256 256 3"], Float[np.ndarray, "N T 2"]]:
    """Frames of 256 x 256 and the points in their pixels."""
    frames = video.frames
    if frames.shape[1:3] != (SIDE_PX, SIDE_PX):
        resized = [Image.fromarray(f).resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS) for f in frames]
        frames = np.stack([np.asarray(f) for f in resized])
    return frames, video.points * np.float32(SIDE_PX - 1)


def sample_queries(
    tracks: Float[np.ndarray, "N T 2"], occluded: Bool[np.ndarray, "N T"], mode: QueryMode
) -> tuple[Float[np.ndarray, "Q 3"], np.ndarray]:
    """Queries (frame, x, y), and the track that each belongs to; tracks that are never seen have none."""
    if mode == "first":
        rows = np.flatnonzero(~occluded.all(axis=1))
        frames = np.argmin(occluded[rows], axis=1)
    else:
        every = np.arange(0, occluded.shape[1], QUERY_STRIDE)
        order, rows = np.nonzero(~occluded[:, every].T)
        frames = every[order]
    return np.concatenate([frames[:, None], tracks[rows, frames]], axis=1).astype(np.float32), rows


def scene_videos(
    num_scenes: int = 3, num_frames: int = 24, num_points: int = 64, seed: int = 0
) -> Iterable[TapVidVideo]:
    """Rendered scenes with points whose tracks and occlusions are exact, spread over frames and picture."""
    for number in range(num_scenes):
        scene = Scene(seed + number, SIDE_PX, SIDE_PX, num_frames)
        rng = np.random.default_rng([seed, number])
        parts = [
            scene.tracks(rng.uniform(4, SIDE_PX - 5, (size, 2)), int(frame))
            for frame, size in zip(*np.unique(rng.integers(0, num_frames, num_points), return_counts=True), strict=True)
        ]
        xy = np.concatenate([tracks for tracks, _ in parts], axis=1).transpose(1, 0, 2)
        visible = np.concatenate([flags for _, flags in parts], axis=1).T
        frames = np.stack(list(scene.frames()))
        yield TapVidVideo(f"scene-{seed + number}", frames, (xy / (SIDE_PX - 1)).astype(np.float32), ~visible)


def _numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
