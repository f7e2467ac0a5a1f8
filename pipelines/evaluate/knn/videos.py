"""Videos whose classes are known: rendered ones, or a folder with a class per sub-folder or a table of labels.

A folder may hold `labels.csv`: a column `file`, and a column for each thing that is known of the files (their action,
the person, the place). Without one, the name of a file's folder is its `action`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from kinema.pipelines.scenes.motion_classes import LABELS, motion_clips

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


def rendered_videos(
    count: int, seed: int, side: int, num_frames: int, close_up: bool = False
) -> Iterator[LabelledVideo]:
    """Clips in which motion and appearance vary independently."""
    for clip in motion_clips(count, seed, side=side, num_frames=num_frames, close_up=close_up):
        yield LabelledVideo(f"{clip.motion}-{clip.seed}", clip.frames(), {name: getattr(clip, name) for name in LABELS})


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
