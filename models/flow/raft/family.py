"""What RAFT, SMURF and SEA-RAFT share around their layers: checks of the inputs, and how correlations are looked up."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.correlation_lookup import (
    LookupPlan,
    correlation_pyramid,
    feature_pyramid,
    free_memory,
    lookup_into,
    plan_lookup,
    volume_lookup,
)
from kinema.kernels.correlation_lookup.planner import GATHERED, VolumeCosts
from kinema.kernels.correlation_lookup.window import WindowOrder
from kinema.models.cuda_graphs import idle_bytes
from kinema.models.flow.padding import grid_padding

FREE_BYTES_CPU = 8 * 2**30
"""Memory that lookups on a CPU are planned for. Fixed: the last bits of a result must not depend on what else runs."""
LOOKUPS = ("auto", "volume", "on_demand")
Lookup = Callable[[Tensor], Tensor]
"""From target positions [B, 2, H, W] to correlation windows [B, P, H, W]."""

_log = logging.getLogger(__name__)


@runtime_checkable
class Features(Protocol):
    """Features of some frames of one size, one row per frame."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images as given."""

    def __len__(self) -> int: ...


def check_lookup(lookup: str) -> None:
    """Raises: ValueError for a name that is not in LOOKUPS."""
    if lookup not in LOOKUPS:
        raise ValueError(f"lookup={lookup!r} is not one of {', '.join(map(repr, LOOKUPS))}")


def check_feature_pair(features1: Features, features2: Features) -> None:
    """Raises: ValueError unless both hold equally many frames of one size, at least one."""
    if len(features1) == 0:
        raise ValueError("features1 hold no frames: give at least one pair")
    if features1.size != features2.size or len(features1) != len(features2):
        raise ValueError(
            f"features1 hold {len(features1)} frames of {features1.size} and features2 "
            f"{len(features2)} of {features2.size}: numbers and sizes must agree"
        )


def matched_features(fmap: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Features in the precision in which they are looked up.

    What autocast gave in 16 bits stays so on a GPU: the lookup's kernels multiply it as it is and sum in float32, with
    half the memory and bytes. float32 elsewhere, as published.
    """
    return fmap if _multiplies_16_bits(fmap.device) else fmap.float()


def _multiplies_16_bits(device: torch.device) -> bool:
    return device.type == "cuda"


def padded_flow_init(
    flow_init: Float[Tensor, "_ _ _ _"], num_pairs: int, height: int, width: int
) -> Float[Tensor, "B 2 h w"]:
    """A first guess in 1/8 pixels, brought to the size of the padded maps.

    Args: height, width, of the images as the network sees them.
    Raises: ValueError unless it is [num_pairs, 2, ceil(height / 8), ceil(width / 8)].
    """
    expected = (num_pairs, 2, -(-height // 8), -(-width // 8))
    if tuple(flow_init.shape) != expected:
        raise ValueError(
            f"flow_init is {list(flow_init.shape)}; for images that the network sees at {height}x{width} it must be "
            f"{list(expected)} (1/8 of that size rounded up, values in 1/8 of its pixels)"
        )
    return grid_padding(height, width).pad(flow_init.float())


def choose_lookup(
    wanted: str,
    shape: Sequence[int],
    iters: int,
    device: torch.device,
    radius: int,
    costs: VolumeCosts = GATHERED,
) -> LookupPlan:
    """How maps of `shape` (B, C, H, W) are correlated: as `wanted`, one of LOOKUPS, or as planned for "auto"."""
    batch, channels, H, W = shape
    on_cpu = device.type == "cpu"
    plan = plan_lookup(
        batch,
        H,
        W,
        channels,
        iters,
        free_bytes=FREE_BYTES_CPU if on_cpu else _free_on(device),
        device_type="cpu (taken as fixed)" if on_cpu else device.type,
        radius=radius,
        training=torch.is_grad_enabled(),
        costs=costs,
    )
    if wanted == "volume":
        plan = replace(plan, kind="volume", reason="volume: lookup='volume' was asked for")
    elif wanted == "on_demand":
        plan = replace(plan, kind="on_demand", reason="on demand: lookup='on_demand' was asked for")
    _log.debug("%s", plan.reason)
    return plan


_last_free: dict[torch.device, int] = {}


def _free_on(device: torch.device) -> int:
    """Bytes free on a device other than a CPU, without what only graphs may use.

    While a CUDA graph is recorded the device is not asked: the last answer stands, which is that of the same function
    called just before, so that what is recorded is what was tried (models/cuda_graphs.py).
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing() and device in _last_free:
        return _last_free[device]
    _last_free[device] = free_memory(device) - idle_bytes(device)
    return _last_free[device]


def lookup_between(
    fmap1: Float[Tensor, "B C H W"],
    fmap2: Float[Tensor, "B C H W"],
    kind: Literal["volume", "on_demand"],
    radius: int,
    window_order: WindowOrder = "x_major",
) -> Lookup:
    """Windows of correlations of fmap1 with fmap2 and its halvings; with gradients, on any device."""
    if kind == "volume":
        # A product of 16-bit maps would be rounded to 16 bits.
        pyramid = correlation_pyramid(fmap1.float(), fmap2.float())
        return lambda coords: volume_lookup(pyramid, coords, radius, window_order)
    pooled = [level.to(fmap1.dtype) for level in feature_pyramid(fmap2.float())]
    return lookup_into(fmap1, pooled, radius, window_order=window_order)
