"""Correlation lookup on a GPU as a torch operation with autograd: layouts, scratch memory, launches.

Shapes: B batch, H W query map, h w target map of one level, C channels, P = (2 radius + 1)^2, L levels.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kinema.kernels.correlation_lookup.backward import (
    boxes_kernel,
    query_grad_kernel,
    target_grad_kernel,
    unblend_kernel,
)
from kinema.kernels.correlation_lookup.forward import blend_kernel, form_kernel, split_kernel
from kinema.kernels.correlation_lookup.geometry import Coords, Level, Map
from kinema.kernels.correlation_lookup.tuning import (
    ELEMENTS,
    SCAN,
    SMALLEST_BLOCK_C,
    SPLIT_PIXELS,
    TILE,
    backward_types,
    block_channels,
    block_of,
    choose_config,
    forward_types,
)
from kinema.kernels.launch import launch, on_device


def lookup_forward(
    fmap1: Tensor, fmap2_pyramid: list[Tensor], coords: Tensor, radius: int, window_order: str
) -> Tensor:
    """[B, L P, H, W], float32, channels-last in memory; see `reference.correlation_lookup_reference`."""
    return _lookup(fmap1, fmap2_pyramid, coords, radius, window_order == "y_major")


@torch.library.custom_op("kinema::correlation_lookup", mutates_args=())
def _lookup(fmap1: Tensor, pyramid: list[Tensor], coords: Tensor, radius: int, y_major: bool) -> Tensor:
    with on_device(fmap1):
        return form_windows(fmap1, pyramid, coords, radius, y_major)


@_lookup.register_fake
def _lookup_shape(fmap1, pyramid, coords, radius, y_major):  # type: ignore[no-untyped-def]
    B, _, H, W = fmap1.shape
    out = fmap1.new_empty(B, H, W, len(pyramid) * (2 * radius + 1) ** 2, dtype=torch.float32)
    return out.permute(0, 3, 1, 2)


@torch.library.custom_op("kinema::correlation_lookup_backward", mutates_args=())
def _lookup_backward(
    grad: Tensor,
    fmap1: Tensor,
    pyramid: list[Tensor],
    coords: Tensor,
    radius: int,
    y_major: bool,
    needs_query: bool,
    needs_target: bool,
) -> list[Tensor]:
    """The gradient of fmap1 if it is needed, then those of all levels if one is needed."""
    with on_device(fmap1):
        return form_gradients(grad, fmap1, pyramid, coords, radius, y_major, needs_query, needs_target)


@_lookup_backward.register_fake
def _lookup_backward_shape(grad, fmap1, pyramid, coords, radius, y_major, needs_query, needs_target):  # type: ignore[no-untyped-def]
    maps = [fmap1] * needs_query + list(pyramid) * needs_target
    return [fmap.new_empty(fmap.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) for fmap in maps]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    fmap1, pyramid, coords, radius, y_major = inputs
    ctx.save_for_backward(fmap1, coords, *pyramid)
    ctx.window = radius, y_major


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    fmap1, coords, *pyramid = ctx.saved_tensors
    needs_query, needs_target = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1])
    grads = list(_lookup_backward(grad, fmap1, pyramid, coords, *ctx.window, needs_query, needs_target))
    query_grad = grads.pop(0) if needs_query else None
    return query_grad, grads if needs_target else [None] * len(pyramid), None, None, None


_lookup.register_autograd(_differentiate, setup_context=_save)


def form_windows(fmap1: Tensor, pyramid: list[Tensor], coords: Tensor, radius: int, y_major: bool) -> Tensor:
    """The lookup on the current device."""
    f1, levels, coords = _prepare(fmap1, pyramid, coords)
    B, H, W, C = f1.shape
    points, scale = (2 * radius + 1) ** 2, 1.0 / math.sqrt(fmap1.shape[1])
    out = torch.empty(B, H, W, len(levels) * points, dtype=torch.float32, device=f1.device)
    lattice = torch.empty(B, H, W, (2 * radius + 2) ** 2, dtype=torch.float32, device=f1.device)
    centres, count = _coords(coords), H * W * points
    queries = _parts(f1)
    for level, f2 in enumerate(levels):
        config, sizes = choose_config("form", f1.dtype, level, f1.device), _level(f1, f2, level)
        block_y, block_x = block_of(config.blocks[0], level)
        launch(
            form_kernel,
            (_tiles(H, W), B),
            *(queries, _parts(f2), centres, lattice, sizes),
            RADIUS=radius,
            TILE=TILE,
            BY=block_y,
            BX=block_x,
            BC=block_channels(C, config),
            **forward_types(f1.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        launch(
            blend_kernel,
            (triton.cdiv(count, ELEMENTS), B),
            *(lattice, centres, out[..., level * points :], sizes, scale, count, out.shape[-1]),
            RADIUS=radius,
            Y_MAJOR=y_major,
            ELEMENTS=ELEMENTS,
            num_warps=4,
        )
    return out.permute(0, 3, 1, 2)


def form_gradients(
    grad: Tensor,
    fmap1: Tensor,
    pyramid: list[Tensor],
    coords: Tensor,
    radius: int,
    y_major: bool,
    needs_query: bool,
    needs_target: bool,
) -> list[Tensor]:
    """`_lookup_backward` on the current device."""
    f1, levels, coords = _prepare(fmap1, pyramid, coords)
    grad, scale = _channels_last(grad.float()), 1.0 / math.sqrt(fmap1.shape[1])
    B, H, W, C = f1.shape
    points, count = (2 * radius + 1) ** 2, H * W * (2 * radius + 2) ** 2
    lattice = torch.empty(B, count, dtype=torch.float32, device=f1.device)
    query_grad = torch.empty(B, H, W, C, dtype=torch.float32, device=f1.device) if needs_query else None
    grads = []
    for level, f2 in enumerate(levels):
        launch(
            unblend_kernel,
            (triton.cdiv(count, ELEMENTS), B),
            *(grad[..., level * points :], _coords(coords), lattice, _level(f1, f2, level), scale),
            *(count, grad.shape[-1]),
            RADIUS=radius,
            Y_MAJOR=y_major,
            ELEMENTS=ELEMENTS,
            num_warps=4,
        )
        if query_grad is not None:
            _add_query_grad(query_grad, lattice, f1, f2, coords, radius, level)
        if needs_target:
            grads.append(_target_grad(lattice, f1, f2, coords, radius, level))
    if query_grad is not None:
        grads.insert(0, query_grad.to(f1.dtype))
    return [rows[..., : fmap1.shape[1]].contiguous().permute(0, 3, 1, 2) for rows in grads]


def _add_query_grad(
    total: Tensor, lattice: Tensor, f1: Tensor, f2: Tensor, coords: Tensor, radius: int, level: int
) -> None:
    B, H, W, C = total.shape
    config = choose_config("query_grad", f2.dtype, level, f2.device)
    block_y, block_x = block_of(config.blocks[0], level)
    launch(
        query_grad_kernel,
        (_tiles(H, W), C // block_channels(C, config), B),
        *(lattice, _map(f2), _coords(coords), total, _level(f1, f2, level)),
        RADIUS=radius,
        TILE=TILE,
        BY=block_y,
        BX=block_x,
        BC=block_channels(C, config),
        ADD=level > 0,
        **backward_types(f2.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _target_grad(lattice: Tensor, f1: Tensor, f2: Tensor, coords: Tensor, radius: int, level: int) -> Tensor:
    """[B, h, w, C]."""
    B, H, W, C = f1.shape
    h, w = f2.shape[1:3]
    num_tiles, sizes, centres = _tiles(H, W), _level(f1, f2, level), _coords(coords)
    boxes = torch.empty(B, num_tiles, 4, dtype=torch.int32, device=f1.device)
    launch(boxes_kernel, (num_tiles, B), centres, boxes, sizes, RADIUS=radius, TILE=TILE, num_warps=2)
    grad = torch.empty(B, h, w, C, dtype=f2.dtype, device=f2.device)
    config = choose_config("target_grad", f1.dtype, level, f1.device)
    launch(
        target_grad_kernel,
        (_tiles(h, w), C // block_channels(C, config), B),
        *(lattice, _map(f1), centres, boxes, grad, sizes, num_tiles),
        RADIUS=radius,
        TILE=TILE,
        SCAN=SCAN,
        BC=block_channels(C, config),
        **backward_types(f1.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return grad


def _prepare(fmap1: Tensor, pyramid: list[Tensor], coords: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Maps as [B, H, W, C] with contiguous channels in whole blocks, without a copy where they are so already."""
    missing = -fmap1.shape[1] % SMALLEST_BLOCK_C
    maps = [_channels_last(fmap) for fmap in (fmap1, *pyramid)]
    if missing:
        # Zeros add nothing to a product, and kernels without masks on channels need fewer registers.
        maps = [F.pad(fmap, (0, missing)) for fmap in maps]
    return maps[0], maps[1:], coords.float()


def _map(fmap: Tensor) -> Map:
    """Of a map [B, height, width, C] with contiguous channels."""
    return Map(fmap, *fmap.stride()[:3])


def _parts(fmap: Tensor) -> Map:
    """Of a map as `form_kernel` takes it: float32 as two float16, other types as they are."""
    if fmap.dtype != torch.float32:
        return _map(fmap)
    B, h, w, C = fmap.shape
    parts = torch.empty(2, B, h, w, C, dtype=torch.float16, device=fmap.device)
    scales = torch.empty(B, h, w, dtype=torch.float32, device=fmap.device)
    launch(
        split_kernel,
        (triton.cdiv(h * w, SPLIT_PIXELS), B),
        *(_map(fmap), parts, scales, w, h * w, fmap.numel(), C),
        PIXELS=SPLIT_PIXELS,
        CHANNELS=triton.next_power_of_2(C),
        num_warps=4,
    )
    _, b, y, x = parts.stride()[:4]
    return Map(parts, b, y, x, low=fmap.numel(), scales=scales)


def _coords(coords: Tensor) -> Coords:
    return Coords(coords, *coords.stride())


def _level(f1: Tensor, f2: Tensor, level: int) -> Level:
    _, H, W, _ = f1.shape
    _, h, w, C = f2.shape
    return Level(H, W, h, w, C, 1.0 / 2**level)


def _channels_last(fmap: Tensor) -> Tensor:
    return fmap.permute(0, 2, 3, 1).contiguous()


def _tiles(height: int, width: int) -> int:
    return triton.cdiv(height, TILE) * triton.cdiv(width, TILE)
