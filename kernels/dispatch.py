"""Whether a Triton kernel can run on given tensors, and who decides.

Each operation has its own `why_not_triton`, which asks here first and then checks its own limits.
"""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
IMPLEMENTATIONS = ("auto", "reference", "triton")


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1 before they are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def check_impl(impl: str) -> None:
    """Raises: ValueError for anything but 'auto', 'reference' and 'triton'."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not one of 'auto', 'reference', 'triton'")


def why_no_triton(*tensors: Tensor) -> str | None:
    """A sentence that says why no Triton kernel can run on these tensors, or None."""
    reason = _why_no_package()
    if reason is not None:
        return reason
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"the tensors are on {', '.join(sorted(map(str, devices)))}; a kernel needs them on one device"
    (device,) = devices
    if interpreting():
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


@cache
def _why_no_package() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'triton>=3.6'"
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {triton.__version__} is older than {oldest}; pip install 'triton>={oldest}'"
    return None
