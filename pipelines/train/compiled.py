"""Parts of a model that torch.compile rewrites for training: which, where, and what a failure tells the user.

Layers are compiled one by one, in place: names of weights, checkpoints and the model outside of them stay as they are,
and layers of one shape share one compilation.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kinema.pipelines.errors import StageError


def check(setting: str, recipe: Any, model: str, sharding: str) -> None:
    """Raises: ValueError where `train.compile=on` cannot be met."""
    if setting != "on":
        return
    if not hasattr(recipe, "compiled_units"):
        raise ValueError(f"train.compile=on: model={model} names no layers to compile; use compile=auto or off")
    if sharding != "none":
        raise ValueError("train.compile=on is not for sharding=full, which was never tried; use one of the two")


def is_used(setting: str, recipe: Any, device: torch.device, sharded: bool = False) -> bool:
    """What `train.compile` comes to. auto: on a GPU, for a recipe with `compiles_on_gpu`, where Triton can compile."""
    if setting != "auto":
        return setting == "on"
    wanted = device.type == "cuda" and not sharded and getattr(recipe, "compiles_on_gpu", False)
    return wanted and importlib.util.find_spec("triton") is not None and bool(shutil.which("cc") or shutil.which("gcc"))


def compile_units(recipe: Any, module: nn.Module) -> None:
    """Compile the recipe's units; the work is done in the first step, which the user is told."""
    units = recipe.compiled_units(module)
    for unit in units:
        unit.compile()
    sys.stderr.write(
        f"train: {len(units)} layers are compiled in the first step, which may take a minute or two "
        "(train.compile=off trains without)\n"
    )
    sys.stderr.flush()


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Without compiled layers: pictures come in other shapes, and would be compiled for once more."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; the import takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """Turns an error of the compiler into one line. Raises: StageError."""
    try:
        yield
    except RuntimeError as error:
        # Known only where something was compiled: the module behind the name takes a second to import.
        exceptions = sys.modules.get("torch._dynamo.exc")
        if exceptions is None or not isinstance(error, exceptions.TorchDynamoException):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(f"torch.compile failed ({first}); use train.compile=off: the run goes on from here") from error
