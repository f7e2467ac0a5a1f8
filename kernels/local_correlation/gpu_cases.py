"""What `make gpu` checks and times for local correlation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.kernels.gpu.cases import GpuCase, relative_error
from kinema.kernels.local_correlation import local_correlation
from kinema.kernels.local_correlation.reference import local_correlation_plain, local_correlation_reference

RADIUS = 4
DEVICE = "cuda"
# (B, C, H, W, dtype, channels-last): 1080p at 1/8, then DinoFlow's training batch (512x512 at 1/16).
SIZES = {
    "1080p fp16": ((4, 128, 135, 240, torch.float16, False), (4, 128, 135, 240, torch.float16, True)),
    "1080p fp32": ((4, 128, 135, 240, torch.float32, False),),
    "DinoFlow training": ((48, 256, 32, 32, torch.bfloat16, True),),
}
TOYS = (
    (1, 16, 9, 10, torch.float32, False),
    (2, 19, 8, 17, torch.float16, True),
    (1, 40, 12, 9, torch.bfloat16, True),
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Function = Callable[[Tensor, Tensor], Tensor]


def cases(what: str) -> Iterator[GpuCase]:
    """Forward, and forward with backward, at the sizes of one name."""
    for size in SIZES[what]:
        yield _case(*size, backward=False)
        yield _case(*size, backward=True)


def toys(argument: None) -> Iterator[GpuCase]:
    """Small shapes of every dtype: checked, not timed."""
    for size in TOYS:
        yield dataclasses.replace(_case(*size, backward=True), timed=False, baselines={})


def _case(B: int, C: int, H: int, W: int, dtype: torch.dtype, channels_last: bool, backward: bool) -> GpuCase:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(channels: int, kind: torch.dtype) -> Tensor:
        values = torch.randn(B, channels, H, W, device=DEVICE, generator=generator)
        return values.to(kind).contiguous(memory_format=memory_format)

    maps = [draw(C, dtype).requires_grad_(backward) for _ in range(2)]
    window = (2 * RADIUS + 1) ** 2
    weight = draw(window, torch.float32)
    # The strongest first, what takes long to compile last: baselines are measured while time is left.
    baselines: dict[str, Function] = {
        "localcorr, Triton, not divided": functools.partial(_localcorr, "localcorr_triton"),
        "localcorr, CUDA, not divided": functools.partial(_localcorr, "localcorr_cuda"),
        "banded matrix products": lambda a, b: local_correlation_reference(a, b, RADIUS),
        "unfold": _unfolded,
        "shifted multiply": lambda a, b: local_correlation_plain(a, b, RADIUS),
        "shifted multiply, compiled": torch.compile(lambda a, b: local_correlation_plain(a, b, RADIUS), dynamic=False),
    }
    map_bytes, window_bytes = maps[0].nbytes, weight.nbytes
    flops = 2.0 * B * C * H * W * window
    layout = "channels-last" if channels_last else "contiguous"
    kind = str(dtype).removeprefix("torch.")
    direction = "forward + backward" if backward else "forward"
    return GpuCase(
        name=f"B{B} C{C} {H}x{W} r{RADIUS} {kind} {layout} {direction}",
        ours=_call(_ours, maps, weight, backward),
        baselines={name: _call(function, maps, weight, backward) for name, function in baselines.items()},
        check=lambda: _errors(maps, weight, backward),
        tolerance=TOLERANCES[dtype],
        # Backward reads both maps and the gradient once more and writes two gradients.
        bytes_moved=2 * map_bytes + window_bytes + (4 * map_bytes + window_bytes if backward else 0),
        flops=flops * (3 if backward else 1),
        matrix_dtype=dtype,
    )


def _call(function: Function, maps: list[Tensor], weight: Tensor, backward: bool) -> Callable[[], Any]:
    if not backward:
        return lambda: function(maps[0], maps[1])

    weights: dict[torch.dtype, Tensor] = {}  # cast by the first call, which no timing counts

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = function(maps[0], maps[1])
        if out.dtype not in weights:
            weights[out.dtype] = weight.to(out.dtype)
        return torch.autograd.grad(out, maps, weights[out.dtype].view_as(out))

    return forward_and_backward


def _ours(fmap1: Tensor, fmap2: Tensor) -> Tensor:
    return local_correlation(fmap1, fmap2, RADIUS, impl="triton")


def _unfolded(fmap1: Tensor, fmap2: Tensor) -> Tensor:
    """Every window copied out; in the maps' own dtype, which is the kinder comparison."""
    B, C, H, W = fmap1.shape
    side = 2 * RADIUS + 1
    windows = F.unfold(fmap2, side, padding=RADIUS).view(B, C, side**2, H, W)
    return (fmap1.unsqueeze(2) * windows).sum(1, dtype=torch.float32) / C**0.5


def _localcorr(mode: str, fmap1: Tensor, fmap2: Tensor) -> Tensor:
    """PyPI's `localcorr`, which lays maps out itself, and does not divide by sqrt(C): one pass less than ours."""
    from localcorr import get_localcorr_sampler

    return get_localcorr_sampler(patch_size=2 * RADIUS + 1, corr_mode=mode)(fmap1, fmap2)


def _errors(maps: list[Tensor], weight: Tensor, backward: bool) -> dict[str, float]:
    """Of the result and the gradients, against the reference in float64; also: the same bytes twice."""
    exact_maps = [fmap.detach().double().requires_grad_(backward) for fmap in maps]
    exact = local_correlation_reference(exact_maps[0], exact_maps[1], RADIUS)
    found, again = (_ours(maps[0], maps[1]) for _ in range(2))
    if not torch.equal(found, again):
        raise AssertionError("the results differ between two runs")
    errors = {"out": relative_error(found.detach(), exact.detach())}
    if backward:
        grads, grads_again = (torch.autograd.grad(out, maps, weight) for out in (found, again))
        if not all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True)):
            raise AssertionError("the gradients differ between two runs")
        exact_grads = torch.autograd.grad(exact, exact_maps, weight.double())
        for name, a, b in zip(("gradient 1", "gradient 2"), grads, exact_grads, strict=True):
            errors[name] = relative_error(a, b)
    return errors
