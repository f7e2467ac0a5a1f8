"""All-pairs correlation: the volume of every product of a pixel of frame 1 with a pixel of frame 2.

It costs 4 (H W)^2 bytes and is sampled at each refinement step, which pays off over several steps on small maps;
`correlation_lookup` gives the same numbers without it, `planner` chooses.

Shapes: B batch, C channels, H W query map, h w target map of a level, N = H W query pixels, L levels,
P = L (2 radius + 1)^2 window channels.

Source: Teed and Deng, "RAFT", arXiv:2003.12039, section 3.2; the published code divides by sqrt(C)
and orders the window with x as the outer axis, which is the default.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.correlation_lookup.window import (
    WindowOrder,
    accumulation_dtype,
    blend,
    check_maps,
    check_window,
    clamped_index,
    mark_not_finite,
    pixel_rows,
    positions,
    window_axis,
)
from kinema.kernels.dispatch import check_impl, use_triton, why_no_triton, without_autocast

NUM_LEVELS = 4
LARGEST_GRID = 65535
"""Programs along the second and third axis of a launch: CUDA programming guide."""


def feature_pyramid(fmap: Float[Tensor, "B C H W"], num_levels: int = NUM_LEVELS) -> list[Float[Tensor, "B C _ _"]]:
    """The map and its 2x2 average-pooled reductions; an odd last row or column is dropped.

    Raises: ValueError if the map is too small for `num_levels`.
    """
    smallest = 2 ** (num_levels - 1)
    if min(fmap.shape[-2:]) < smallest:
        raise ValueError(
            f"a map of {fmap.shape[-2]}x{fmap.shape[-1]} has no {num_levels} pyramid levels: "
            f"both sides must be at least {smallest}; pad the images or ask for fewer levels"
        )
    levels = [fmap]
    for _ in range(num_levels - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def correlation_volume(fmap1: Float[Tensor, "B C H W"], fmap2: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N h w"]:
    """Product of every pixel of fmap1 with every pixel of fmap2, divided by sqrt(C), float32 under autocast, too."""
    dtype = accumulation_dtype(fmap1)
    # Scaling the queries costs N C multiplications, scaling the products N^2.
    queries = pixel_rows(fmap1, dtype) * (1.0 / math.sqrt(fmap1.shape[1]))
    with without_autocast(fmap1):
        return (queries @ fmap2.to(dtype).flatten(2)).unflatten(2, fmap2.shape[-2:])


def correlation_pyramid(
    fmap1: Float[Tensor, "B C H W"], fmap2: Float[Tensor, "_ _ h w"], num_levels: int = NUM_LEVELS
) -> list[Float[Tensor, "B N _ _"]]:
    """The volume at every level: level 0 by products, the others by 2x2 average pooling of it.

    Raises: ValueError if the maps disagree in B or C, or are too small for `num_levels`.
    """
    check_maps(fmap1, [fmap2])
    return feature_pyramid(correlation_volume(fmap1, fmap2), num_levels)


def volume_bytes(batch: int, height: int, width: int, num_levels: int = NUM_LEVELS) -> int:
    """Bytes of the float32 pyramid of volumes between two maps of height x width."""
    return 4 * batch * height * width * sum((height >> k) * (width >> k) for k in range(num_levels))


def volume_lookup(
    pyramid: list[Float[Tensor, "B N _ _"]],
    coords: Float[Tensor, "B 2 H W"],
    radius: int,
    window_order: WindowOrder = "x_major",
    impl: str = "auto",
) -> Float[Tensor, "B P H W"]:
    """Windows of a correlation pyramid around `coords`, bilinear, 0 outside the target map.

    Args:
        pyramid: from `correlation_pyramid`; N = H W.
        coords: (x, y) in pixels of level 0, centres at integers; level k is read at coords / 2^k.
        radius: the window is 2 radius + 1 wide at each level.
        window_order: which axis of the window is the outer one.
        impl: "auto" takes the Triton kernel where it can run; "reference" and "triton" force one.

    Returns: [B, L (2 radius + 1)^2, H, W], float32, laid out channels-last in memory. Channels run
        over levels, then the outer axis, then the inner one; nan where coords are not finite.
    Gradients: to the pyramid; coords get none.
    """
    check_window(radius, window_order)
    check_impl(impl)
    if use_triton(impl, _why_not_triton(pyramid, coords)):
        # Imported where it runs: triton is not installed everywhere, and takes its time.
        from kinema.kernels.correlation_lookup.stored import stored_lookup

        return stored_lookup(pyramid, coords, radius, window_order)
    B, _, H, W = coords.shape
    points = coords.detach().permute(0, 2, 3, 1).reshape(B * H * W, 2).to(accumulation_dtype(pyramid[0]))
    windows = []
    for level, volume in enumerate(pyramid):
        h, w = volume.shape[-2:]
        x, y = window_axis(points[:, 0] / 2**level, w, radius), window_axis(points[:, 1] / 2**level, h, radius)
        side = 2 * radius + 2
        index = clamped_index(positions(y.first, side), positions(x.first, side), h, w)  # [B N, K K]
        lattice = volume.reshape(B * H * W, h * w).gather(1, index).view(-1, side, side)
        windows.append(blend(lattice, y, x, window_order))
    rows = mark_not_finite(torch.cat(windows, dim=1), points)
    return rows.view(B, H, W, -1).permute(0, 3, 1, 2)


def _why_not_triton(pyramid: list[Tensor], coords: Tensor) -> str | None:
    """A sentence that says why the kernel cannot read these volumes, or None."""
    reason = why_no_triton(*pyramid, coords)
    if reason is not None:
        return reason
    if pyramid[0].dtype == torch.float64:
        return "the volume is float64; the kernel computes in float32"
    B, _, H, W = coords.shape
    if 0 in (B, H, W) or B > LARGEST_GRID:
        return f"coords are {list(coords.shape)}; the kernel takes 1 to {LARGEST_GRID} items of at least one query"
    return None
