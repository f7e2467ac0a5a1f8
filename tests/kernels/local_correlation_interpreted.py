"""The Triton source of local correlation in triton's interpreter, on the CPU: one JSON line per case.

A process of its own, started by the test: TRITON_INTERPRET is read when triton is imported, and a read outside
a tensor ends the process. With "more" as argument it runs the shapes that the ordinary tests leave out, and no more.
"""

import itertools
import json
import math
import os
import sys

import torch
from torch import Tensor

# (B, C, H, W, radius)
SHAPES = (
    *((1, 1, 1, 1, 0), (1, 1, 1, 1, 4), (1, 7, 1, 7, 1), (1, 7, 7, 1, 2), (2, 7, 7, 7, 3), (3, 5, 2, 3, 4)),
    *((1, 63, 8, 8, 1), (1, 127, 7, 9, 1), (1, 1000, 3, 2, 1), (2, 1, 9, 8, 2), (1, 16, 8, 8, 4), (1, 17, 9, 7, 4)),
    *((1, 3, 63, 1, 0), (1, 2, 1, 63, 1), (1, 4, 127, 2, 1), (1, 2, 1, 127, 0), (1, 1, 1, 1000, 0), (1, 2, 1000, 1, 0)),
    *((2, 33, 5, 11, 2), (1, 64, 6, 10, 3), (1, 65, 11, 5, 0), (1, 128, 4, 4, 4), (1, 129, 5, 3, 2), (4, 8, 3, 3, 1)),
    *((1, 6, 8, 9, 5), (1, 5, 4, 6, 6), (1, 3, 3, 4, 12), (1, 2, 2, 2, 13), (1, 4, 5, 3, 28), (2, 31, 8, 1, 4)),
    *((1, 20, 10, 4, 4), (1, 12, 7, 15, 2), (1, 24, 15, 7, 1), (2, 3, 16, 3, 1), (1, 9, 2, 17, 3), (1, 40, 1, 9, 4)),
    *((1, 48, 6, 6, 2), (1, 100, 2, 9, 3), (3, 2, 8, 8, 0), (1, 11, 9, 9, 1), (1, 130, 8, 8, 1), (1, 256, 2, 2, 4)),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels-last", "strided", "transposed")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def maps(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Two maps of shape (B, C, H, W, ...) in a memory layout; what lies between strided pixels is nan."""
    B, C, H, W = shape[:4]
    generator = torch.Generator().manual_seed(sum(shape))
    pair = []
    for _ in range(2):
        values = torch.randn(B, C, H, W, generator=generator).to(device, dtype)
        if layout == "channels-last":
            values = values.contiguous(memory_format=torch.channels_last)
        elif layout == "strided":
            store = torch.full((B, C + 1, 2 * H + 3, 3 * W + 5), math.nan, dtype=dtype, device=device)
            store[:, 1:, 2 : 2 + 2 * H : 2, 3 : 3 + 3 * W : 3] = values
            values = store[:, 1:, 2 : 2 + 2 * H : 2, 3 : 3 + 3 * W : 3]
        elif layout == "transposed":
            values = values.transpose(2, 3).contiguous().transpose(2, 3)
        pair.append(values)
    return pair[0], pair[1]


def relative_errors(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, impl: str, device: str
) -> dict[str, float]:
    """Largest errors of the result and both gradients against the definition in float64, over its largest value."""
    from kinema.kernels import local_correlation
    from kinema.kernels.local_correlation.reference import local_correlation_plain

    leaves = [t.detach().requires_grad_() for t in maps(shape, dtype, layout, device)]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    found = local_correlation(leaves[0], leaves[1], shape[4], impl=impl)
    exact = local_correlation_plain(exact_leaves[0], exact_leaves[1], shape[4])
    weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(device)
    pairs = {"result": (found, exact)}
    grads = torch.autograd.grad(found, leaves, weight)
    exact_grads = torch.autograd.grad(exact, exact_leaves, weight.double())
    for name, grad, exact_grad in zip(("gradient 1", "gradient 2"), grads, exact_grads, strict=True):
        pairs[name] = (grad, exact_grad)
    assert found.dtype == torch.float32 and all(grad.dtype == dtype for grad in grads)
    return {name: ((a.double() - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


def case_name(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> str:
    """Name of a test case."""
    return "x".join(map(str, shape[:4])) + f"-r{shape[4]}-{str(dtype).removeprefix('torch.')}-{layout}"


def interpreted_cases() -> list[tuple[tuple[int, ...], torch.dtype, str]]:
    """Every shape once, with dtypes and layouts taking turns (3 and 4 of them: all pairs come up)."""
    turns = zip(itertools.cycle(DTYPES), itertools.cycle(LAYOUTS), SHAPES, strict=False)
    return [(shape, dtype, layout) for dtype, layout, shape in turns]


def quick_cases() -> list[tuple[tuple[int, ...], torch.dtype, str]]:
    """Of the cases: every pair of dtype and layout, and windows that are cut into strips."""
    cases = interpreted_cases()
    return [*cases[:12], *(case for case in cases if case[0][4] in (12, 13))]


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from kinema.kernels.local_correlation import triton_impl

    real_empty = torch.empty

    def poisoned_empty(*arguments, **options):
        """Whatever a kernel leaves unwritten is nan."""
        tensor = real_empty(*arguments, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    torch.empty = poisoned_empty
    more = sys.argv[1:] == ["more"]
    for case in interpreted_cases():
        if (case in quick_cases()) != more:
            _print(case_name(*case), relative_errors(*case, impl="triton", device="cpu"))
    torch.empty = real_empty
    if more:
        return
    _print("deterministic", _repeats_to_the_byte(triton_impl))
    _print("memory formats", _memory_formats(triton_impl))
    _print("second derivatives", _second_derivatives(triton_impl))
    _print("opcheck", _opcheck(triton_impl))
    _print(
        "empty batch", list(triton_impl.local_correlation_triton(*maps((0, 3, 4, 5), DTYPES[0], "contiguous"), 1).shape)
    )
    _print("repacked", _repacked(triton_impl))
    _print("compiled", {impl: _error_of_compiling(impl) for impl in ("triton", "reference")})


def _print(name: str, value: object) -> None:
    sys.stdout.write(json.dumps([name, value]) + "\n")
    sys.stdout.flush()


def _repeats_to_the_byte(triton_impl) -> bool:
    results = []
    for _ in range(2):
        leaves = [t.requires_grad_() for t in maps((1, 20, 8, 9), DTYPES[0], "contiguous")]
        out = triton_impl.local_correlation_triton(*leaves, 4)
        results.append([out, *torch.autograd.grad(out, leaves, out.detach().sin())])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _memory_formats(triton_impl) -> dict[str, bool]:
    """Whether result and gradient have the memory format of the maps."""
    found = {}
    for layout, memory_format in (("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)):
        leaves = [t.requires_grad_() for t in maps((2, 3, 4, 5), DTYPES[0], layout)]
        out = triton_impl.local_correlation_triton(*leaves, 1)
        grads = torch.autograd.grad(out.sum(), leaves)
        found[layout] = all(t.is_contiguous(memory_format=memory_format) for t in (out, *grads))
    return found


def _second_derivatives(triton_impl) -> float:
    """Largest relative error of derivatives of a gradient's norm against the reference in float64."""
    from kinema.kernels.local_correlation.reference import local_correlation_plain

    def derivatives(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in maps((1, 5, 6, 7), DTYPES[0], "contiguous")]
        out = function(*leaves, 2)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    pairs = zip(
        derivatives(triton_impl.local_correlation_triton, torch.float32),
        derivatives(local_correlation_plain, torch.float64),
        strict=True,
    )
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _repacked(triton_impl) -> dict[str, bool]:
    """Whether maps come back as a channels-last copy of whole 16s of channels; one that differs raises."""
    found = {}
    for name, (shape, dtype, layout, radius) in {
        "whole channels": ((1, 32, 5, 7), torch.float16, "channels-last", 3),
        "whole rows": ((1, 19, 5, 16), torch.bfloat16, "contiguous", 4),
        "odd radius": ((1, 19, 5, 16), torch.bfloat16, "contiguous", 3),
        "odd width": ((2, 19, 5, 9), torch.float16, "contiguous", 4),
        "odd channels": ((1, 19, 5, 7), torch.float16, "channels-last", 4),
        "float32": ((1, 19, 5, 9), torch.float32, "contiguous", 3),
    }.items():
        fmap, _ = maps((*shape, radius), dtype, layout)
        packed = triton_impl.repacked(fmap, radius)
        C = shape[1]
        assert torch.equal(packed[:, :C], fmap) and not packed[:, C:].any()
        found[name] = packed is not fmap
        assert not found[name] or (packed.stride(1) == 1 and packed.shape[1] == 32), (name, packed.stride())
    return found


def _opcheck(triton_impl) -> dict[str, dict[str, str]]:
    fmap1, fmap2 = (t.requires_grad_() for t in maps((2, 5, 4, 6), DTYPES[0], "channels-last"))
    weight = torch.randn(2, 9, 4, 6, requires_grad=True)
    return {
        "correlate": torch.library.opcheck(triton_impl._correlate, (fmap1, fmap2, 1)),
        "window sum": torch.library.opcheck(triton_impl._window_sum, (weight, fmap1, 1, False)),
        "window sum, mirrored": torch.library.opcheck(triton_impl._window_sum, (weight, fmap1, 1, True)),
    }


def _error_of_compiling(impl: str) -> float:
    """Largest difference of the compiled function and its gradients from the eager ones; a graph break raises."""
    from kinema.kernels import local_correlation

    def correlate(a: Tensor, b: Tensor) -> Tensor:
        return local_correlation(a, b, 2, impl=impl)

    results = []
    for function in (correlate, torch.compile(correlate, fullgraph=True, backend="aot_eager")):
        leaves = [t.requires_grad_() for t in maps((1, 5, 4, 6), DTYPES[0], "channels-last")]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


if __name__ == "__main__":
    main()
