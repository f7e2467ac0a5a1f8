"""A data set's pairs in its folder: those that are whole, and the files that are missing.

The published lists say how many pairs there should be, and for most data sets which. What is found besides (other
scenes in the same layout) is listed too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from kinema.pipelines.flow_datasets.sample import FlowFiles, FlowSample

Split = Literal["training", "validation", "test"]
_SHOWN = 5


@dataclass(frozen=True)
class Selection:
    """Which part of a data set is wanted; a data set ignores what it does not have."""

    split: Split = "training"
    passes: tuple[str, ...] = ("clean", "final")
    """Renderings: Sintel and FlyingThings3D."""
    cameras: tuple[str, ...] = ("left",)
    """FlyingThings3D and Spring."""
    directions: tuple[str, ...] = ("forward",)
    """Flow to the next frame, to the frame before: FlyingThings3D and Spring."""
    trusted_only: bool = False
    """Sintel: pixels that its `invalid` masks mark are unknown."""


class Folder:
    """Looks files up by listing each folder once: a data set has ten thousands of them, on a share often."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._names = lru_cache(maxsize=None)(self._list)

    def _list(self, folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(folder))
        except OSError:
            return frozenset()

    def names(self, *parts: str) -> list[str]:
        """Sorted names in a folder below the root; none when it does not exist."""
        return sorted(self._names(str(self.root.joinpath(*parts))))

    def has(self, path: Path) -> bool:
        """Whether a file is there."""
        return path.name in self._names(str(path.parent))


@dataclass(frozen=True)
class Listing:
    """What a layout found, before completeness is judged."""

    pairs: Sequence[FlowFiles]
    """Pairs of the published list, and others that some file was found of; unique ids."""
    expected: int | None
    """Pairs that the published data set has in this selection; None where the publishers give no number."""
    layout: str
    """The folder's layout in words, for messages."""


@dataclass(frozen=True)
class FlowDataset:
    """The whole pairs of a data set, in order: `dataset[i]` and iteration read samples, and raise BadPair."""

    name: str
    root: Path
    pairs: tuple[FlowFiles, ...]
    expected: int | None
    missing: tuple[Path, ...] = field(repr=False)
    """Files without which listed pairs are not whole; first those of pairs whose flow is there."""
    num_broken: int = 0
    """Pairs whose flow is there, but not all that belongs to it."""
    layout: str = field(repr=False, default="")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> FlowSample:
        return self.pairs[index].read()

    def __iter__(self) -> Iterator[FlowSample]:
        return (pair.read() for pair in self.pairs)

    @property
    def is_complete(self) -> bool:
        """Every published pair is here with all of its files."""
        return not self.missing and len(self.pairs) >= (self.expected or 1)

    def shortfall(self) -> str:
        """What is missing, in one line; empty when nothing is."""
        if self.is_complete:
            return ""
        of = "" if self.expected is None else f" of {self.expected}"
        text = f"{self.name} at {self.root}: {len(self.pairs)}{of} pairs are whole"
        if self.missing:
            shown = ", ".join(str(_below(path, self.root)) for path in self.missing[:_SHOWN])
            more = len(self.missing) - _SHOWN
            text += f"; {len(self.missing)} files are missing: {shown}" + (f" and {more} more" if more > 0 else "")
        else:
            text += "; whole sequences are missing, which the publishers do not list by name"
        return text if self.pairs else f"{text} (layout: {self.layout})"


def complete(name: str, root: str | Path, listing: Listing, folder: Folder) -> FlowDataset:
    """Keep the pairs whose files all exist, and note the files that do not."""
    whole: list[FlowFiles] = []
    of_broken: dict[Path, None] = {}
    of_others: dict[Path, None] = {}
    num_broken = 0
    for pair in listing.pairs:
        absent = [path for path in pair.files if not folder.has(path)]
        if not absent:
            whole.append(pair)
        elif pair.flow is not None and pair.flow not in absent:
            num_broken += 1
            of_broken |= dict.fromkeys(absent)
        else:
            of_others |= dict.fromkeys(absent)
    missing = tuple(of_broken | of_others)
    return FlowDataset(name, Path(root), tuple(whole), listing.expected, missing, num_broken, listing.layout)


def unique(pairs: Iterable[FlowFiles]) -> list[FlowFiles]:
    """The first pair of every id, in the order of their ids' sequences and frames."""
    by_id: dict[str, FlowFiles] = {}
    for pair in pairs:
        by_id.setdefault(pair.id, pair)
    return sorted(by_id.values(), key=lambda pair: (pair.scene, pair.frame, -pair.gap))


def _below(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path
