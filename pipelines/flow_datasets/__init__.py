"""Data sets of image pairs with known flow, by their published folder layouts.

    dataset = open_dataset("sintel", "/data/MPI-Sintel")     # ValueError that lists what is missing
    for sample in dataset:                                   # FlowSample; BadPair for a damaged one
        sample.image1, sample.flow_px, sample.valid, sample.occlusion

`tiny.write_tiny(name, folder)` writes a small generated sample of any of them in the same layout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kinema.pipelines.flow_datasets import recorded_sets, rendered_sets
from kinema.pipelines.flow_datasets.listing import FlowDataset, Folder, Listing, Selection, complete
from kinema.pipelines.flow_datasets.sample import (
    BadFlow,
    BadImage,
    BadMask,
    BadPair,
    FlowFiles,
    FlowSample,
    SizesDiffer,
)

LAYOUTS: dict[str, Callable[[Folder, Selection], Listing]] = {
    "flyingchairs": rendered_sets.chairs,
    "flyingthings3d": rendered_sets.things,
    "sintel": rendered_sets.sintel,
    "kitti2012": recorded_sets.kitti2012,
    "kitti2015": recorded_sets.kitti2015,
    "hd1k": recorded_sets.hd1k,
    "spring": rendered_sets.spring,
    "tartanair": rendered_sets.tartanair,
    "viper": rendered_sets.viper,
    "middlebury": recorded_sets.middlebury,
}
"""Name of each data set -> what lists its pairs."""

__all__ = [
    "LAYOUTS",
    "BadFlow",
    "BadImage",
    "BadMask",
    "BadPair",
    "FlowDataset",
    "FlowFiles",
    "FlowSample",
    "Selection",
    "SizesDiffer",
    "list_dataset",
    "open_dataset",
]


def list_dataset(name: str, root: str | Path, selection: Selection | None = None) -> FlowDataset:
    """The whole pairs that are there, and what is missing of the rest, without refusing anything.

    Raises: ValueError for an unknown data set, or a split it does not have.
    """
    if name not in LAYOUTS:
        raise ValueError(f"flow data set {name!r} is not known; use one of {', '.join(LAYOUTS)}")
    selection = selection or Selection()
    folder = Folder(root)
    listing = LAYOUTS[name](folder, selection)
    if listing.expected == 0:
        raise ValueError(f"{name} has no {selection.split} split; use another one")
    return complete(name, root, listing, folder)


def open_dataset(
    name: str, root: str | Path, selection: Selection | None = None, *, partial: bool = False, fix: str = "partial=True"
) -> FlowDataset:
    """A data set as it was published.

    Args: partial, take the pairs that are whole where others are missing; fix, how the caller's user says so.
    Raises: ValueError, one line, with the first missing files and the expected number of pairs, when some are missing
    and that was not allowed, or when no pair is whole.
    """
    dataset = list_dataset(name, root, selection)
    if not dataset.is_complete and not (partial and len(dataset)):
        hint = f"; copy the rest, or take what is there with {fix}" if len(dataset) else "; copy it whole"
        raise ValueError(dataset.shortfall() + hint)
    return dataset
