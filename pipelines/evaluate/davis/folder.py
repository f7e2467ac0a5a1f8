"""DAVIS folders: frames, annotations, sequence lists, and folders of predicted masks.

Labels are uint8: 0 background, 1.. objects, 255 void. Binary masks stored as 0 and 255 (DAVIS 2016, and
many single-object results) are read as object 1.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

VOID = 255
RESOLUTIONS = ("480p", "Full-Resolution", "1080p")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class DavisSequence:
    """Files of one sequence; frames and annotations correspond one to one."""

    name: str
    """Name of its folder."""
    frames: tuple[Path, ...]
    """Pictures in order; empty when only masks are there."""
    annotations: tuple[Path, ...]
    """Masks in order."""

    def labels(self) -> UInt8[np.ndarray, "T H W"]:
        """All annotations."""
        return read_labels(self.annotations)


def find_sequences(
    davis_root: str | Path, sequences: list[str] | None = None, split: str = "val", frames: bool = True
) -> list[DavisSequence]:
    """Sequences of a DAVIS folder.

    Args:
        davis_root: folder with `JPEGImages/480p/SEQUENCE` and `Annotations/480p/SEQUENCE`, or its parent.
        sequences: names to take; by default those of `ImageSets/2017/SPLIT.txt` (or `ImageSets/*/SPLIT.txt`)
            if it exists, otherwise all that have annotations.
        frames: whether pictures are needed; a sequence without any is then left out of "all".

    Raises: ValueError that says what was looked for and what is there.
    """
    root = _root(Path(davis_root), frames)
    annotations = _resolution(root / "Annotations")
    pictures = _resolution(root / "JPEGImages") if frames else None
    names = sequences if sequences is not None else _listed(root, split)
    if names is None:
        names = sorted(p.name for p in annotations.iterdir() if p.is_dir() and any(p.glob("*.png")))
        if pictures is not None:
            names = [name for name in names if (pictures / name).is_dir()]
    if not names:
        raise ValueError(f"{root}: no sequence to evaluate under {annotations}; found {_content(annotations)}")
    return [_sequence(name, annotations / name, pictures and pictures / name) for name in names]


def read_labels(paths: tuple[Path, ...] | list[Path]) -> UInt8[np.ndarray, "T H W"]:
    """The masks of a sequence; one whose only label is 255 holds object 1 there.

    Raises: ValueError for a colour picture, or masks of different sizes.
    """
    masks = [_read_mask(path) for path in paths]
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise ValueError(f"{path}: mask of {mask.shape}, the first of its sequence has {masks[0].shape}")
    labels = np.stack(masks)
    if labels.max() == VOID and not ((labels > 0) & (labels < VOID)).any():
        labels = (labels == VOID).astype(np.uint8)
    return labels


def write_labels(folder: Path, names: list[str], labels: UInt8[np.ndarray, "T H W"]) -> None:
    """Masks as palette png files in the benchmark's colours, one for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in zip(names, labels, strict=True):
        picture = Image.fromarray(mask)
        picture.putpalette(_palette())
        picture.save(folder / f"{name}.png")


def _root(root: Path, frames: bool) -> Path:
    wanted = ["Annotations"] + ["JPEGImages"] * frames
    for candidate in (root, root / "DAVIS"):
        if all((candidate / name).is_dir() for name in wanted):
            return candidate
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; a DAVIS folder is needed")
    raise ValueError(f"{root}: not a DAVIS folder (no {' and '.join(wanted)}); found {_content(root)}")


def _resolution(folder: Path) -> Path:
    """The folder of sequences: a known resolution if there is one, else the folder itself."""
    return next((folder / name for name in RESOLUTIONS if (folder / name).is_dir()), folder)


def _listed(root: Path, split: str) -> list[str] | None:
    lists = [root / "ImageSets" / "2017" / f"{split}.txt", *sorted(root.glob(f"ImageSets/*/{split}.txt"))]
    for path in lists:
        if path.is_file():
            # DAVIS 2016 lists frames ("/JPEGImages/480p/bear/00000.jpg ..."), DAVIS 2017 sequence names.
            entries = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            return list(dict.fromkeys(Path(e).parent.name if "/" in e else e for e in entries))
    return None


def _sequence(name: str, annotations: Path, pictures: Path | None) -> DavisSequence:
    masks = sorted(annotations.glob("*.png")) if annotations.is_dir() else []
    if not masks:
        raise ValueError(f"sequence {name}: no png masks in {annotations}; found {_content(annotations.parent)}")
    if pictures is None:
        return DavisSequence(name, (), tuple(masks))
    files = sorted(p for p in pictures.glob("*") if p.suffix.lower() in FRAME_SUFFIXES)
    by_stem = {path.stem: path for path in files}
    missing = [mask.stem for mask in masks if mask.stem not in by_stem]
    if missing or len(files) != len(masks):
        raise ValueError(
            f"sequence {name}: {len(files)} frames in {pictures} and {len(masks)} masks in {annotations}; "
            f"every frame needs a mask of the same name"
            + (f" (no frame for {', '.join(missing[:3])})" if missing else "")
        )
    return DavisSequence(name, tuple(by_stem[mask.stem] for mask in masks), tuple(masks))


def _read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        if picture.mode == "1":
            return np.array(picture).astype(np.uint8) * VOID
        if picture.mode not in ("P", "L"):
            raise ValueError(f"{path}: a mask must be a palette or grey png, this one is {picture.mode}")
        return np.array(picture)


def _content(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def _palette() -> list[int]:
    """The Pascal VOC colours: the bits of an index in turn to red, green, blue, most significant first."""
    return [
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]
