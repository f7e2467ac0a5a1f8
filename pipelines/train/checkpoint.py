"""Checkpoints: written beside their place and renamed, complete or absent, newest complete one found again.

RUN/checkpoints/step_00000500/
    model.safetensors   the whole module
    state.pt            optimizer, loader position, window of metrics (loads with weights_only)
    meta.json           step, sizes of the other files, identity, metrics, train config

A sharded training (`sharded.py`) has its ranks' parts of module and optimizer, *.distcp, in place of model.safetensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kinema.configs.json_text import json_text
from kinema.models.weights import file_sha256
from kinema.pipelines.errors import StageError
from kinema.pipelines.train.bucket_run import fetched_checkpoint, is_url
from kinema.pipelines.train.sharded import INDEX_FILE, read_parts, save_parts

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.pt"
META_FILE = "meta.json"
_TEMPORARY = ".partial-"


def checkpoint_folder(run: Path, step: int | str) -> Path:
    """Where the checkpoint of this step, or of this name, lies."""
    return run / "checkpoints" / (step if isinstance(step, str) else f"step_{step:08d}")


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Tensor], state: Any, meta: Mapping[str, Any], keep: int, best: int = 0
) -> Path:
    """Write a checkpoint and drop all but the newest `keep` and the `best` ones by meta's mean loss.

    A killed save leaves only a `.partial-` folder.

    Raises: StageError if the disk is full or cannot be written.
    """
    final = checkpoint_folder(run, step)
    temporary = final.parent / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        stored, aliases = _without_aliases(tensors)
        save_file(stored, temporary / MODEL_FILE)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StageError(_why_not_saved(final, error)) from error
    return _finish(run, final, temporary, state, {"step": step, **meta, "aliases": aliases}, keep, best)


def save_sharded_checkpoint(
    run: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Any,
    meta: Mapping[str, Any],
    keep: int,
    best: int = 0,
) -> None:
    """As `save_checkpoint`, by all ranks together (or one alone): each writes its part, the first one the rest.

    Raises: StageError on every rank if one of them cannot write.
    """
    final = checkpoint_folder(run, step)
    temporary = final.parent / f"{_TEMPORARY}{final.name}-sharded"
    several = dist.is_initialized()
    first = not several or dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    if several:
        dist.barrier()
    aliases = save_parts(temporary, module, optimizer)
    if first:
        _finish(run, final, temporary, state, {"step": step, **meta, "aliases": aliases}, keep, best)
    if several:
        dist.barrier()


def _finish(run: Path, final: Path, temporary: Path, state: Any, meta: dict[str, Any], keep: int, best: int) -> Path:
    """State and meta beside what is there already; then the checkpoint takes its place, and old ones go."""
    try:
        torch.save(state, temporary / STATE_FILE)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        text = json_text({**meta, "files": sizes}, indent=2, sort_keys=True)
        (temporary / META_FILE).write_text(text + "\n")
        for path in temporary.iterdir():
            _fsync(path)
        _fsync(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _fsync(final.parent)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StageError(_why_not_saved(final, error)) from error
    there = {folder.name: folder for folder in complete_checkpoints(run)}
    losses = {name: mean_loss(read_meta(folder)) for name, folder in there.items()} if best else {}
    for name in to_drop(list(there), keep, best, losses):
        shutil.rmtree(there[name])
    return final


def mean_loss(meta: Mapping[str, Any]) -> float:
    """Mean loss of a checkpoint's steps since the one before; infinite where it is not known or no number."""
    value = meta.get("mean_loss")
    return math.inf if value is None or math.isnan(value) else float(value)


def to_drop(names: Sequence[str], keep: int, best: int, losses: Mapping[str, float]) -> list[str]:
    """Names that are neither among the newest `keep` (0: all are kept) nor among the `best` lowest losses."""
    if keep <= 0:
        return []
    newest = sorted(names)[-keep:]
    ranked = sorted((name for name in names if losses.get(name, math.inf) < math.inf), key=lambda n: (losses[n], n))
    return [name for name in sorted(names) if name not in {*newest, *ranked[:best]}]


def is_sharded(checkpoint: Path) -> bool:
    """Whether the ranks of a sharded training wrote it."""
    return (checkpoint / INDEX_FILE).is_file()


def complete_checkpoints(run: Path) -> list[Path]:
    """Every checkpoint whose files have the recorded sizes, oldest first."""
    return [f for f in sorted((run / "checkpoints").glob("step_*")) if _is_complete(f)]


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    found = complete_checkpoints(run)
    return found[-1] if found else None


def sweep_partial(run: Path) -> None:
    """Remove what killed saves left."""
    for folder in (run / "checkpoints").glob(f"{_TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def model_sha256(checkpoint: Path) -> str:
    """Hash of the files that hold the module: one, or the parts of all ranks."""
    if not is_sharded(checkpoint):
        return file_sha256(checkpoint / MODEL_FILE)
    parts = [f"{path.name} {file_sha256(path)}" for path in sorted(checkpoint.glob("*.distcp"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """`meta.json` of a checkpoint."""
    return json.loads((checkpoint / META_FILE).read_text())


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The module's state dict, second names of shared tensors included."""
    tensors = read_parts(checkpoint) if is_sharded(checkpoint) else load_file(checkpoint / MODEL_FILE)
    for name, original in read_meta(checkpoint)["aliases"].items():
        tensors[name] = tensors[original]
    return tensors


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Optimizer, loader position and random state, on the CPU."""
    return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)


def weights_file(weights: str) -> str:
    """What `weights=` stands for where a run may be given: of a folder, the weights in its newest checkpoint.

    Raises: ValueError for a folder that holds none.
    """
    if not weights or not Path(weights).expanduser().is_dir():
        return weights
    checkpoint = resolve_checkpoint(Path(weights).expanduser(), setting="weights")
    if is_sharded(checkpoint):
        raise ValueError(f"weights={weights} is a sharded run, which is in no single file; give a run of sharding=none")
    return str(checkpoint / MODEL_FILE)


def resolve_checkpoint(path: str | Path, setting: str = "model") -> Path:
    """The checkpoint meant by a run (its newest) or by a checkpoint, a folder or a URL of which a copy is fetched.

    Args: setting, the key that named it, for the message.
    Raises: ValueError if there is none.
    """
    if is_url(path):
        return fetched_checkpoint(str(path), setting)
    folder = Path(path)
    if (folder / META_FILE).is_file():
        return folder
    found = latest_checkpoint(folder)
    if found is None:
        what = "is neither a checkpoint nor a run with a complete checkpoint" if folder.exists() else "does not exist"
        raise ValueError(
            f"{setting}={path} {what}; give the folder that `kinema train` wrote, or one of its checkpoints"
        )
    return found


def _without_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, each storage once, and second name -> first name for the rest."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in first_name:
            aliases[name] = first_name[place]
            continue
        first_name[place] = name
        stored[name] = tensor.detach().cpu().contiguous()
    return stored, aliases


def _is_complete(folder: Path) -> bool:
    try:
        files = read_meta(folder)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _why_not_saved(final: Path, error: Exception) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        return f"disk full while writing checkpoint {final}: free space or set out= to another disk"
    return f"cannot write checkpoint {final}: {error}"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
