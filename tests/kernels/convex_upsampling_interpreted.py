"""The Triton source of convex upsampling in triton's interpreter, on the CPU: one JSON line per case.

A process of its own, started by the test: TRITON_INTERPRET is read when triton is imported, and a read outside
a tensor ends the process.
"""

import json
import math
import os
import sys

import torch
from torch import Tensor

# (B, C, H, W, factor), dtype of the logits, layout: RAFT's kind, other factors, more than one block, single pixels.
CASES = (
    ((2, 2, 3, 5, 8), torch.float32, "channels-last"),
    ((1, 2, 2, 37, 8), torch.float16, "contiguous"),
    ((1, 6, 3, 4, 2), torch.bfloat16, "strided"),
    ((1, 3, 4, 7, 3), torch.float32, "strided"),
    ((1, 1, 1, 1, 4), torch.float32, "contiguous"),
    ((1, 5, 1, 3, 1), torch.float16, "channels-last"),
)
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Gradients of logits are rounded to their type; everything else is float32."""


def case_name(case: tuple) -> str:
    """Name of a test case."""
    shape, dtype, layout = case
    return "x".join(map(str, shape)) + f"-{str(dtype).removeprefix('torch.')}-{layout}"


def inputs(case: tuple, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Maps in float32 and logits; what lies between strided pixels is nan."""
    (B, C, H, W, factor), dtype, layout = case
    generator = torch.Generator().manual_seed(sum(case[0]))
    maps = 3 * torch.randn(B, C, H, W, generator=generator)
    logits = 8 * torch.randn(B, 9 * factor**2, H, W, generator=generator)
    return _laid_out(maps.to(device), layout), _laid_out(logits.to(device, dtype), layout)


def _laid_out(values: Tensor, layout: str) -> Tensor:
    if layout == "channels-last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        B, C, H, W = values.shape
        store = torch.full((B, C + 1, 2 * H + 1, 3 * W + 2), math.nan, dtype=values.dtype, device=values.device)
        store[:, 1:, 1 : 1 + 2 * H : 2, 2 : 2 + 3 * W : 3] = values
        return store[:, 1:, 1 : 1 + 2 * H : 2, 2 : 2 + 3 * W : 3]
    return values


def errors(case: tuple, impl: str, device: str = "cpu") -> dict[str, float]:
    """Largest errors of the result and both gradients against the reference in float64, over its largest value."""
    from kinema.kernels.convex_upsampling import convex_upsample

    leaves = [t.detach().requires_grad_() for t in inputs(case, device)]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    found = convex_upsample(*leaves, 0.25, impl=impl)
    exact = convex_upsample(*exact_leaves, 0.25, impl="reference")
    weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(device)
    grads = torch.autograd.grad(found, leaves, weight)
    exact_grads = torch.autograd.grad(exact, exact_leaves, weight.double())
    assert found.dtype == torch.float32 and [g.dtype for g in grads] == [t.dtype for t in leaves]
    pairs = zip(("result", "maps", "logits"), (found, *grads), (exact, *exact_grads), strict=True)
    return {name: ((a.double() - b).abs().max() / b.abs().max()).item() for name, a, b in pairs}


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from kinema.kernels.convex_upsampling import convex_upsample, triton_impl

    real = torch.empty, torch.empty_like
    torch.empty, torch.empty_like = _poisoned(torch.empty), _poisoned(torch.empty_like)
    for case in CASES:
        _print(case_name(case), errors(case, "triton"))
    torch.empty, torch.empty_like = real
    small = ((2, 2, 3, 4, 2), torch.float32, "contiguous")
    leaves = [t.requires_grad_() for t in inputs(small)]
    twice = []
    for _ in range(2):
        out = convex_upsample(*leaves, impl="triton")
        twice.append([out, *torch.autograd.grad(out, leaves, out.detach().sin())])
    _print("deterministic", all(torch.equal(a, b) for a, b in zip(*twice, strict=True)))
    empty = [t[:0].detach().requires_grad_() for t in leaves]
    out = convex_upsample(*empty, impl="triton")
    _print("empty batch", [list(t.shape) for t in (out, *torch.autograd.grad(out.sum(), empty))])
    _print("opcheck", torch.library.opcheck(triton_impl._upsample, (*leaves, 0.25)))
    whole = torch.compile(lambda a, b: convex_upsample(a, b, impl="triton"), fullgraph=True, backend="aot_eager")
    _print("compiled", torch.equal(whole(*leaves), convex_upsample(*leaves, impl="triton")))


def _poisoned(allocate):
    """Whatever a kernel leaves unwritten is nan."""

    def allocated(*arguments, **options):
        tensor = allocate(*arguments, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    return allocated


def _print(name: str, value: object) -> None:
    sys.stdout.write(json.dumps([name, value]) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
