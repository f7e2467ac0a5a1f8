"""Where a relative path in the settings lies: under `root=`, else in the working folder, and never in a package cache.

A job that Ray runs with a working directory of its own works in a copy of it below `runtime_resources`, which Ray
deletes when nobody uses it any more: what is written there by a relative path is lost.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kinema.configs.models.table import MODELS
from kinema.configs.rendered import RENDERED
from kinema.configs.search import is_clip_key

ROOT_VARIABLE = "KINEMA_ROOT"
PATH_KEYS = frozenset(
    "videos out clips flow other_flow tracks weights data workspace compare model backbone_weights "
    "encoder_weights".split()
)
"""Settings that name a file or folder, in every stage."""
_CACHE_FOLDER = "runtime_resources"
_WORDS = {
    "clips": (RENDERED,),
    "weights": ("published", "auto"),
    "backbone_weights": ("published", "auto"),
    "encoder_weights": ("published",),
}
_ADDRESSES = ("models:/", "runs:/")


def placed(config: Any, root: str = "", *, away: bool = False) -> Any:
    """The config with its relative paths under `root` (default: the environment's KINEMA_ROOT).

    Args: root, a folder or URL that all nodes see; away, whether the stage will run elsewhere, as a job.
    Returns: the config as it is where no root is given and the working folder is a usual one.
    Raises: ValueError for relative paths that would lie in a package cache, all of them in one message, or a relative
        root.
    """
    root = root or os.environ.get(ROOT_VARIABLE, "")
    if root and not _is_placed(root):
        raise ValueError(f"root={root} is relative; give the absolute path or URL of a folder that all nodes see")
    if root:
        return _under(config, root)
    if not (away or in_package_cache(Path.cwd())):
        return config
    if relative := [f"{key}={value}" for key, value in relative_paths(config)]:
        what = "are relative paths" if len(relative) > 1 else "is a relative path"
        where = "the job's working folder" if away else str(Path.cwd())
        raise ValueError(
            f"{', '.join(relative)} {what}, which would be looked for in {where}, a package cache that Ray deletes; "
            f"give absolute paths or URLs that all nodes see, or root=FOLDER (or {ROOT_VARIABLE}) for them to lie under"
        )
    return config


def in_package_cache(folder: Path) -> bool:
    """Whether a folder is, or lies in, the copy of a working directory that Ray made for a job."""
    return _CACHE_FOLDER in folder.absolute().parts


def relative_paths(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value) of every setting that is a relative path."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            section = MODELS[getattr(config, f.metadata["sections"])].section if "sections" in f.metadata else f.name
            yield from relative_paths(value, f"{prefix}{section}.")
        elif _is_path(f):
            many = value if isinstance(value, tuple) else (value,)
            yield from ((f"{prefix}{f.name}", path) for path in many if not _is_settled(f.name, path))


def _under(config: Any, root: str) -> Any:
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            changed[f.name] = _under(value, root)
        elif _is_path(f):
            many = value if isinstance(value, tuple) else (value,)
            moved = tuple(p if _is_settled(f.name, p) else f"{root.rstrip('/')}/{p}" for p in many)
            changed[f.name] = moved if isinstance(value, tuple) else moved[0]
    return dataclasses.replace(config, **changed)


def _is_path(field: dataclasses.Field[Any]) -> bool:
    return field.name in PATH_KEYS or "file" in field.metadata


def _is_settled(key: str, value: str) -> bool:
    """Whether a value does not depend on the working folder: absolute, a URL, a word, or no path at all."""
    if not value or _is_placed(value) or value in _WORDS.get(key, ()):
        return True
    if key == "data":
        return value == "scenes"
    if key == "query":
        return is_clip_key(value)
    if key == "index":
        return value.startswith(_ADDRESSES)
    if key == "model":
        # `train` names a model here, the other stages may name a run.
        return value.startswith(_ADDRESSES) or value in MODELS or any(value in row.names() for row in MODELS.values())
    return False


def _is_placed(value: str) -> bool:
    return "://" in value or value.startswith("~") or os.path.isabs(value)
