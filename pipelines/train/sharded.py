"""Weights, gradients and optimizer state shared out over ranks (FSDP2), and checkpoints of them.

Each rank writes its own part (torch.distributed.checkpoint); any other number of ranks, and a reader that is no rank at
all, puts together what it needs. `parallel.py` and the loop know only what is here; recipes only name their units.
torch's modules for it take 2 s of processor time to import, so that functions import them: every worker of every stage
has this module, few have anything sharded.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinema.pipelines.errors import StageError

INDEX_FILE = ".metadata"
"""Of torch.distributed.checkpoint; it is there when all parts are."""
_MODEL, _OPTIMIZER = "model.", "optimizer."
_OTHER_FORWARDS = ("sample", "forward_sliding")


def shard(recipe: Any, module: nn.Module, device: torch.device) -> None:
    """Share the recipe's units out over all ranks, in place; each is gathered while it works.

    Raises: AssertionError for trained weights outside of the units.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in recipe.shard_units(module):
        sharded: Any = fully_shard(unit, mesh=mesh)  # the same module, which is an FSDPModule now
        for name in _OTHER_FORWARDS:
            if hasattr(unit, name):
                register_fsdp_forward_method(unit, name)
        if device.type == "cpu":
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no mean
    whole = [name for name, p in module.named_parameters() if p.requires_grad and not _is_shared(p)]
    assert not whole, f"trained weights outside of the units: {whole[:3]}"


def whole_tensor(value: Tensor) -> Tensor:
    """The same on every rank."""
    return value.full_tensor() if _is_shared(value) else value  # type: ignore[attr-defined]


def _is_shared(value: Tensor) -> bool:
    """Whether it is a DTensor, without the import."""
    return hasattr(value, "full_tensor")


def save_parts(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Write this rank's part; all ranks take part. Returns: second name -> first name of shared tensors.

    Raises: StageError, on every rank, if one of them cannot write.
    """
    import torch.distributed.checkpoint as dcp

    try:
        tensors = {**_model_tensors(module), **_optimizer_tensors(module, optimizer)}
        with _quietly_alone():
            dcp.save(tensors, checkpoint_id=str(folder), no_dist=not dist.is_initialized())
    except (dcp.api.CheckpointException, OSError, RuntimeError) as error:
        full = "No space left" in str(error)
        reason = "disk full: free space or set out= to another disk" if full else " ".join(str(error).split())[:300]
        raise StageError(f"cannot write checkpoint {folder}: {reason}") from error
    return _aliases(module)


def load_parts(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Continue from parts that any number of ranks wrote, sharded or not."""
    stored = _index(folder)
    wanted = {**_model_tensors(module), **_optimizer_tensors(module, optimizer, create=True)}
    # Before the first step there is no optimizer state.
    _load(folder, {name: value for name, value in wanted.items() if not name.startswith(_OPTIMIZER) or name in stored})


def read_parts(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the module, whole, on the CPU; no ranks are needed."""
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _index(folder).items()
        if name.startswith(_MODEL)
    }
    _load(folder, found)
    return {name.removeprefix(_MODEL): value for name, value in found.items()}


@contextlib.contextmanager
def _quietly_alone() -> Iterator[None]:
    """Without being told, each time, that a process without ranks is on its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _index(folder: Path) -> Mapping[str, Any]:
    from kinema.pipelines.train.parts_index import PartsReader

    return PartsReader(folder, INDEX_FILE).read_metadata().state_dict_metadata


def _load(folder: Path, tensors: dict[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp

    from kinema.pipelines.train.parts_index import PartsReader

    with _quietly_alone():
        dcp.load(tensors, storage_reader=PartsReader(folder, INDEX_FILE), no_dist=not dist.is_initialized())


def _model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each once."""
    once = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return {f"{_MODEL}{name}": value for name, value in module.state_dict().items() if name in once}


def _aliases(module: nn.Module) -> dict[str, str]:
    first = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
    every = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: first[id(value)] for name, value in every if first[id(value)] != name}


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, create: bool = False) -> dict[str, Tensor]:
    """Moments and counts by the names of their parameters. Args: create, zeros where there are none yet."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if create and not optimizer.state[parameter]:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        state = optimizer.state[parameter] if parameter in optimizer.state else {}
        found |= {f"{_OPTIMIZER}{name}.{key}": value for key, value in state.items()}
    return found
