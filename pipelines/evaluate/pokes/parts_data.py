"""Images with pokes and the parts they move: rendered scenes with exact parts, or a folder.

The folder (Drag-a-Move and its like, brought into this form):

    pokes.csv           one row per poke, columns in any order:
        image           file below the folder, for example images/0001.png; a poke per row, images may repeat
        x, y            where the poke begins, in pixels of the image, centres at integers
        end_x, end_y    where that point is to go
        mask            file below the folder: a grey, palette or RGB picture of the image's size, not 0 where the
                        poke's part is
        split           optional: tune or test; empty: images take turns, the first tunes
        camera_static   optional: 1 (the default) or 0
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image, UnidentifiedImageError

from kinema.models.fpt.data_rules import central_square, gap_in_frames, points_in_square
from kinema.pipelines.evaluate.pokes.parts import PartImage, PartPoke, Split
from kinema.pipelines.scenes import Scene

SCENE_SEED = 7_000_000
"""Rendered scenes count from here: far from the seeds that films and tests are made with."""
SCENE_SIDE_PX = 256
SCENE_FPS = 24.0
SMALLEST_PART = 0.005
"""Share of the picture below which a part of a scene is not poked."""
SMALLEST_MOTION = 0.02
"""Motion in sides of the picture below which a poke would say that its part stands still."""
POKES_PER_SCENE = 4
POKES_FILE = "pokes.csv"
_STATIC: dict[str, bool] = {"": True, "1": True, "0": False}
_SPLITS: dict[str, Split | None] = {"": None, "tune": "tune", "test": "test"}
_COLUMNS = ("image", "x", "y", "end_x", "end_y", "mask")


def scene_images(num_scenes: int, gap_s: float = 1.0, seed: int = 0) -> Iterator[PartImage]:
    """Rendered scenes under a still camera; pokes on some parts that are seen and move, with their exact motion."""
    for number in range(num_scenes):
        rng = np.random.default_rng([seed, number])
        gap = gap_in_frames(gap_s, SCENE_FPS)
        size = (SCENE_SIDE_PX, SCENE_SIDE_PX)
        scene = Scene(SCENE_SEED + number, *size, num_frames=2 * gap, fps=SCENE_FPS, camera="still")
        start = int(rng.integers(gap))
        pokes = _scene_pokes(scene, start, start + gap, rng)
        if pokes:
            yield PartImage(f"scene-{scene.seed}", scene.frame(start), pokes)


def _scene_pokes(scene: Scene, t0: int, t1: int, rng: np.random.Generator) -> tuple[PartPoke, ...]:
    parts, flow = scene.part_ids(t0), scene.flow_px(t0, t1) / SCENE_SIDE_PX
    pokes: list[PartPoke] = []
    for part in rng.permutation(np.unique(parts[parts > 0])):
        mask = parts == part
        rows, columns = np.nonzero(mask & (np.hypot(*flow) > SMALLEST_MOTION))
        if mask.mean() < SMALLEST_PART or not len(rows) or len(pokes) == POKES_PER_SCENE:
            continue
        pick = rng.integers(len(rows))
        y, x = rows[pick], columns[pick]
        pos = ((x + 0.5) / SCENE_SIDE_PX, (y + 0.5) / SCENE_SIDE_PX)
        pokes.append(PartPoke((float(pos[0]), float(pos[1])), (float(flow[0, y, x]), float(flow[1, y, x])), mask))
    return tuple(pokes)


class PartFolder:
    """The images of a folder (see above), in the order in which `pokes.csv` first names them.

    Raises: ValueError for a missing file or column, or (on iteration) a row that cannot be used; names the row.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / POKES_FILE
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; moving_part reads it, or data=scenes (columns {', '.join(_COLUMNS)})"
            )
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, restval="")
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path}: no column {', '.join(missing)}; it needs {', '.join(_COLUMNS)}")
            self._rows: dict[str, list[tuple[str, dict[str, str]]]] = {}
            for number, row in enumerate(reader, 2):
                empty = [name for name in _COLUMNS if not row[name].strip()]
                if empty:
                    raise ValueError(f"{path}, line {number}: {', '.join(empty)} empty; every poke needs it")
                self._rows.setdefault(row["image"], []).append((f"{path}, line {number}", row))
        if not self._rows:
            raise ValueError(f"{path}: no poke; one row each")

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[PartImage]:
        for name, rows in self._rows.items():
            frame = _read_picture(rows[0][0], self.folder / name)
            static, split = _agreed(name, rows, "camera_static", _STATIC), _agreed(name, rows, "split", _SPLITS)
            pokes = tuple(self._poke(where, row, frame.shape[:2]) for where, row in rows)
            yield PartImage(name, frame, pokes, _STATIC[static], _SPLITS[split])

    def _poke(self, where: str, row: dict[str, str], size: tuple[int, int]) -> PartPoke:
        mask = _read_mask(where, self.folder / row["mask"], size)
        ends = torch.tensor(
            [
                [_number(where, row, "x"), _number(where, row, "y")],
                [_number(where, row, "end_x"), _number(where, row, "end_y")],
            ],
            dtype=torch.float64,
        )
        begin, end = points_in_square(ends, *size).tolist()
        if not all(0 <= value <= 1 for value in begin):
            raise ValueError(
                f"{where}: the poke begins outside the central square of the image, which is all that is seen"
            )
        top, left, side = central_square(*size)
        square = mask[top : top + side, left : left + side]
        return PartPoke((begin[0], begin[1]), (end[0] - begin[0], end[1] - begin[1]), square)


def _number(where: str, row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {name}={row[name]!r} is no number; give pixels of the image")
    return value


def _agreed(image: str, rows: list[tuple[str, dict[str, str]]], column: str, known: Mapping[str, object]) -> str:
    """What all rows of an image say in an optional column."""
    values = [(row.get(column) or "").strip() for _, row in rows]
    for (where, _), value in zip(rows, values, strict=True):
        if value not in known:
            raise ValueError(f"{where}: {column}={value!r}; use {', '.join(v for v in known if v)} or leave it empty")
        if value != values[0]:
            raise ValueError(f"{where}: {column}={value!r}, an earlier row of {image} says {values[0]!r}")
    return values[0]


def _read_picture(where: str, path: Path) -> UInt8[np.ndarray, "H W 3"]:
    with _opened(where, path) as picture:
        return np.array(picture.convert("RGB"))


def _read_mask(where: str, path: Path, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    with _opened(where, path) as picture:
        if picture.mode not in ("1", "L", "P", "I", "I;16", "RGB"):
            raise ValueError(f"{where}: {path} is a {picture.mode} picture; a mask is grey, palette or RGB")
        mask = np.array(picture) != 0
    mask = mask.any(axis=2) if mask.ndim == 3 else mask
    if mask.shape != size:
        raise ValueError(f"{where}: {path} is {list(mask.shape)}, its image {list(size)}; they must agree")
    return mask


def _opened(where: str, path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{where}: {path} cannot be read as a picture ({error})") from error
    return picture
