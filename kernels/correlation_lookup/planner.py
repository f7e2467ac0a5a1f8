"""Which way to form correlation windows: read them from a volume, or form them on demand.

The volume of all products costs 4 (H W)^2 bytes and a matrix product once, and makes each refinement
cheap; on demand, nothing is kept and each refinement multiplies features. So the volume pays off on
small maps and over many iterations, as long as it fits. `plan_lookup` says which, and why.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from kinema.kernels.correlation_lookup.products import box_side
from kinema.kernels.correlation_lookup.volume import NUM_LEVELS, volume_bytes

VOLUME_SHARE = 0.5
"""Part of the free memory that a volume may take; the network's own activations need the rest."""
TRAINING_COPIES = 3
"""With gradients there are the volume, its summed gradient, and the gradient of one lookup."""
UNKNOWN_FREE_BYTES = 4 * 2**30

# Measured on one core of a 2-core AMD EPYC, torch 2.13, fp32, C 128 and 256, r 3 and 4 (`make bench`).
# Only their ratios matter, and those move little between machines.
FORM_NS_PER_PRODUCT = 0.028
"""On demand: one multiply-add of a query with a pixel of its tile's box."""
FORM_NS_PER_POINT = 17.0
"""On demand: gathering and blending one lattice point, and fetching its share of the box."""


class VolumeCosts(NamedTuple):
    """What a volume costs, in nanoseconds."""

    per_product: float
    """Building: one multiply-add of the matrix product."""
    per_entry: float
    """Building: writing and pooling one entry of level 0."""
    per_point: float
    """Gathering and blending one lattice point."""


GATHERED = VolumeCosts(per_product=0.026, per_entry=2.0, per_point=9.0)
"""`correlation_pyramid` and `volume_lookup`."""


@dataclass(frozen=True)
class LookupPlan:
    """The choice, its reason as a sentence with numbers, and the numbers."""

    kind: Literal["volume", "on_demand"]
    reason: str
    volume_bytes: int
    """The pyramid of volumes, float32."""
    on_demand_bytes: int
    """The pooled target features, float32."""
    free_bytes: int
    volume_s: float
    """Estimated time with the volume: building it and `iters` lookups."""
    on_demand_s: float
    """Estimated time of `iters` lookups on demand."""


def plan_lookup(
    batch: int,
    height: int,
    width: int,
    channels: int,
    iters: int,
    free_bytes: int,
    device_type: str = "cpu",
    radius: int = 4,
    num_levels: int = NUM_LEVELS,
    training: bool = False,
    costs: VolumeCosts = GATHERED,
) -> LookupPlan:
    """Choose between `correlation_pyramid` + `volume_lookup` and `correlation_lookup`.

    Args:
        height, width: of the feature maps (1/8 of the image in RAFT).
        iters: lookups made in one pair of maps.
        free_bytes: memory that is free on the device (`free_memory`).
        training: the backward pass holds a gradient of the volume beside it.
        costs: of the volume that would be built.

    The estimates are those of a CPU. On another device they weigh the same arithmetic, and memory decides first.

    Raises: ValueError for sizes or iters below 1.
    """
    for name, value in (
        ("batch", batch),
        ("height", height),
        ("width", width),
        ("channels", channels),
        ("iters", iters),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    queries, entries = batch * height * width, batch * (height * width) ** 2
    points = queries * num_levels * (2 * radius + 2) ** 2
    boxed = queries * sum(box_side(2 * radius + 2, level) ** 2 for level in range(num_levels))
    volume = volume_bytes(batch, height, width, num_levels)
    needed = volume * (TRAINING_COPIES if training else 1)
    volume_s = 1e-9 * (entries * (channels * costs.per_product + costs.per_entry) + iters * points * costs.per_point)
    on_demand_s = 1e-9 * iters * (boxed * channels * FORM_NS_PER_PRODUCT + points * FORM_NS_PER_POINT)
    kind, reason = _choose(needed, free_bytes, volume_s, on_demand_s, iters, (height, width), device_type)
    if device_type != "cpu":
        reason += f"; the estimates are a CPU's, nothing was measured on this {device_type} device"
    pooled = volume_bytes(1, height, width, num_levels) // (height * width) * batch * channels
    return LookupPlan(kind, reason, volume, pooled, free_bytes, volume_s, on_demand_s)


def free_memory(device: torch.device) -> int:
    """Bytes that a new tensor on this device may take.

    CUDA: free on the card plus what the caching allocator holds unused, private pools of CUDA graphs included, which
    callers that have some take off; asking is not allowed while one is recorded. CPU: what the system calls
    available, and no more than the control group's limit leaves; 4 GiB where neither can be read.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    candidates = [bytes_ for bytes_ in (_available_bytes(), _group_bytes()) if bytes_ is not None]
    return min(candidates, default=UNKNOWN_FREE_BYTES)


def _choose(
    needed: int, free_bytes: int, volume_s: float, on_demand_s: float, iters: int, size: tuple[int, int], device: str
) -> tuple[Literal["volume", "on_demand"], str]:
    maps = f"{size[0]}x{size[1]} maps"
    limit = int(VOLUME_SHARE * free_bytes)
    if needed > limit:
        return "on_demand", (
            f"on demand: the volume of {maps} needs {_size(needed)}, "
            f"more than {VOLUME_SHARE:.0%} of the {_size(free_bytes)} free on the {device}"
        )
    ratio = on_demand_s / volume_s
    work = f"{iters} iterations on {maps}"
    if ratio < 1:
        return "on_demand", (
            f"on demand: {work} are estimated at {ratio:.2f} of the time with the volume, "
            f"whose building alone multiplies {size[0] * size[1]} pixels with as many"
        )
    return "volume", (
        f"volume: {_size(needed)} fits in {VOLUME_SHARE:.0%} of the {_size(free_bytes)} free on the {device}, "
        f"and {work} on demand are estimated at {ratio:.2f} of its time"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_bytes() -> int | None:
    """What the control group (a container, a batch job) may still take; None where it has no limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        lines = (root / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    # File pages that nobody reads any more are given up as soon as memory is asked for.
    cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return None if limit == "max" else max(0, int(limit) - used + cached)
