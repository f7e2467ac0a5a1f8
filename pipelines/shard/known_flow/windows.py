"""From pairs to clips: runs of neighbouring frames, cut into windows that share a frame with the next one.

Each image of a sequence is then stored once (or twice, at the seams), and every pair lies in one clip whole. Windows
follow from the list of pairs alone; a pair that turns out to be damaged only splits the window it lies in, so that the
clips of all other windows stay as they were planned.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from kinema.pipelines.flow_datasets.sample import BadPair, FlowFiles, read_image
from kinema.pipelines.sidecars.flow_codec import FlowPair

# What the flow codec can hold: 16 bits in steps of 1/16 px.
LARGEST_PX = 2047.0


@dataclass(frozen=True)
class Window:
    """Frames of one sequence in order, and the pairs among them as (t, gap, files), t counted in the window."""

    scene: str
    frames: tuple[tuple[int, Path], ...]
    pairs: tuple[tuple[int, int, FlowFiles], ...]

    @property
    def id(self) -> str:
        """Unique in the data set."""
        return f"{self.scene}#{self.frames[0][0]}"

    @property
    def files(self) -> list[Path]:
        """All files, each once, in a fixed order."""
        return list(dict.fromkeys([p for _, p in self.frames] + [p for *_, pair in self.pairs for p in pair.files]))

    def fingerprint(self) -> str:
        """Changes when a file does, by size and time of change."""
        facts = []
        for path in self.files:
            try:
                state = path.stat()
                facts.append(f"{path}:{state.st_size}:{state.st_mtime_ns}")
            except OSError:
                facts.append(f"{path}:missing")
        return _digest(facts)

    def clips(self, bad: Iterable[str]) -> list[DatasetClip]:
        """The window's clips without the pairs whose ids are bad."""
        left_out = set(bad)
        good = [pair for pair in self.pairs if pair[2].id not in left_out]
        return [
            DatasetClip(self.scene, self.frames[first : last + 1],
                        tuple((t - first, gap, files) for t, gap, files in pairs))
            for (first, last), pairs in _runs(good, len(self.frames))
        ]  # fmt: skip


@dataclass(frozen=True)
class DatasetClip:
    """Frames that become one clip, and the flow between them."""

    scene: str
    frames: tuple[tuple[int, Path], ...]
    pairs: tuple[tuple[int, int, FlowFiles], ...]

    @property
    def frame_numbers(self) -> tuple[int, ...]:
        """Numbers of the frames in their sequence, as the data set counts."""
        return tuple(number for number, _ in self.frames)

    @property
    def labels(self) -> dict[str, object]:
        """What the sample's json says of the clip besides."""
        return {"group": self.pairs[0][2].group, "pairs": [[t, gap, files.id] for t, gap, files in self.pairs]}

    def expected_bytes(self) -> int:
        """About what the clip will take: its images are compressed as well in the data set."""
        return sum(path.stat().st_size for _, path in self.frames)

    def content_hash(self, of_file: Mapping[str, str]) -> str:
        """Of everything the clip is made from."""
        names = [str(path) for _, path in self.frames] + [str(p) for *_, f in self.pairs for p in f.files]
        return _digest([*(of_file[name] for name in names), *(str(pair[:2]) for pair in self.pairs)])

    def images(self) -> list[UInt8[np.ndarray, "H W 3"]]:
        """The frames, RGB. Raises: BadPair."""
        return [read_image(path) for _, path in self.frames]

    def flows(self) -> Iterator[tuple[FlowPair, int]]:
        """Flow of every pair, and the number of its pixels that move too far to be stored. Raises: BadPair."""
        for t, gap, files in self.pairs:
            truth = files.truth()
            known = np.isfinite(truth.flow_px).all(axis=0)
            with np.errstate(invalid="ignore"):
                storable = known & (np.abs(truth.flow_px) <= LARGEST_PX).all(axis=0)
            yield FlowPair(t, gap, truth.flow_px, truth.occlusion, valid=storable), int((known & ~storable).sum())


def windows_of(pairs: Sequence[FlowFiles], clip_frames: int) -> list[Window]:
    """The windows of a data set, sequence by sequence."""
    found: list[Window] = []
    for scene, group in itertools.groupby(sorted(pairs, key=lambda p: p.scene), key=lambda pair: pair.scene):
        found += _scene_windows(scene, list(group), clip_frames)
    return found


def _scene_windows(scene: str, pairs: list[FlowFiles], clip_frames: int) -> Iterator[Window]:
    paths = {p.frame: p.image1 for p in pairs} | {p.frame + p.gap: p.image2 for p in pairs}
    numbers = sorted(paths)
    place = {number: index for index, number in enumerate(numbers)}
    placed = [(place[p.frame], place[p.frame + p.gap] - place[p.frame], p) for p in pairs]
    for (first, last), inside in _runs(placed, len(numbers)):
        left = sorted(inside, key=lambda pair: (pair[0], pair[1]))
        for start in range(first, last, clip_frames - 1):
            stop = min(start + clip_frames - 1, last)
            mine = [pair for pair in left if start <= min(pair[0], pair[0] + pair[1]) < stop]
            frames = tuple((number, paths[number]) for number in numbers[start : stop + 1])
            yield Window(scene, frames, tuple((t - start, gap, files) for t, gap, files in mine))


def _runs(
    pairs: Sequence[tuple[int, int, FlowFiles]], num_frames: int
) -> Iterator[tuple[tuple[int, int], list[tuple[int, int, FlowFiles]]]]:
    """Stretches of frames (first, last) that pairs of neighbours hold together, each with its pairs."""
    linked = np.zeros(num_frames, bool)  # [i]: frames i and i + 1 belong together
    for t, gap, files in pairs:
        if abs(gap) != 1:
            raise ValueError(f"{files.id} leads over {abs(gap)} frames of its sequence; pairs are of neighbours")
        linked[min(t, t + gap)] = True
    start = None
    for index, joined in enumerate(linked):
        if joined and start is None:
            start = index
        if not joined and start is not None:
            yield (start, index), [p for p in pairs if start <= p[0] <= index and start <= p[0] + p[1] <= index]
            start = None


@dataclass(frozen=True)
class Checked:
    """What reading all of a window showed."""

    fingerprint: str
    bad: dict[str, tuple[str, str]]
    """Pair id -> (class of the error, message)."""
    hashes: dict[str, str]
    """File -> hash of its bytes; without files of bad pairs that cannot be read."""


def check_window(window: Window) -> Checked:
    """Read every pair as it will be read when it is packed."""
    fingerprint = window.fingerprint()
    bad: dict[str, tuple[str, str]] = {}
    hashes: dict[str, str] = {}
    for *_, files in window.pairs:
        try:
            files.read()
            for path in files.files:
                if str(path) not in hashes:
                    hashes[str(path)] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        except BadPair as error:
            bad[files.id] = (type(error).__name__, str(error))
        except (OSError, MemoryError) as error:
            bad[files.id] = ("BadPair", f"{files.id}: {error}")
    return Checked(fingerprint, bad, hashes)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
