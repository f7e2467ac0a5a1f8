"""Correlation lookup on a GPU as a torch operation with autograd: layouts, scratch memory, launches.

Shapes: B batch, H W query map, h w target map of one level, C channels, P = (2 radius + 1)^2, L levels.
"""

import itertools
import math
from typing import Any, NamedTuple

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
from kinema.kernels.correlation_lookup.forward import lookup_kernel, split_kernel
from kinema.kernels.correlation_lookup.geometry import Coords, Level, Map, Parts
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
    query_grad_warps,
)
from kinema.kernels.launch import launch, on_device


class PreparedMaps(NamedTuple):
    """Two maps as the kernels take them: made once, for all lookups between them."""

    queries: Tensor
    """[B, H, W, C], contiguous, channels in whole blocks."""
    targets: Tensor
    """[B, pixels, C], contiguous: the levels behind one another."""
    parts: list[Tensor]
    """Of float32: parts and scales of the queries, then of the targets (`forward.split_kernel`)."""
    sizes: list[int]
    """Height and width of each level, in turn."""
    channels: int
    """Before they were filled up."""
    precision: str


def prepare_maps(fmap1: Tensor, fmap2_pyramid: list[Tensor], precision: str = "float32") -> PreparedMaps:
    """Of maps [B, C, H, W] and [B, C, h, w]; differentiable."""
    missing = -fmap1.shape[1] % SMALLEST_BLOCK_C
    maps = [fmap.permute(0, 2, 3, 1) for fmap in (fmap1, *fmap2_pyramid)]
    if missing:
        # Zeros add nothing to a product, and kernels without masks on channels need fewer registers.
        maps = [F.pad(fmap, (0, missing)) for fmap in maps]
    queries, targets = maps[0].contiguous(), torch.cat([fmap.flatten(1, 2) for fmap in maps[1:]], dim=1)
    parts: list[Tensor] = []
    if queries.dtype == torch.float32:
        parts = [part for rows in (queries.flatten(1, 2), targets) for part in _split(rows.detach(), precision)]
    sizes = [side for fmap in fmap2_pyramid for side in fmap.shape[2:]]
    return PreparedMaps(queries, targets, parts, sizes, fmap1.shape[1], precision)


def lookup_forward(
    fmap1: Tensor,
    fmap2_pyramid: list[Tensor],
    coords: Tensor,
    radius: int,
    window_order: str,
    precision: str = "float32",
) -> Tensor:
    """[B, L P, H, W], float32, channels-last in memory; see `reference.correlation_lookup_reference`."""
    return lookup_prepared(prepare_maps(fmap1, fmap2_pyramid, precision), coords, radius, window_order)


def lookup_prepared(maps: PreparedMaps, coords: Tensor, radius: int, window_order: str) -> Tensor:
    """`lookup_forward` between prepared maps."""
    queries, targets, parts, sizes, channels, precision = maps
    return _lookup(queries, targets, parts, coords, sizes, channels, radius, window_order == "y_major", precision)


@torch.library.custom_op("kinema::correlation_split", mutates_args=())
def _split(rows: Tensor, precision: str) -> list[Tensor]:
    with on_device(rows):
        return split_rows(rows, precision)


@_split.register_fake
def _split_shape(rows, precision):  # type: ignore[no-untyped-def]
    B, pixels, C = rows.shape
    number = 2 if precision == "float32" else 1
    return [
        rows.new_empty(number, B, pixels, C, dtype=torch.float16),
        rows.new_empty(B, pixels, dtype=torch.float32),
    ]


@torch.library.custom_op("kinema::correlation_lookup", mutates_args=())
def _lookup(
    queries: Tensor,
    targets: Tensor,
    parts: list[Tensor],
    coords: Tensor,
    sizes: list[int],
    channels: int,
    radius: int,
    y_major: bool,
    precision: str,
) -> Tensor:
    with on_device(queries):
        maps = PreparedMaps(queries, targets, parts, sizes, channels, precision)
        return form_windows(maps, coords, radius, y_major)


@_lookup.register_fake
def _lookup_shape(queries, targets, parts, coords, sizes, channels, radius, y_major, precision):  # type: ignore[no-untyped-def]
    B, H, W, _ = queries.shape
    out = queries.new_empty(B, H, W, len(sizes) // 2 * (2 * radius + 1) ** 2, dtype=torch.float32)
    return out.permute(0, 3, 1, 2)


@torch.library.custom_op("kinema::correlation_lookup_backward", mutates_args=())
def _lookup_backward(
    grad: Tensor,
    queries: Tensor,
    targets: Tensor,
    coords: Tensor,
    sizes: list[int],
    channels: int,
    radius: int,
    y_major: bool,
    precision: str,
    needs_query: bool,
    needs_target: bool,
) -> list[Tensor]:
    """The gradient of the queries if it is needed, then that of the targets if that is."""
    with on_device(queries):
        maps = PreparedMaps(queries, targets, [], sizes, channels, precision)
        return form_gradients(grad, maps, coords, radius, y_major, needs_query, needs_target)


@_lookup_backward.register_fake
def _lookup_backward_shape(  # type: ignore[no-untyped-def]
    grad, queries, targets, coords, sizes, channels, radius, y_major, precision, needs_query, needs_target
):
    return [torch.empty_like(rows) for rows in [queries] * needs_query + [targets] * needs_target]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    queries, targets, parts, coords, *ctx.window = inputs
    ctx.num_parts = len(parts)
    ctx.save_for_backward(queries, targets, coords)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    queries, targets, coords = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    grads = list(_lookup_backward(grad, queries, targets, coords, *ctx.window, *needed))
    query_grad = grads.pop(0) if needed[0] else None
    return query_grad, grads[0] if needed[1] else None, [None] * ctx.num_parts, None, None, None, None, None, None


_lookup.register_autograd(_differentiate, setup_context=_save)


def split_rows(rows: Tensor, precision: str) -> list[Tensor]:
    """Pixels [B, pixels, C] as `forward.lookup_kernel` multiplies float32: parts in float16, and scales."""
    B, pixels, C = rows.shape
    number = 2 if precision == "float32" else 1
    parts = torch.empty(number, B, pixels, C, dtype=torch.float16, device=rows.device)
    scales = torch.empty(B, pixels, dtype=torch.float32, device=rows.device)
    launch(
        split_kernel,
        (triton.cdiv(pixels, SPLIT_PIXELS), B),
        *(rows, parts, scales, pixels, rows.numel(), C),
        PIXELS=SPLIT_PIXELS,
        CHANNELS=triton.next_power_of_2(C),
        LOW=number == 2,
        num_warps=4,
    )
    return [parts, scales]


def form_windows(maps: PreparedMaps, coords: Tensor, radius: int, y_major: bool) -> Tensor:
    """The lookup on the current device, in one launch."""
    B, H, W, C = maps.queries.shape
    coords, dtype, device = coords.float(), maps.queries.dtype, maps.queries.device
    heights, widths, firsts = _levels(maps.sizes)
    points = (2 * radius + 1) ** 2
    out = torch.empty(B, H, W, len(heights) * points, dtype=torch.float32, device=device)
    lattice = torch.empty(B, len(heights), H, W, (2 * radius + 2) ** 2, dtype=torch.float32, device=device)
    config = choose_config("lookup", dtype, None, device)
    block_y, block_x = block_of(config.blocks[0], None)
    launch(
        lookup_kernel,
        (_tiles(H, W), len(heights), B),
        *(_parts(maps.queries.flatten(1, 2), maps.parts[:2]), _parts(maps.targets, maps.parts[2:]), _coords(coords)),
        *(lattice, out, H, W, heights, widths, firsts, C, 1.0 / math.sqrt(maps.channels)),
        RADIUS=radius,
        LEVELS=len(heights),
        Y_MAJOR=y_major,
        TILE=TILE,
        BY=block_y,
        BX=block_x,
        BC=block_channels(C, config),
        **forward_types(dtype, maps.precision),
        ELEMENTS=ELEMENTS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out.permute(0, 3, 1, 2)


def form_gradients(
    grad: Tensor,
    maps: PreparedMaps,
    coords: Tensor,
    radius: int,
    y_major: bool,
    needs_query: bool,
    needs_target: bool,
) -> list[Tensor]:
    """`_lookup_backward` on the current device."""
    f1, coords = maps.queries, coords.float()
    grad, scale = grad.float().permute(0, 2, 3, 1).contiguous(), 1.0 / math.sqrt(maps.channels)
    B, H, W, C = f1.shape
    points, count = (2 * radius + 1) ** 2, H * W * (2 * radius + 2) ** 2
    lattice = torch.empty(B, count, dtype=torch.float32, device=f1.device)
    query_grad = torch.empty(B, H, W, C, dtype=torch.float32, device=f1.device) if needs_query else None
    target_grad = torch.empty_like(maps.targets) if needs_target else None
    for level, (h, w, first) in enumerate(zip(*_levels(maps.sizes), strict=True)):
        f2 = maps.targets[:, first : first + h * w].unflatten(1, (h, w))
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
            _add_query_grad(query_grad, lattice, f1, f2, coords, radius, level, maps.precision)
        if target_grad is not None:
            written = target_grad[:, first : first + h * w].unflatten(1, (h, w))
            _target_grad(written, lattice, f1, f2, coords, radius, level, maps.precision)
    grads = [] if query_grad is None else [query_grad.to(f1.dtype)]
    return grads if target_grad is None else [*grads, target_grad]


def _add_query_grad(
    total: Tensor, lattice: Tensor, f1: Tensor, f2: Tensor, coords: Tensor, radius: int, level: int, precision: str
) -> None:
    B, H, W, C = total.shape
    config = choose_config("query_grad", f2.dtype, level, f2.device)
    block_y, block_x = block_of(config.blocks[0], level)
    block_c = block_channels(C, config)
    launch(
        query_grad_kernel,
        (_tiles(H, W), C // block_c, B),
        *(lattice, _map(f2), _coords(coords), total, _level(f1, f2, level)),
        RADIUS=radius,
        TILE=TILE,
        BY=block_y,
        BX=block_x,
        BC=block_c,
        ADD=level > 0,
        **backward_types(f2.dtype, precision),
        num_warps=query_grad_warps(block_c, config),
        num_stages=config.num_stages,
    )


def _target_grad(
    grad: Tensor, lattice: Tensor, f1: Tensor, f2: Tensor, coords: Tensor, radius: int, level: int, precision: str
) -> None:
    """Writes the gradient of a level, [B, h, w, C]."""
    B, H, W, C = f1.shape
    h, w = f2.shape[1:3]
    num_tiles, sizes, centres = _tiles(H, W), _level(f1, f2, level), _coords(coords)
    boxes = torch.empty(B, num_tiles, 4, dtype=torch.int32, device=f1.device)
    launch(boxes_kernel, (num_tiles, B), centres, boxes, sizes, RADIUS=radius, TILE=TILE, num_warps=2)
    config = choose_config("target_grad", f1.dtype, level, f1.device)
    launch(
        target_grad_kernel,
        (_tiles(h, w), C // block_channels(C, config), B),
        *(lattice, _map(f1), centres, boxes, grad, grad.stride(0), sizes, num_tiles),
        RADIUS=radius,
        TILE=TILE,
        SCAN=SCAN,
        BC=block_channels(C, config),
        **backward_types(f1.dtype, precision),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _map(fmap: Tensor) -> Map:
    """Of a map [B, height, width, C] with contiguous channels."""
    return Map(fmap, *fmap.stride()[:3])


def _parts(rows: Tensor, parts: list[Tensor]) -> Parts:
    """Of pixels [B, pixels, C] as `lookup_kernel` takes them: float32 as float16 parts, other types as they are."""
    _, pixels, C = rows.shape
    if not parts:
        return Parts(rows, pixels * C, pixels)
    return Parts(parts[0], pixels * C, pixels, low=rows.numel(), scales=parts[1])


def _levels(sizes: list[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Heights, widths and first pixels of the levels."""
    heights, widths = tuple(sizes[::2]), tuple(sizes[1::2])
    firsts = tuple(itertools.accumulate((h * w for h, w in zip(heights, widths, strict=True)), initial=0))
    return heights, widths, firsts[:-1]


def _coords(coords: Tensor) -> Coords:
    return Coords(coords, *coords.stride())


def _level(f1: Tensor, f2: Tensor, level: int) -> Level:
    _, H, W, _ = f1.shape
    _, h, w, C = f2.shape
    return Level(H, W, h, w, C, 1.0 / 2**level)


def _tiles(height: int, width: int) -> int:
    return triton.cdiv(height, TILE) * triton.cdiv(width, TILE)
