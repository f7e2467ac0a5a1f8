"""What `make gpu` checks and times for local correlation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.kernels.gpu import GpuCase
from kinema.kernels.local_correlation import local_correlation
from kinema.kernels.local_correlation.reference import local_correlation_plain, local_correlation_reference

RADIUS = 4
# (B, C, H, W, dtype, channels-last): 1080p at 1/8, then DinoFlow's training batch (512x512 at 1/16).
SIZES = (
    (4, 128, 135, 240, torch.float16, False),
    (4, 128, 135, 240, torch.float16, True),
    (4, 128, 135, 240, torch.bfloat16, True),
    (4, 128, 135, 240, torch.float32, False),
    (48, 256, 32, 32, torch.bfloat16, True),
)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Function = Callable[[Tensor, Tensor], Tensor]


def cases() -> Iterator[GpuCase]:
    """Forward, and forward with backward, at each size."""
    for size in SIZES:
        yield _case(*size, backward=False)
        yield _case(*size, backward=True)


def _case(B: int, C: int, H: int, W: int, dtype: torch.dtype, channels_last: bool, backward: bool) -> GpuCase:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(channels: int, kind: torch.dtype) -> Tensor:
        values = torch.randn(B, channels, H, W, device="cuda", generator=generator)
        return values.to(kind).contiguous(memory_format=memory_format)

    maps = [draw(C, dtype).requires_grad_(backward) for _ in range(2)]
    window = (2 * RADIUS + 1) ** 2
    weight = draw(window, torch.float32)
    # Otherwise shapes of earlier cases count as recompilations, of which torch.compile allows few.
    torch._dynamo.reset()
    baselines: dict[str, Function] = {
        "shifted multiply, compiled": torch.compile(lambda a, b: local_correlation_plain(a, b, RADIUS), dynamic=False),
        "shifted multiply": lambda a, b: local_correlation_plain(a, b, RADIUS),
        "banded matrix products": lambda a, b: local_correlation_reference(a, b, RADIUS),
        "unfold": _unfolded,
        "localcorr": _localcorr,
    }
    map_bytes, window_bytes = maps[0].nbytes, weight.nbytes
    flops = 2.0 * B * C * H * W * window
    layout = "channels-last" if channels_last else "contiguous"
    kind = str(dtype).removeprefix("torch.")
    direction = "forward + backward" if backward else "forward"
    return GpuCase(
        name=f"local_correlation B{B} C{C} {H}x{W} r{RADIUS} {kind} {layout} {direction}",
        ours=_call(_ours, maps, weight, backward),
        baselines={name: _call(function, maps, weight, backward) for name, function in baselines.items()},
        check=lambda: _relative_error(maps, weight, backward),
        tolerance=TOLERANCES[dtype],
        # Backward reads both maps and the gradient once more and writes two gradients.
        bytes_moved=2 * map_bytes + window_bytes + (4 * map_bytes + window_bytes if backward else 0),
        flops=flops * (3 if backward else 1),
        matrix_dtype=dtype,
    )


def _call(function: Function, maps: list[Tensor], weight: Tensor, backward: bool) -> Callable[[], Any]:
    if not backward:
        return lambda: function(maps[0], maps[1])

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = function(maps[0], maps[1])
        return torch.autograd.grad(out, maps, weight.view_as(out).to(out.dtype))

    return forward_and_backward


def _ours(fmap1: Tensor, fmap2: Tensor) -> Tensor:
    return local_correlation(fmap1, fmap2, RADIUS, impl="triton")


def _unfolded(fmap1: Tensor, fmap2: Tensor) -> Tensor:
    """Every window copied out; in the maps' own dtype, which is the kinder comparison."""
    B, C, H, W = fmap1.shape
    side = 2 * RADIUS + 1
    windows = F.unfold(fmap2, side, padding=RADIUS).view(B, C, side**2, H, W)
    return (fmap1.unsqueeze(2) * windows).sum(1, dtype=torch.float32) / C**0.5


def _localcorr(fmap1: Tensor, fmap2: Tensor) -> Tensor:
    """PyPI's `localcorr`, which does not divide by sqrt(C): one pass less than ours has to do."""
    from localcorr import get_localcorr_sampler

    if fmap1.dtype == torch.bfloat16:
        raise NotImplementedError("it takes no bfloat16")
    sampler = get_localcorr_sampler(patch_size=2 * RADIUS + 1, corr_mode="localcorr_triton")
    try:
        return sampler(fmap1.contiguous(), fmap2.contiguous())
    except (TypeError, ValueError) as problem:
        raise NotImplementedError(str(problem)) from problem


def _relative_error(maps: list[Tensor], weight: Tensor, backward: bool) -> float:
    """Of the result, or of the worse gradient, against the reference in float64; also: the same bytes twice."""
    exact_maps = [fmap.detach().double().requires_grad_(backward) for fmap in maps]
    exact = local_correlation_reference(exact_maps[0], exact_maps[1], RADIUS)
    found, again = (_ours(maps[0], maps[1]) for _ in range(2))
    pairs = [(found, exact)]
    if backward:
        grads, grads_again = (torch.autograd.grad(out, maps, weight) for out in (found, again))
        if not all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True)):
            raise AssertionError("the gradients differ between two runs")
        pairs += zip(grads, torch.autograd.grad(exact, exact_maps, weight.double()), strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
