"""What `make gpu` checks and times for convex upsampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kinema.kernels.convex_upsampling import convex_upsample
from kinema.kernels.convex_upsampling.reference import convex_upsample_reference
from kinema.kernels.gpu.cases import GpuCase, relative_error

DEVICE = "cuda"
# (B, C, H, W, factor, dtype of the logits): RAFT at 1080p; a training batch of 368 x 496; WAFT at half the size.
SIZES = (
    (2, 2, 135, 240, 8, torch.float32),
    (2, 2, 135, 240, 8, torch.bfloat16),
    (12, 2, 46, 62, 8, torch.float32),
    (1, 6, 270, 480, 2, torch.bfloat16),
)
TOYS = ((2, 2, 5, 37, 8, torch.float32), (1, 6, 3, 9, 2, torch.bfloat16))
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def cases(argument: None) -> Iterator[GpuCase]:
    """Toys, then forward, and forward with backward, at every size."""
    yield from toys(None)
    for size in SIZES:
        yield _case(*size, backward=False)
        yield _case(*size, backward=True)


def toys(argument: None) -> Iterator[GpuCase]:
    """Small shapes: checked, not timed."""
    for size in TOYS:
        yield dataclasses.replace(_case(*size, backward=True), timed=False, baselines={})


def _case(B: int, C: int, H: int, W: int, factor: int, dtype: torch.dtype, backward: bool) -> GpuCase:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    maps = draw(B, C, H, W).requires_grad_(backward)
    logits = (8 * draw(B, 9 * factor**2, H, W)).to(dtype).contiguous(memory_format=torch.channels_last)
    logits.requires_grad_(backward)
    weight = draw(B, C, factor * H, factor * W)
    compiled = torch.compile(convex_upsample_reference, dynamic=False)
    bytes_once = logits.nbytes + maps.nbytes + weight.nbytes
    kind = str(dtype).removeprefix("torch.")
    direction = "forward + backward" if backward else "forward"
    return GpuCase(
        name=f"B{B} C{C} {H}x{W} f{factor} {kind} {direction}",
        ours=_call(_ours, maps, logits, weight, backward),
        baselines={
            "PyTorch": _call(convex_upsample_reference, maps, logits, weight, backward),
            "PyTorch, compiled": _call(compiled, maps, logits, weight, backward),
        },
        check=lambda: _errors(maps, logits, weight, backward),
        tolerance=TOLERANCES[dtype],
        # Backward reads all once more and writes two gradients.
        bytes_moved=bytes_once + (bytes_once + logits.nbytes + maps.nbytes if backward else 0),
        flops=2.0 * 9 * weight.numel() * (3 if backward else 1),
        matrix_dtype=dtype,
    )


def _ours(maps: Tensor, logits: Tensor, scale: float) -> Tensor:
    return convex_upsample(maps, logits, scale, impl="triton")


def _call(
    function: Callable[..., Tensor], maps: Tensor, logits: Tensor, weight: Tensor, backward: bool
) -> Callable[[], Any]:
    if not backward:
        return lambda: function(maps, logits, 0.25)
    return lambda: torch.autograd.grad(function(maps, logits, 0.25), (maps, logits), weight)


def _errors(maps: Tensor, logits: Tensor, weight: Tensor, backward: bool) -> dict[str, float]:
    """Of the result and the gradients, against the reference in float64; also: the same bytes twice."""
    exact_leaves = [t.detach().double().requires_grad_(backward) for t in (maps, logits)]
    exact = convex_upsample_reference(exact_leaves[0], exact_leaves[1], 0.25)
    found, again = (_ours(maps, logits, 0.25) for _ in range(2))
    if not torch.equal(found, again):
        raise AssertionError("the results differ between two runs")
    errors = {"out": relative_error(found.detach(), exact.detach())}
    if backward:
        grads, others = (torch.autograd.grad(out, (maps, logits), weight) for out in (found, again))
        if not all(torch.equal(a, b) for a, b in zip(grads, others, strict=True)):
            raise AssertionError("the gradients differ between two runs")
        exact_grads = torch.autograd.grad(exact, exact_leaves, weight.double())
        for name, a, b in zip(("maps", "logits"), grads, exact_grads, strict=True):
            errors[name] = relative_error(a, b)
    return errors
