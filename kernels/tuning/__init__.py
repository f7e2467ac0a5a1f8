"""What kernels run with: measured on this card by `make gpu ONLY=tuning`, or else defaults that are safe on any.

`DEVICE.json` beside this file holds one measured row a line; DEVICE is the card's name with underscores. A card without
a file, and a case without a row, use the default of the operation, which is compiled ahead of time by the tests.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent
FIELDS: dict[str, Any] = {
    "op": str,
    "kernel": str,
    "dtype": str,
    "bucket": str,
    "pattern": str,
    "blocks": list,
    "warps": int,
    "stages": int,
    "ms": (int, float),
    "torch": str,
    "triton": str,
    "date": str,
    "commit": str,
}
"""Of a row, with their types."""


class Config(NamedTuple):
    """Tile sizes and launch options of a kernel."""

    blocks: tuple[int, ...]
    """As the operation orders them."""
    num_warps: int
    num_stages: int = 2


class Key(NamedTuple):
    """What a configuration is chosen by."""

    op: str
    kernel: str
    dtype: str
    """As torch spells it, without `torch.`."""
    bucket: str
    """A range of sizes, as the operation names it."""
    pattern: str = ""


_tried: dict[Key, Config] = {}


def choose_config(key: Key, default: Config, device: torch.device) -> Config:
    """The measured configuration of a card, or the default.

    Raises: ValueError if the card's file is broken, with the line.
    """
    if _tried and key in _tried:
        return _tried[key]
    if device.type != "cuda":
        return default
    return measured(torch.cuda.get_device_name(device)).get(key, default)


@contextlib.contextmanager
def trying(key: Key, config: Config) -> Iterator[None]:
    """Inside, `choose_config` gives this configuration for this key: how candidates are measured."""
    _tried[key] = config
    try:
        yield
    finally:
        del _tried[key]


@functools.cache
def measured(device_name: str) -> dict[Key, Config]:
    """Rows of a card's file; empty without one."""
    path = file_of(device_name)
    return read_rows(path) if path.exists() else {}


def file_of(device_name: str, folder: Path = FOLDER) -> Path:
    """Where a card's rows lie."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', device_name)}.json"


def read_rows(path: Path) -> dict[Key, Config]:
    """Configurations by key. Raises: ValueError for a broken file, with the line."""
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip().rstrip(",")
        if text in ("", "[", "]"):
            continue
        try:
            key, config = _parsed(json.loads(text))
        except ValueError as problem:
            raise ValueError(
                f"{path.name} line {number}: {problem}; delete the line, or the file, or measure again: "
                "make gpu ONLY=tuning"
            ) from None
        found[key] = config
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put measured rows into a card's file; rows of other keys stay."""
    old = [] if not path.exists() else [json.loads(x.rstrip(",")) for x in path.read_text().splitlines() if len(x) > 2]
    kept = {_parsed(row)[0]: row for row in (*old, *rows)}
    lines = ",\n".join(json.dumps(kept[key], allow_nan=False) for key in sorted(kept))
    partial = path.with_suffix(".partial")
    partial.write_text(f"[\n{lines}\n]\n")
    partial.replace(path)


def _parsed(row: Any) -> tuple[Key, Config]:
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    if missing := sorted(FIELDS.keys() - row.keys()):
        raise ValueError(f"it has no {', '.join(missing)}")
    if unknown := sorted(row.keys() - FIELDS.keys()):
        raise ValueError(f"nobody knows its {', '.join(unknown)}")
    for name, kind in FIELDS.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"{name}={row[name]!r} has the wrong type")
    numbers = {"blocks": row["blocks"], "warps": [row["warps"]]}
    for name, values in numbers.items():
        if not values or any(not isinstance(v, int) or v < 1 or v & (v - 1) for v in values):
            raise ValueError(f"{name}={row[name]!r} must be powers of two")
    if not 1 <= row["stages"] <= 8 or row["warps"] > 32:
        raise ValueError(f"warps={row['warps']}, stages={row['stages']} are not what a card can run")
    key = Key(row["op"], row["kernel"], row["dtype"], row["bucket"], row["pattern"])
    return key, Config(tuple(row["blocks"]), row["warps"], row["stages"])
