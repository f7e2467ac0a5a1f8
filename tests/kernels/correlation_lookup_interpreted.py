"""The Triton source of the correlation lookup in triton's interpreter, on the CPU: one JSON line per case.

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

# (B, C, H, W, h, w, levels, radius)
SHAPES = (
    *((1, 1, 1, 1, 1, 1, 1, 0), (1, 7, 1, 7, 1, 7, 1, 1), (1, 7, 7, 1, 7, 1, 1, 2), (2, 3, 7, 7, 7, 7, 2, 3)),
    *((1, 63, 8, 8, 8, 8, 4, 4), (1, 127, 8, 8, 9, 8, 2, 1), (1, 112, 3, 2, 4, 5, 1, 1), (1, 16, 8, 8, 16, 16, 2, 4)),
    *((1, 2, 23, 1, 1, 63, 1, 0), (1, 2, 1, 23, 63, 1, 1, 1), (1, 3, 1, 17, 2, 9, 1, 0), (1, 3, 17, 1, 9, 2, 1, 1)),
    *((1, 1, 2, 3, 1, 1000, 1, 1), (1, 1, 3, 2, 1000, 1, 1, 0), (1, 2, 1, 1000, 1, 3, 1, 0), (3, 5, 4, 3, 6, 7, 2, 1)),
    *((1, 17, 9, 7, 7, 9, 1, 4), (1, 64, 5, 6, 8, 8, 1, 3), (1, 65, 6, 5, 9, 9, 1, 3), (1, 128, 4, 4, 10, 3, 1, 4)),
    *((1, 129, 5, 3, 3, 10, 1, 2), (4, 8, 3, 3, 5, 4, 2, 1), (1, 6, 8, 9, 8, 9, 3, 2), (1, 5, 4, 6, 11, 13, 1, 5)),
    *((1, 3, 3, 4, 9, 8, 1, 6), (1, 4, 2, 2, 20, 20, 1, 8), (2, 31, 8, 1, 8, 1, 1, 4), (1, 20, 10, 4, 10, 4, 2, 3)),
    *((1, 12, 7, 15, 7, 15, 2, 2), (1, 24, 15, 7, 15, 7, 2, 1), (2, 3, 16, 3, 3, 16, 1, 1), (1, 9, 2, 17, 17, 2, 1, 3)),
    *((1, 40, 1, 9, 2, 2, 2, 4), (1, 48, 6, 6, 33, 5, 1, 2), (1, 100, 2, 9, 5, 33, 1, 3), (1, 2, 8, 8, 63, 7, 1, 1)),
    *((1, 11, 9, 9, 9, 9, 2, 1), (1, 130, 8, 8, 8, 8, 1, 1), (1, 256, 2, 2, 9, 9, 4, 4), (1, 19, 8, 8, 23, 18, 4, 2)),
    *((1, 33, 8, 8, 1, 1, 1, 4), (1, 15, 8, 16, 9, 17, 1, 3), (1, 1000, 3, 2, 4, 5, 1, 1)),
    *((1, 2, 63, 1, 1, 63, 1, 0), (1, 2, 1, 63, 63, 1, 1, 1), (1, 3, 1, 127, 2, 9, 1, 0), (1, 3, 127, 1, 9, 2, 1, 1)),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = ("x_major", "y_major")
LAYOUTS = ("contiguous", "channels-last", "strided", "transposed")
SPREADS = (1.5, 0.0, 6.0, 1.5, 12.0)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

Case = tuple[tuple[int, ...], torch.dtype, str, str, float]


def interpreted_cases() -> list[Case]:
    """Every shape once, with dtypes, layouts, orders and kinds of motion taking turns."""
    # Orders change every three, so that each comes with every dtype.
    orders = itertools.cycle(order for order in ORDERS for _ in range(3))
    turns = zip(
        SHAPES, itertools.cycle(DTYPES), itertools.cycle(LAYOUTS), orders, itertools.cycle(SPREADS), strict=False
    )
    return list(turns)


def quick_cases() -> list[Case]:
    """Of the cases: every dtype with every layout and order, one to four levels, and a wider window than usual."""
    cases = interpreted_cases()
    return [*cases[:12], *(case for case in cases if case[0][7] == 6)]


def case_name(case: Case) -> str:
    """Name of a test case."""
    (B, C, H, W, h, w, levels, radius), dtype, layout, order, spread = case
    kind = str(dtype).removeprefix("torch.")
    return f"{B}x{C}x{H}x{W}-on-{h}x{w}-l{levels}-r{radius}-{kind}-{layout}-{order}-spread{spread}"


def lookup_inputs(case: Case, device: str = "cpu") -> tuple[Tensor, list[Tensor], Tensor]:
    """fmap1, the pyramid and coords; what lies between strided pixels is nan."""
    from kinema.kernels.correlation_lookup import feature_pyramid

    (B, C, H, W, h, w, levels, _), dtype, layout, _, spread = case
    generator = torch.Generator().manual_seed(sum(case[0]))
    fmap1 = torch.randn(B, C, H, W, generator=generator)
    pooled = feature_pyramid(_grown(torch.randn(B, C, h, w, generator=generator), 2 ** (levels - 1)), levels)
    y, x = torch.meshgrid(torch.arange(H) * (h / H), torch.arange(W) * (w / W), indexing="ij")
    coords = torch.stack([x, y]) + spread * torch.randn(B, 2, H, W, generator=generator)
    maps = [_laid_out(t.to(device, dtype), layout) for t in (fmap1, *pooled)]
    return maps[0], maps[1:], _laid_out(coords.to(device), layout)


def _grown(fmap: Tensor, smallest: int) -> Tensor:
    """At least as large as the pyramid needs."""
    missing = [max(0, smallest - size) for size in fmap.shape[-2:]]
    return torch.nn.functional.pad(fmap, (0, missing[1], 0, missing[0]), mode="constant", value=0.5)


def _laid_out(values: Tensor, layout: str) -> Tensor:
    B, C, H, W = values.shape
    if layout == "channels-last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        store = torch.full((B, C + 1, 2 * H + 3, 3 * W + 5), math.nan, dtype=values.dtype, device=values.device)
        store[:, 1:, 2 : 2 + 2 * H : 2, 3 : 3 + 3 * W : 3] = values
        return store[:, 1:, 2 : 2 + 2 * H : 2, 3 : 3 + 3 * W : 3]
    return values.transpose(2, 3).contiguous().transpose(2, 3) if layout == "transposed" else values


def relative_errors(case: Case, impl: str, device: str, **options: bool) -> dict[str, float]:
    """Largest errors of the result and all gradients against the reference in float64, over its largest value."""
    from kinema.kernels import correlation_lookup
    from kinema.kernels.correlation_lookup.reference import correlation_lookup_reference

    radius, order = case[0][7], case[3]
    fmap1, pyramid, coords = lookup_inputs(case, device)
    leaves = [t.detach().requires_grad_() for t in (fmap1, *pyramid)]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    if options:
        found = correlation_lookup_reference(leaves[0], leaves[1:], coords, radius, order, **options)
    else:
        found = correlation_lookup(leaves[0], leaves[1:], coords, radius, impl=impl, window_order=order)
    exact = correlation_lookup_reference(exact_leaves[0], exact_leaves[1:], coords, radius, order, boxed=False)
    weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(device)
    grads = torch.autograd.grad(found, leaves, weight)
    exact_grads = torch.autograd.grad(exact, exact_leaves, weight.double())
    assert found.dtype == torch.float32 and all(grad.dtype == case[1] for grad in grads)
    names = ["result", "fmap1", *(f"level {level}" for level in range(len(pyramid)))]
    pairs = zip(names, (found, *grads), (exact, *exact_grads), strict=True)
    return {name: _relative_error(a, b) for name, a, b in pairs}


def _relative_error(found: Tensor, exact: Tensor) -> float:
    """Against 0 (a window that sees nothing) only 0 is right."""
    error, size = (found.double() - exact).abs().max().item(), exact.abs().max().item()
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from kinema.kernels.correlation_lookup import op

    real_empty = torch.empty

    def poisoned_empty(*arguments, **options):
        """Whatever a kernel leaves unwritten is nan."""
        tensor = real_empty(*arguments, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    torch.empty = poisoned_empty
    more = sys.argv[1:] == ["more"]
    for case in interpreted_cases():
        if (case in quick_cases()) != more:
            _print(case_name(case), relative_errors(case, impl="triton", device="cpu"))
    if more:
        return
    _print("not finite", _not_finite_and_far(op))
    torch.empty = real_empty
    _print("deterministic", _repeats_to_the_byte(op))
    _print("needed gradients", _only_needed_gradients(op))
    _print("opcheck", _opcheck(op))
    _print("compiled", _compiled_equals_eager())
    _print("tf32", _precisions())
    _print("launches", _launches(op))
    _print("stored volume", _stored_volume())
    _print("reference compiled", _reference_compiled())


SMALL: Case = ((1, 5, 4, 6, 5, 7, 2, 1), torch.float32, "contiguous", "y_major", 2.0)


def _print(name: str, value: object) -> None:
    sys.stdout.write(json.dumps([name, value]) + "\n")
    sys.stdout.flush()


def _not_finite_and_far(op) -> dict[str, bool]:
    """nan windows without gradient where coords are not finite, zeros far outside, the rest untouched."""
    fmap1, pyramid, coords = lookup_inputs(SMALL)
    coords[0, 0, 0, 0], coords[0, 1, 0, 1], coords[0, 0, 0, 2], coords[0, 1, 0, 3] = math.nan, math.inf, -1e30, 3e9
    leaves = [t.requires_grad_() for t in (fmap1, *pyramid)]
    out = op.lookup_forward(leaves[0], leaves[1:], coords, 1, "x_major")
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    return {
        "nan": bool(out[0, :, 0, :2].isnan().all()),
        "zero": bool((out[0, :, 0, 2:4] == 0).all()),
        "finite elsewhere": bool(out[0, :, 1:].isfinite().all()),
        "no gradient": all(bool(grad.isfinite().all()) for grad in grads) and bool((grads[0][0, :, 0, :4] == 0).all()),
    }


def _repeats_to_the_byte(op) -> bool:
    results = []
    for _ in range(2):
        fmap1, pyramid, coords = lookup_inputs(((1, 20, 8, 9, 8, 9, 1, 2), *SMALL[1:]))
        leaves = [t.requires_grad_() for t in (fmap1, *pyramid)]
        out = op.lookup_forward(leaves[0], leaves[1:], coords, 2, "x_major")
        results.append([out, *torch.autograd.grad(out, leaves, out.detach().sin())])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _only_needed_gradients(op) -> bool:
    """Either map may be without gradient, and the other's is then what it was."""
    found = []
    for needs_query, needs_target in ((True, True), (True, False), (False, True)):
        fmap1, pyramid, coords = lookup_inputs(SMALL)
        fmap1.requires_grad_(needs_query)
        for fmap2 in pyramid:
            fmap2.requires_grad_(needs_target)
        op.lookup_forward(fmap1, pyramid, coords, 1, "x_major").square().sum().backward()
        found.append([t.grad for t in (fmap1, *pyramid)])
    both, query, target = found
    return (
        torch.equal(both[0], query[0])
        and all(torch.equal(a, b) for a, b in zip(both[1:], target[1:], strict=True))
        and query[1:] == [None, None]
        and target[0] is None
    )


def _opcheck(op) -> dict[str, dict[str, str]]:
    fmap1, pyramid, coords = lookup_inputs(SMALL)
    leaves = [t.requires_grad_() for t in (fmap1, *pyramid)]
    grad = torch.randn(1, 18, 4, 6)
    queries, targets, parts, *facts = op.prepare_maps(leaves[0], leaves[1:])
    rows = [t.detach() for t in (queries, targets)]
    window = (coords, *facts[:2], 1, True, "float32")
    return {
        "split": torch.library.opcheck(op._split, (rows[1], "tf32")),
        "forward": torch.library.opcheck(op._lookup, (*(t.requires_grad_() for t in rows), parts, *window)),
        "backward": torch.library.opcheck(
            op._lookup_backward, (grad, *(t.detach() for t in rows), *window, True, True)
        ),
    }


def _compiled_equals_eager() -> bool:
    from kinema.kernels import correlation_lookup

    fmap1, pyramid, coords = lookup_inputs(SMALL)
    compiled = torch.compile(
        lambda a, b, c: correlation_lookup(a, b, c, 1, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    return torch.equal(compiled(fmap1, pyramid, coords), correlation_lookup(fmap1, pyramid, coords, 1, impl="triton"))


SEVERAL: Case = ((1, 40, 8, 8, 8, 8, 3, 3), torch.float32, "contiguous", "x_major", 1.5)


def _precisions() -> dict[str, dict[str, float]]:
    """Relative errors of the result and of the gradient of fmap1, by precision."""
    from kinema.kernels import correlation_lookup
    from kinema.kernels.correlation_lookup.reference import correlation_lookup_reference

    fmap1, pyramid, coords = lookup_inputs(SEVERAL)
    exact_leaf = fmap1.double().requires_grad_()
    exact = correlation_lookup_reference(exact_leaf, [t.double() for t in pyramid], coords, 3)
    (exact_grad,) = torch.autograd.grad(exact.sin().sum(), exact_leaf)
    found = {}
    for precision in ("float32", "tf32"):
        leaf = fmap1.clone().requires_grad_()
        out = correlation_lookup(leaf, pyramid, coords, 3, impl="triton", precision=precision)
        (grad,) = torch.autograd.grad(out.sin().sum(), leaf)
        found[precision] = {"result": _relative_error(out, exact), "fmap1": _relative_error(grad, exact_grad)}
    return found


def _launches(op) -> list[str]:
    """What two lookups between the same float32 maps start."""
    from kinema.kernels.correlation_lookup import lookup_into

    started, real = [], op.launch

    def noting(kernel, *arguments, **options):
        started.append(kernel.fn.__name__)
        real(kernel, *arguments, **options)

    op.launch = noting
    fmap1, pyramid, coords = lookup_inputs(SEVERAL)
    look = lookup_into(fmap1, pyramid, 3, impl="triton")
    look(coords)
    look(coords + 1)
    op.launch = real
    return started


def _stored_volume() -> dict[str, float]:
    """Relative errors against bilinear sampling by torch in float64, in the volume's gradient too."""
    from kinema.kernels.correlation_lookup import correlation_pyramid, volume_lookup
    from kinema.kernels.correlation_lookup.gpu_cases import grid_sampled

    errors = {}
    for order in ORDERS:
        generator = torch.Generator().manual_seed(3)
        fmap1, fmap2 = (torch.randn(2, 8, 9, 11, generator=generator) for _ in range(2))
        y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
        coords = torch.stack([x, y]) + 6 * torch.randn(2, 2, 9, 11, generator=generator)
        leaves = [t.requires_grad_() for t in correlation_pyramid(fmap1, fmap2, 3)]
        exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
        out = volume_lookup(leaves, coords, 2, order, impl="triton")
        exact = grid_sampled(exact_leaves, coords.double(), 2)
        if order == "y_major":
            exact = exact.unflatten(1, (3, 5, 5)).transpose(2, 3).flatten(1, 3)
        weight = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        grads = torch.autograd.grad(out, leaves, weight.float())
        exact_grads = torch.autograd.grad(exact, exact_leaves, weight)
        errors[order] = _relative_error(out, exact)
        for level, (found, right) in enumerate(zip(grads, exact_grads, strict=True)):
            errors[f"{order} level {level}"] = _relative_error(found, right)
    coords[0, 0, 0, 0] = math.nan
    out = volume_lookup(leaves, coords, 2, impl="triton")
    errors["nan elsewhere"] = float(out.isnan().sum() != out.shape[1] or not bool(out[0, :, 0, 0].isnan().all()))
    return errors


class _Reference(torch.nn.Module):
    def forward(self, fmap1, pyramid, coords):
        from kinema.kernels import correlation_lookup

        return correlation_lookup(fmap1, pyramid, coords, 1, impl="reference", window_order="y_major")


def _reference_compiled() -> dict[str, float]:
    """Largest relative difference of the compiled and the exported reference from the eager one."""
    _, pyramid, coords = lookup_inputs(SMALL)
    module = _Reference()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outs, grads = [], []
    for function in (module, compiled):
        fmap1 = lookup_inputs(SMALL)[0].requires_grad_()
        outs.append(function(fmap1, pyramid, coords).detach())
        grads.append(torch.autograd.grad(function(fmap1, pyramid, coords).square().sum(), fmap1)[0])
    inputs = (fmap1.detach(), pyramid, coords)
    exported = torch.export.export(module, inputs).module()(*inputs)
    return {
        "compiled": _relative_error(outs[1], outs[0].double()),
        "gradient": _relative_error(grads[1], grads[0].double()),
        "exported": _relative_error(exported, outs[0].double()),
    }


if __name__ == "__main__":
    main()
