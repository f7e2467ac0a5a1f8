"""Local correlation on a GPU as torch operations with autograd: layouts and launches.

The operation is bilinear, so two operations that name each other as their gradients are enough, to any order: the
correlation (`forward.py`) and the sum over a window of features weighted per displacement (`backward.py`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kinema.kernels.launch import capability_of, launch, on_device
from kinema.kernels.local_correlation.backward import window_sum_kernel
from kinema.kernels.local_correlation.forward import correlate_kernel
from kinema.kernels.local_correlation.reference import memory_format_of
from kinema.kernels.local_correlation.tuning import SIDE, correlate_options, window_sum_options
from kinema.kernels.maps import map_of

ALIGNMENT = 16
"""Elements that strides must be multiples of for Triton to read several elements at once."""


def _empty_windows(fmap1: Tensor, radius: int) -> Tensor:
    shape = (fmap1.shape[0], (2 * radius + 1) ** 2, *fmap1.shape[2:])
    return torch.empty(shape, dtype=torch.float32, device=fmap1.device, memory_format=memory_format_of(fmap1))


def _empty_like(fmap: Tensor) -> Tensor:
    return torch.empty(fmap.shape, dtype=fmap.dtype, device=fmap.device, memory_format=memory_format_of(fmap))


def repacked(fmap: Tensor, radius: int) -> Tensor:
    """The map [B, C, H, W], or a channels-last copy with channels in whole 16s where that pays.

    It pays for 16-bit maps whose elements could only be read one at a time: those cost 2.3 times the issue cycles,
    more than a copy of both maps. float32 elements are read four at a time or one at a time for 1.3 times the cycles,
    less than a copy costs.
    """
    if fmap.element_size() > 2 or _reads_several(fmap, radius):
        return fmap
    missing = -fmap.shape[1] % ALIGNMENT
    return F.pad(fmap.permute(0, 2, 3, 1), (0, missing)).contiguous().permute(0, 3, 1, 2)


def _reads_several(fmap: Tensor, radius: int) -> bool:
    """Whether neighbouring elements lie in whole words: along channels, or along rows from `radius` pixels before."""
    along = 1 if fmap.stride(1) == 1 else 3
    others = [stride for axis, stride in enumerate(fmap.stride()) if axis != along]
    whole = fmap.shape[1] % ALIGNMENT == 0 if along == 1 else radius % 2 == 0
    return (
        whole
        and fmap.stride(along) == 1
        and all(stride % ALIGNMENT == 0 for stride in others)
        and fmap.data_ptr() % 16 == 0
    )


def _num_blocks(height: int, width: int) -> int:
    return -(-height // SIDE) * -(-width // SIDE)


def _is_wide(*tensors: Tensor) -> bool:
    """Whether places inside an item need more than 32 bits."""
    return any(
        sum(abs(stride) * (size + SIDE) for stride, size in zip(t.stride()[1:], t.shape[1:], strict=True)) >= 2**31
        for t in tensors
    )


@torch.library.custom_op("kinema::local_correlation", mutates_args=())
def _correlate(fmap1: Tensor, fmap2: Tensor, radius: int) -> Tensor:
    with on_device(fmap1):
        return correlate(fmap1, fmap2, radius)


def correlate(fmap1: Tensor, fmap2: Tensor, radius: int) -> Tensor:
    """The correlation on the current device."""
    out = _empty_windows(fmap1, radius)
    B, C, H, W = fmap1.shape
    if B == 0:
        return out
    maps = [repacked(fmap, radius) for fmap in (fmap1, fmap2)]
    # Channels that fill both maps up add nothing; those that fill one up meet no others.
    channels = min(fmap.shape[1] for fmap in maps)
    launch(
        correlate_kernel,
        (B * _num_blocks(H, W),),
        *(*map(map_of, (*maps, out)), H, W, C**-0.5),
        WIDE=_is_wide(*maps, out),
        **correlate_options(fmap1.dtype, channels, radius, capability_of(fmap1.device)),
    )
    return out


@torch.library.custom_op("kinema::local_correlation_window_sum", mutates_args=())
def _window_sum(weight: Tensor, fmap: Tensor, radius: int, mirrored: bool) -> Tensor:
    with on_device(fmap):
        return window_sum(weight, fmap, radius, mirrored)


def window_sum(weight: Tensor, fmap: Tensor, radius: int, mirrored: bool) -> Tensor:
    """The weighted sum on the current device."""
    out = _empty_like(fmap)
    B, C, H, W = fmap.shape
    if B == 0:
        return out
    features = repacked(fmap, radius)
    options = window_sum_options(fmap.dtype, features.shape[1], radius, capability_of(fmap.device))
    launch(
        window_sum_kernel,
        (B * _num_blocks(H, W) * options["NUM_BLOCKS_C"],),
        *(map_of(weight), map_of(features), map_of(out), H, W, C**-0.5),
        OUT_CHANNELS=C,
        MIRRORED=mirrored,
        WIDE=_is_wide(weight, features, out),
        **options,
    )
    return out


@_correlate.register_fake
def _(fmap1: Tensor, fmap2: Tensor, radius: int) -> Tensor:
    return _empty_windows(fmap1, radius)


@_window_sum.register_fake
def _(weight: Tensor, fmap: Tensor, radius: int, mirrored: bool) -> Tensor:
    return _empty_like(fmap)


def _keep_maps(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    fmap1, fmap2, ctx.radius = inputs
    ctx.save_for_backward(fmap1, fmap2)


def _correlate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    fmap1, fmap2 = ctx.saved_tensors
    grad1 = _window_sum(grad, fmap2, ctx.radius, False) if ctx.needs_input_grad[0] else None
    grad2 = _window_sum(grad, fmap1, ctx.radius, True) if ctx.needs_input_grad[1] else None
    return grad1, grad2, None


def _keep_weight_and_map(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
    weight, fmap, ctx.radius, ctx.mirrored = inputs
    ctx.save_for_backward(weight, fmap)


def _window_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    weight, fmap = ctx.saved_tensors
    grad_weight = grad_fmap = None
    if ctx.needs_input_grad[0]:
        pair = (fmap, grad) if ctx.mirrored else (grad, fmap)
        grad_weight = _correlate(*pair, ctx.radius)
    if ctx.needs_input_grad[1]:
        grad_fmap = _window_sum(weight, grad, ctx.radius, not ctx.mirrored)
    return grad_weight, grad_fmap, None, None


_correlate.register_autograd(_correlate_backward, setup_context=_keep_maps)
_window_sum.register_autograd(_window_sum_backward, setup_context=_keep_weight_and_map)


def local_correlation_triton(
    fmap1: Float[Tensor, "B C H W"], fmap2: Float[Tensor, "B C H W"], radius: int
) -> Float[Tensor, "B P H W"]:
    """`reference.local_correlation_plain` by the kernels; arguments are checked by the caller."""
    return _correlate(fmap1, fmap2, radius)
