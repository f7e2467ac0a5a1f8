"""Videos whose classes are known: rendered ones, or a folder with a class per sub-folder or a table of labels.

A folder may hold `labels.csv`: a column `file`, and a column for each thing that is known of the files (their action,
the person, the place). Without one, the name of a file's folder is its `action`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from kinema.models.dismo.target_offset import frames_at_rate
from kinema.pipelines.scenes.motion_classes import LABELS, motion_clips
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.errors import SourceError
from kinema.pipelines.video.orient import orientation_of

SCENES = "scenes"
VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg"})
LABEL_FILE = "labels.csv"


@dataclass(frozen=True)
class LabelledVideo:
    """One video at the rate asked for, and what is known of it."""

    name: str
    frames: UInt8[np.ndarray, "T H W 3"]
    labels: dict[str, str]


@dataclass(frozen=True)
class LabelledFiles:
    """Files and their labels; every file has all of them."""

    paths: tuple[Path, ...]
    labels: tuple[dict[str, str], ...]


def find_labelled(folder: str | Path, max_videos: int = 0) -> LabelledFiles:
    """The videos of a folder.

    Args: max_videos, how many to keep, spread over all; 0 for all.
    Raises: ValueError for a folder without labelled videos.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"data={folder} is no folder; give one with a sub-folder of videos for each class, or scenes")
    found = _from_table(root) if (root / LABEL_FILE).is_file() else _from_folders(root)
    if len(found) < 2:
        raise ValueError(
            f"data={folder} holds {len(found)} labelled videos; give a sub-folder of videos for each class"
        )
    if 0 < max_videos < len(found):
        found = [found[i] for i in np.linspace(0, len(found) - 1, max_videos).round().astype(int)]
    return LabelledFiles(tuple(path for path, _ in found), tuple(labels for _, labels in found))


def rendered_videos(count: int, seed: int, side: int, num_frames: int) -> Iterator[LabelledVideo]:
    """Clips in which motion and appearance vary independently."""
    for clip in motion_clips(count, seed, side=side, num_frames=num_frames):
        yield LabelledVideo(f"{clip.motion}-{clip.seed}", clip.frames(), {name: getattr(clip, name) for name in LABELS})


def read_video(path: Path, fps: float, short_side: int, max_seconds: float) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames of a video file at this rate, nearest in time, upright, its shorter side at most `short_side` pixels.

    Raises: SourceError (pipelines/video/errors.py) for a file that cannot be read.
    """
    times: list[float] = []
    frames: list[np.ndarray] = []
    with VideoFile(str(path)) as video:
        for frame in video.frames():
            assert frame.pts is not None  # as `frames` promises; the frames' own time base is missing from the last
            time_s = float(frame.pts * video.time_base)
            if times and time_s - times[0] > max_seconds:
                break
            times.append(time_s)
            frames.append(_shrunk(orientation_of(frame).apply(frame.to_ndarray(format="rgb24")), short_side))
    if not frames:
        raise SourceError("no frame comes out of it")
    return np.stack([frames[i] for i in frames_at_rate(np.asarray(times), fps)])


def _shrunk(frame: np.ndarray, short_side: int) -> np.ndarray:
    scale = short_side / min(frame.shape[:2])
    if scale >= 1:
        return np.ascontiguousarray(frame)
    size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
    return cv2.resize(np.ascontiguousarray(frame), size, interpolation=cv2.INTER_AREA)


def _from_folders(root: Path) -> list[tuple[Path, dict[str, str]]]:
    files: Sequence[Path] = sorted(p for p in root.glob("*/**/*") if p.suffix.lower() in VIDEO_SUFFIXES)
    return [(path, {"action": path.parent.name}) for path in files]


def _from_table(root: Path) -> list[tuple[Path, dict[str, str]]]:
    with (root / LABEL_FILE).open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = [name for name in (rows[0] if rows else {}) if name and name != "file"]
    if not rows or "file" not in rows[0] or not names:
        raise ValueError(f"{root / LABEL_FILE} needs a column `file` and at least one column of labels")
    incomplete = [str(row["file"]) for row in rows if not all(row[name] for name in names)]
    if incomplete:
        raise ValueError(f"{root / LABEL_FILE}: {', '.join(incomplete[:5])} lack a label; fill every column")
    return [(root / row["file"], {name: row[name] for name in names}) for row in rows]
