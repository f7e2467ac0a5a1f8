"""Windows of a stored volume on a GPU, all levels in one launch, as a torch operation with autograd.

Shapes: B batch, H W query map, h w target map of a level, L levels, P = (2 radius + 1)^2, K = 2 radius + 2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kinema.kernels.correlation_lookup.geometry import Coords, level_of, window_of
from kinema.kernels.correlation_lookup.tuning import ELEMENTS
from kinema.kernels.launch import launch, on_device


@triton.jit
def stored_kernel(
    volumes,  # of each level [B, H W, h, w] float32, contiguous
    coords,
    out_ptr,  # [B, H, W, L P] float32, contiguous: written
    H,
    W,
    heights,  # of the levels
    widths,
    RADIUS: tl.constexpr,
    LEVELS: tl.constexpr,
    Y_MAJOR: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Windows of some queries at one level: bilinear, 0 outside the map."""
    k: tl.constexpr = 2 * RADIUS + 1
    number, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    level, _ = level_of(number, H, W, heights, widths, heights, 1, LEVELS)
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    query, point = element // (k * k), element % (k * k)
    known = query < H * W
    iy, ix = point % k, point // k
    if Y_MAJOR:
        iy, ix = ix, iy
    y0, x0, fy, fx, finite = window_of(coords, b, query // W, query % W, known, level, RADIUS)
    y, x = y0 + iy, x0 + ix
    up, down = known & (y >= 0) & (y < level.h), known & (y + 1 >= 0) & (y + 1 < level.h)
    left, right = (x >= 0) & (x < level.w), (x + 1 >= 0) & (x + 1 < level.w)
    offset = (b * (H * W) + query) * (level.h * level.w) + y * level.w + x
    for this in tl.static_range(LEVELS):
        if number == this:
            place = volumes[this] + offset
            upper = tl.load(place, mask=up & left, other=0.0) * (1.0 - fx)
            upper += tl.load(place + 1, mask=up & right, other=0.0) * fx
            lower = tl.load(place + level.w, mask=down & left, other=0.0) * (1.0 - fx)
            lower += tl.load(place + level.w + 1, mask=down & right, other=0.0) * fx
            value = tl.where(finite, upper * (1.0 - fy) + lower * fy, float("nan"))
            out = out_ptr + (b * (H * W) + query) * (LEVELS * k * k) + number * (k * k) + point
            tl.store(out, value, mask=known)


@triton.jit
def stored_grad_kernel(
    grad_ptr,  # [B, H, W, L P] float32, contiguous
    coords,
    grads,  # of each level [B, H W, h, w] float32, contiguous, zeros: written where windows lie
    H,
    W,
    heights,
    widths,
    RADIUS: tl.constexpr,
    LEVELS: tl.constexpr,
    Y_MAJOR: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """A lattice point of a query is a neighbour of up to four points of its window, and of no other query's."""
    K: tl.constexpr = 2 * RADIUS + 2
    k: tl.constexpr = 2 * RADIUS + 1
    number, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    level, _ = level_of(number, H, W, heights, widths, heights, 1, LEVELS)
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    query, point = element // (K * K), element % (K * K)
    known = query < H * W
    iy, ix = point // K, point % K
    y0, x0, fy, fx, finite = window_of(coords, b, query // W, query % W, known, level, RADIUS)
    y, x = y0 + iy, x0 + ix
    inside = known & finite & (y >= 0) & (y < level.h) & (x >= 0) & (x < level.w)
    step_y: tl.constexpr = k if Y_MAJOR else 1
    step_x: tl.constexpr = 1 if Y_MAJOR else k
    grad = grad_ptr + (b * (H * W) + query) * (LEVELS * k * k) + number * (k * k) + iy * step_y + ix * step_x
    up, down, left, right = inside & (iy < k), inside & (iy > 0), ix < k, ix > 0
    value = tl.load(grad, mask=up & left, other=0.0) * (1.0 - fy) * (1.0 - fx)
    value += tl.load(grad - step_x, mask=up & right, other=0.0) * (1.0 - fy) * fx
    value += tl.load(grad - step_y, mask=down & left, other=0.0) * fy * (1.0 - fx)
    value += tl.load(grad - step_y - step_x, mask=down & right, other=0.0) * fy * fx
    offset = (b * (H * W) + query) * (level.h * level.w) + y * level.w + x
    for this in tl.static_range(LEVELS):
        if number == this:
            tl.store(grads[this] + offset, value, mask=inside)


def stored_lookup(pyramid: list[Tensor], coords: Tensor, radius: int, window_order: str) -> Tensor:
    """`volume.volume_lookup` on a GPU, in one launch."""
    contiguous = [volume.float().contiguous() for volume in pyramid]
    return _lookup(contiguous, coords.detach().float(), radius, window_order == "y_major")


@torch.library.custom_op("kinema::volume_lookup", mutates_args=())
def _lookup(pyramid: list[Tensor], coords: Tensor, radius: int, y_major: bool) -> Tensor:
    with on_device(coords):
        return read_windows(pyramid, coords, radius, y_major)


@_lookup.register_fake
def _lookup_shape(pyramid, coords, radius, y_major):  # type: ignore[no-untyped-def]
    B, _, H, W = coords.shape
    return coords.new_empty(B, H, W, len(pyramid) * (2 * radius + 1) ** 2).permute(0, 3, 1, 2)


@torch.library.custom_op("kinema::volume_lookup_backward", mutates_args=())
def _lookup_backward(
    grad: Tensor, coords: Tensor, heights: list[int], widths: list[int], radius: int, y_major: bool
) -> list[Tensor]:
    with on_device(coords):
        return spread_gradient(grad, coords, heights, widths, radius, y_major)


@_lookup_backward.register_fake
def _lookup_backward_shape(grad, coords, heights, widths, radius, y_major):  # type: ignore[no-untyped-def]
    B, _, H, W = coords.shape
    return [coords.new_empty(B, H * W, h, w) for h, w in zip(heights, widths, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pyramid, coords, radius, y_major = inputs
    ctx.save_for_backward(coords)
    ctx.window = [v.shape[2] for v in pyramid], [v.shape[3] for v in pyramid], radius, y_major


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (coords,) = ctx.saved_tensors
    return _lookup_backward(grad, coords, *ctx.window), None, None, None


_lookup.register_autograd(_differentiate, setup_context=_save)


def read_windows(pyramid: list[Tensor], coords: Tensor, radius: int, y_major: bool) -> Tensor:
    """`_lookup` on the current device."""
    B, _, H, W = coords.shape
    points = (2 * radius + 1) ** 2
    out = torch.empty(B, H, W, len(pyramid) * points, dtype=torch.float32, device=coords.device)
    heights, widths = tuple(v.shape[2] for v in pyramid), tuple(v.shape[3] for v in pyramid)
    launch(
        stored_kernel,
        (triton.cdiv(H * W * points, ELEMENTS), len(pyramid), B),
        *(tuple(pyramid), Coords(coords, *coords.stride()), out, H, W, heights, widths),
        **_constants(pyramid, radius, y_major),
    )
    return out.permute(0, 3, 1, 2)


def spread_gradient(
    grad: Tensor, coords: Tensor, heights: list[int], widths: list[int], radius: int, y_major: bool
) -> list[Tensor]:
    """`_lookup_backward` on the current device."""
    B, _, H, W = coords.shape
    grads = [
        torch.zeros(B, H * W, h, w, dtype=torch.float32, device=coords.device)
        for h, w in zip(heights, widths, strict=True)
    ]
    grad = grad.float().permute(0, 2, 3, 1).contiguous()
    launch(
        stored_grad_kernel,
        (triton.cdiv(H * W * (2 * radius + 2) ** 2, ELEMENTS), len(grads), B),
        *(grad, Coords(coords, *coords.stride()), tuple(grads), H, W, tuple(heights), tuple(widths)),
        **_constants(grads, radius, y_major),
    )
    return grads


def _constants(levels: list[Tensor], radius: int, y_major: bool) -> dict[str, Any]:
    return {"RADIUS": radius, "LEVELS": len(levels), "Y_MAJOR": y_major, "ELEMENTS": ELEMENTS, "num_warps": 4}
