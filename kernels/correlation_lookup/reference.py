"""Correlation between two feature maps and its windowed bilinear lookup, in plain PyTorch.

Two ways to the same numbers. The volume holds every product of a pixel of frame 1 with a pixel of
frame 2 and is sampled at each refinement step; it costs 4 (H W)^2 bytes and pays off over several
steps on small maps. On demand, the products are formed for the windows alone, from average-pooled
feature maps: pooling commutes with the dot product, so the result is the same up to rounding.

Shapes: B batch, C channels, H W query map, h w target map of a level, N = H W query pixels,
K = 2 radius + 2 lattice points per axis, L levels.

Source: Teed and Deng, "RAFT", arXiv:2003.12039, section 3.2; the published code divides by sqrt(C)
and orders the window with x as the outer axis, which is kept.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

NUM_LEVELS = 4
ON_DEMAND_CHUNK_BYTES = 256 * 2**20


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
    """Dot product of every pixel of fmap1 with every pixel of fmap2, divided by sqrt(C), float32."""
    return (_queries(fmap1) @ fmap2.float().flatten(2)).unflatten(2, fmap2.shape[-2:])


def correlation_pyramid(
    fmap1: Float[Tensor, "B C H W"], fmap2: Float[Tensor, "_ _ h w"], num_levels: int = NUM_LEVELS
) -> list[Float[Tensor, "B N _ _"]]:
    """The volume at every level: level 0 by products, the others by 2x2 average pooling of it.

    Raises: ValueError if the maps disagree in B or C, or are too small for `num_levels`.
    """
    _check_maps(fmap1, [fmap2])
    return feature_pyramid(correlation_volume(fmap1, fmap2), num_levels)


def volume_bytes(batch: int, height: int, width: int, num_levels: int = NUM_LEVELS) -> int:
    """Bytes of the float32 pyramid of volumes between two maps of height x width."""
    return 4 * batch * height * width * sum((height >> k) * (width >> k) for k in range(num_levels))


def volume_lookup(
    pyramid: list[Float[Tensor, "B N _ _"]], coords: Float[Tensor, "B 2 H W"], radius: int
) -> Float[Tensor, "B P H W"]:
    """Windows of a correlation pyramid around `coords`, bilinear, 0 outside the target map.

    Args:
        pyramid: from `correlation_pyramid`; N = H W.
        coords: (x, y) in pixels of level 0, centres at integers; level k is read at coords / 2^k.
        radius: the window is 2 radius + 1 wide at each level.

    Returns: [B, L (2 radius + 1)^2, H, W], float32, laid out channels-last in memory. Channels run
        over levels, then x, then y.
    """
    B, _, H, W = coords.shape
    points = coords.permute(0, 2, 3, 1).reshape(B * H * W, 2).float()
    windows = []
    for level, volume in enumerate(pyramid):
        h, w = volume.shape[-2:]
        x, weights_x = _axis_window(points[:, 0] / 2**level, w, radius)
        y, weights_y = _axis_window(points[:, 1] / 2**level, h, radius)
        index = (y.unsqueeze(2) * w + x.unsqueeze(1)).flatten(1)  # [B N, K K]
        lattice = volume.reshape(B * H * W, h * w).gather(1, index).view(-1, *y.shape[1:], x.shape[1])
        windows.append(_blend(lattice, weights_x, weights_y))
    return torch.cat(windows, dim=1).view(B, H, W, -1).permute(0, 3, 1, 2)


def correlation_lookup_reference(
    fmap1: Float[Tensor, "B C H W"],
    fmap2_pyramid: list[Float[Tensor, "_ _ _ _"]],
    coords: Float[Tensor, "_ 2 _ _"],
    radius: int,
) -> Float[Tensor, "B P H W"]:
    """Correlation of each pixel with a window around its target, at every pyramid level, on demand.

    Args:
        fmap1: query features.
        fmap2_pyramid: target features, level k average-pooled k times (`feature_pyramid`).
        coords: (x, y) in pixels of fmap2_pyramid[0], centres at integers; level k is read at
            coords / 2^k.
        radius: the window is 2 radius + 1 wide at each level.

    Returns: [B, L (2 radius + 1)^2, H, W], float32: dot products divided by sqrt(C), bilinear between
        pixels, 0 outside the target map. Channels run over levels, then x, then y.
    Raises: ValueError if the maps disagree in B or C, or coords in B, H or W.
    Source: Teed and Deng, arXiv:2003.12039, section 3.2. Deviations: none.
    """
    _check_maps(fmap1, fmap2_pyramid, coords)
    B, C, H, W = fmap1.shape
    queries = _queries(fmap1)
    points = coords.flatten(2).transpose(1, 2).float()  # [B, N, 2]
    chunk = max(1, ON_DEMAND_CHUNK_BYTES // (4 * C * (2 * radius + 2) ** 2))
    targets = [fmap2.float().flatten(2).transpose(1, 2).contiguous() for fmap2 in fmap2_pyramid]
    rows = []
    for b in range(B):
        for start in range(0, H * W, chunk):
            part = slice(start, start + chunk)
            levels = [
                _window_products(queries[b, part], target[b], fmap2.shape[-2:], points[b, part] / 2**k, radius)
                for k, (target, fmap2) in enumerate(zip(targets, fmap2_pyramid, strict=True))
            ]
            rows.append(torch.cat(levels, dim=1))
    return torch.cat(rows, dim=0).view(B, H, W, -1).permute(0, 3, 1, 2)


def _queries(fmap1: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N C"]:
    """Pixels of fmap1 as rows; scaling them costs N C multiplications, scaling the products N^2."""
    return fmap1.float().flatten(2).transpose(1, 2) * (1.0 / math.sqrt(fmap1.shape[1]))


def _window_products(
    queries: Float[Tensor, "n C"],
    target: Float[Tensor, "hw C"],
    size: torch.Size,
    points: Float[Tensor, "n 2"],
    radius: int,
) -> Float[Tensor, "n P"]:
    """Bilinear window of query-target products for some query pixels at one level."""
    h, w = size
    x, weights_x = _axis_window(points[:, 0], w, radius)
    y, weights_y = _axis_window(points[:, 1], h, radius)
    index = (y.unsqueeze(2) * w + x.unsqueeze(1)).flatten(1)  # [n, K K]
    features = target[index.flatten()].view(*index.shape, -1)  # [n, K K, C]
    lattice = torch.bmm(features, queries.unsqueeze(2)).view(-1, *y.shape[1:], x.shape[1])
    return _blend(lattice, weights_x, weights_y)


def _axis_window(
    centre: Float[Tensor, "n"], size: int, radius: int
) -> tuple[Int[Tensor, "n K"], tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]]:
    """Lattice positions of a window along one axis, and the weights of the left and right neighbour.

    All points of a window share one fraction, so K = 2 radius + 2 lattice values give the
    k = 2 radius + 1 interpolated ones. Positions outside [0, size) are clamped for the gather and get
    weight 0, which is what zero padding means.
    """
    lower = centre.floor()
    fraction = (centre - lower).unsqueeze(1)
    steps = torch.arange(-radius, radius + 2, device=centre.device)
    # Clamped before the cast: a coordinate far outside does not fit an integer.
    first = lower.detach().clamp(-radius - 2, size + radius + 1).nan_to_num(0.0).long()
    position = first.unsqueeze(1) + steps
    inside = (position >= 0) & (position < size)
    left = (1.0 - fraction) * inside[:, :-1]
    right = fraction * inside[:, 1:]
    return position.clamp(0, size - 1), (left, right)


def _blend(
    lattice: Float[Tensor, "n Ky Kx"],
    weights_x: tuple[Float[Tensor, "n kx"], Float[Tensor, "n kx"]],
    weights_y: tuple[Float[Tensor, "n ky"], Float[Tensor, "n ky"]],
) -> Float[Tensor, "n P"]:
    """Interpolates lattice values along x, then y; flattens with x as the outer axis."""
    left, right = (weight.unsqueeze(1) for weight in weights_x)
    rows = torch.addcmul(lattice[:, :, :-1] * left, lattice[:, :, 1:], right)  # [n, Ky, kx]
    upper, lower = (weight.unsqueeze(2) for weight in weights_y)
    window = torch.addcmul(rows[:, :-1] * upper, rows[:, 1:], lower)  # [n, ky, kx]
    return window.transpose(1, 2).flatten(1)


def _check_maps(fmap1: Tensor, fmap2_pyramid: list[Tensor], coords: Tensor | None = None) -> None:
    for level, fmap2 in enumerate(fmap2_pyramid):
        if fmap1.shape[:2] != fmap2.shape[:2]:
            raise ValueError(
                f"fmap1 is {list(fmap1.shape)} and fmap2 at level {level} is {list(fmap2.shape)}: "
                "batch size and channels must agree"
            )
    if coords is not None and (coords.shape[0], *coords.shape[2:]) != (fmap1.shape[0], *fmap1.shape[2:]):
        raise ValueError(
            f"coords is {list(coords.shape)} and fmap1 is {list(fmap1.shape)}: "
            "there must be one (x, y) per pixel of fmap1"
        )
