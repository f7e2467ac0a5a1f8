"""Which clips a page shows: different sources and different looks, none of them blank."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from kinema.pipelines.loader import Clip, ClipIndex

MAX_CANDIDATES = 60
BLANK_DEVIATION = 8.0
"""Grey values: a frame that deviates less shows nothing."""
SAME_SOURCE_FACTOR = 0.15


def spread(total: int, count: int) -> list[int]:
    """Up to `count` different numbers from 0 to total - 1, evenly spread."""
    return sorted({round(i) for i in np.linspace(0, total - 1, min(count, total))})


def varied(index: ClipIndex, count: int) -> list[int]:
    """Up to `count` clips that look as different as possible, of different sources first, the liveliest in front.

    Each next one is the farthest, by a small picture of its middle frame, from those chosen before; clips of a source
    that is there already count as near. Blank ones come last.
    """
    numbers = _candidates(index)
    looks = {number: _look(index.clip(number)) for number in numbers}
    lively = [number for number in numbers if looks[number].std() * 255 >= BLANK_DEVIATION]
    blank = [number for number in numbers if number not in lively]
    if not lively:
        return blank[:count]
    chosen = [max(lively, key=lambda number: float(looks[number].std()))]
    while len(chosen) < min(count, len(lively)):
        rest = [number for number in lively if number not in chosen]
        chosen.append(max(rest, key=lambda number: _distance(index, looks, number, chosen)))
    return (chosen + blank)[:count]


def caption_of(clip: Clip) -> str:
    """The source's name and the clip's time in it."""
    name = str(clip.meta["source"]).rpartition("/")[2]
    return f"{name}, {clip.meta['start_s']:.1f} to {clip.meta['end_s']:.1f} s"


def _candidates(index: ClipIndex) -> list[int]:
    """Clips of every source, as evenly as the number allows."""
    of_source: dict[str, list[int]] = {}
    for number, source in enumerate(index.table["source"].to_pylist()):
        of_source.setdefault(source, []).append(number)
    each = max(1, MAX_CANDIDATES // max(1, len(of_source)))
    found = [clips[i] for clips in of_source.values() for i in spread(len(clips), each)]
    return [found[i] for i in spread(len(found), MAX_CANDIDATES)]


def _look(clip: Clip) -> np.ndarray:
    frame = clip.frames([clip.num_frames // 2])[0]
    return cv2.resize(frame, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _distance(index: ClipIndex, looks: dict[int, np.ndarray], number: int, chosen: Sequence[int]) -> float:
    source = index.clip(number).meta["source"]
    distances = []
    for other in chosen:
        same = index.clip(other).meta["source"] == source
        distances.append(float(np.abs(looks[number] - looks[other]).mean()) * (SAME_SOURCE_FACTOR if same else 1.0))
    return min(distances)
