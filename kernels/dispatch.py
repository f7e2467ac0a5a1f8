"""Whether a Triton kernel can run on given tensors, and who decides.

Each operation has its own `why_not_triton`, which asks here first and then checks its own limits.
"""

import contextlib
import importlib.metadata
import os
from typing import Any

import torch
from torch import Tensor

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
IMPLEMENTATIONS = ("auto", "reference", "triton")


def _why_no_package() -> str | None:
    oldest = ".".join(map(str, OLDEST_TRITON))
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return f"triton is not installed; pip install 'triton>={oldest}'"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {version} is older than {oldest}; pip install 'triton>={oldest}'"
    return None


# Read once, as triton reads it: torch.compile then sees constants.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
"""Whether Triton kernels run in its interpreter, on CPU tensors."""
_NO_PACKAGE = _why_no_package()


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Products in the dtype of their operands on a tensor's device, which need not know autocast (meta does not)."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def check_impl(impl: str) -> None:
    """Raises: ValueError for anything but 'auto', 'reference' and 'triton'."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not one of 'auto', 'reference', 'triton'")


def why_no_triton(*tensors: Tensor) -> str | None:
    """A sentence that says why no Triton kernel can run on these tensors, or None."""
    if _NO_PACKAGE is not None:
        return _NO_PACKAGE
    device = tensors[0].device
    for tensor in tensors[1:]:
        if tensor.device != device:
            return f"the tensors are on {device} and {tensor.device}; a kernel needs them on one device"
    if INTERPRETING:
        if device.type != "cpu":
            return f"TRITON_INTERPRET is set and the tensors are on {device}; unset it, or move them to the CPU"
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}; a kernel needs a CUDA device, or TRITON_INTERPRET=1 for a slow check"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        found, wanted = (".".join(map(str, pair)) for pair in (capability, OLDEST_CAPABILITY))
        return f"the device has compute capability {found}; the kernels need {wanted} or newer"
    return None


def use_triton(impl: str, reason: str | None) -> bool:
    """Whether to take the kernel, given `impl` and the reason against it.

    Raises: ValueError with the reason when impl is 'triton' and there is one.
    """
    if impl == "triton" and reason is not None:
        raise ValueError(f"impl='triton' cannot run: {reason}")
    return impl != "reference" and reason is None
