"""Runs the Triton kernels of cosine attention in Triton's interpreter, on the CPU; prints one JSON object per case.

In a process of its own, since an out-of-bounds read there is a segmentation fault, and since the interpreter has to be
chosen before Triton is imported. With "more" as argument it runs the shapes that the ordinary tests leave out, with
"cuda" all cases compiled, on a GPU. With "compile" the reference goes through torch.compile and torch.export instead,
away from the tests' import hook, which breaks graphs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator

MODE = sys.argv[1] if len(sys.argv) > 1 else "interpreter"
DEVICE = "cuda" if MODE == "cuda" else "cpu"
if MODE in ("interpreter", "more"):
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from kinema.kernels.cosine_attention import cosine_attention, why_not_triton  # noqa: E402

torch.set_num_threads(1)

# batch, pattern, N, M, head size, angles, dtype, layout: each pattern, dtype and layout, odd sizes, more than one
# block, head sizes below, at and above a power of two; a batch of two with the layouts whose strides then matter.
SHAPES = [
    (2, "full", 7, 63, 64, 32, "float32", "packed"),
    (1, "full", 7, 70, 128, 64, "float16", "contiguous"),
    (1, "full", 7, 7, 34, 5, "float32", "columns first"),
    (1, "causal", 63, 63, 80, 0, "bfloat16", "contiguous"),
    (1, "causal", 7, 7, 32, None, "float16", "packed"),
    (1, ("query-causal", 7), 28, 28, 72, 18, "float32", "packed"),
    (1, ("query-causal", 9), 36, 36, 64, 32, "bfloat16", "heads last"),
    (1, ("query-causal", 7), 7, 7, 64, 32, "float32", "contiguous"),
    (2, ("query-inference", 1), 8, 8, 64, 32, "float32", "heads last"),
    (1, ("query-inference", 33), 70, 70, 96, 40, "float16", "heads last"),
    (1, ("query-inference", 7), 7, 7, 32, 16, "float32", "contiguous"),
]
# Not in the ordinary run: the same kinds at other sizes, and both batch sizes for those above.
MORE_SHAPES = [
    (2, "full", 1, 1, 32, 16, "float32", "heads last"),
    (1, "full", 1, 1, 32, 16, "float32", "heads last"),
    (1, "full", 63, 7, 72, 18, "float32", "contiguous"),
    (1, "full", 127, 1, 96, 48, "float32", "heads last"),
    (1, "full", 70, 63, 72, 18, "bfloat16", "packed"),
    (2, "causal", 7, 7, 32, 16, "float16", "packed"),
    (1, "causal", 127, 127, 64, 24, "float32", "heads last"),
    (1, ("query-causal", 40), 160, 160, 64, 32, "float32", "heads last"),
    (1, ("query-causal", 63), 126, 126, 32, 8, "float16", "contiguous"),
    (1, ("query-causal", 2), 130, 130, 48, 12, "float32", "columns first"),
    (1, ("query-inference", 63), 64, 64, 64, 32, "float32", "contiguous"),
    (1, ("query-inference", 5), 70, 70, 72, 18, "bfloat16", "packed"),
    (1, "full", 7, 63, 64, 32, "float32", "packed"),
    (2, "full", 7, 70, 128, 64, "float16", "contiguous"),
    (2, "full", 7, 7, 34, 5, "float32", "columns first"),
    (2, "causal", 1, 1, 64, None, "float32", "contiguous"),
    (1, "causal", 1, 1, 64, None, "float32", "contiguous"),
    (1, ("query-causal", 7), 28, 28, 64, 32, "float32", "packed"),
    (2, ("query-causal", 7), 7, 7, 64, 32, "float32", "contiguous"),
    (2, ("query-inference", 1), 8, 8, 64, 32, "float32", "packed"),
    (1, ("query-inference", 1), 8, 8, 64, 32, "float32", "packed"),
    (2, ("query-inference", 7), 7, 7, 32, 16, "float32", "contiguous"),
]
# Nobody sees anything but itself: the output is v, and q, k and the scale have no influence.
ALONE = [(("query-causal", 1), 4, 4, 64, 32), (("query-inference", 0), 7, 7, 64, 32), ("causal", 1, 1, 32, 16)]
NAMES = ("out", "dq", "dk", "dv", "dscale")


def arranged(x: Tensor, layout: str) -> Tensor:
    """The same numbers [B, H, N, D] under other strides."""
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns first":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "packed":  # a third of a tensor, as behind one linear layer for q, k and v
        other = torch.full_like(x, float("nan")).transpose(1, 2)
        return torch.stack([x.transpose(1, 2), other, other], dim=2)[:, :, 0].transpose(1, 2)
    return x.contiguous()


def inputs(pattern, N: int, M: int, D: int, R: int | None, dtype: str, layout: str, batch: int = 1, H: int = 3) -> dict:
    """Tensors of a call: q [batch, H, N, D], k and v [batch, H, M, D], R angles of a row or a key, a scale per head."""
    generator = torch.Generator().manual_seed(N * 1000 + M + D)
    kind = getattr(torch, dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v, dout = (arranged(draw(batch, H, n, D).to(kind).to(DEVICE), layout) for n in (N, M, M, N))
    # Angles that differ over heads only, or over the batch only, as rotary embeddings and positions of points give.
    angles = (None, None) if R is None else (9 * draw(1, H, N, R).to(DEVICE), draw(batch, 1, M, R).to(DEVICE))
    if N == M and D in (72, 96):  # queries and keys at the same places: kernels take sines and cosines once
        angles = (angles[0], angles[0])
    scale = torch.tensor([10.0, -3.0, 0.5][:H], device=DEVICE)
    return {"q": q, "k": k, "v": v, "angles": angles, "scale": scale, "dout": dout, "pattern": pattern}


def results(case: dict, impl: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients."""
    leaves = [case[name].detach().to(dtype or case[name].dtype) for name in ("q", "k", "v", "scale")]
    for leaf in leaves:
        leaf.requires_grad_()
    q, k, v, scale = leaves
    out = cosine_attention(q, k, v, *case["angles"], scale, case["pattern"], impl=impl)
    return [out, *torch.autograd.grad(out, leaves, case["dout"].to(out.dtype))]


def errors(found: list[Tensor], right: list[Tensor]) -> dict[str, float]:
    """Largest difference over largest value, by name; NaN where anything is not finite.

    Where the right gradient is 0 (a row that sees one key only), the difference itself: the output is of size 1.
    """
    rows = {}
    for name, a, b in zip(NAMES, found, right, strict=True):
        largest = b.abs().max().item()
        rows[name] = ((a.double() - b).abs().max() / (largest if largest > 1e-9 else 1.0)).item()
    return rows


def accuracy(shapes: list[tuple]) -> Iterator[dict]:
    for batch, *shape in shapes:
        case = inputs(*shape, batch=batch)
        found = results(case, "triton")
        assert found[0].dtype == case["q"].dtype and found[0].shape == case["q"].shape
        right = results(case, "reference", torch.float64)
        pattern, N, M, D, R, dtype, layout = shape
        yield {
            "case": f"{pattern} N{N} M{M} D{D} R{R} {dtype} {layout} batch {batch}",
            "dtype": dtype,
            "errors": errors(found, right),
        }


def alone() -> Iterator[dict]:
    for pattern, N, M, D, R in ALONE:
        case = inputs(pattern, N, M, D, R, "float32", "contiguous")
        found = results(case, "triton")
        yield {
            "case": f"alone {pattern}",
            "dtype": "float32",
            "errors": errors(found, results(case, "reference", torch.float64)),
        }


def poison() -> None:
    """From here on, new tensors are full of NaN: what a kernel does not write shows."""

    def poisoned(allocate):
        def allocated(*args, **kwargs):
            made = allocate(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return allocated

    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)


def repeated() -> dict:
    """Of more rows and keys than one block holds."""
    num_pokes, batch, heads = (40, 2, 3) if DEVICE == "cuda" else (20, 1, 1)
    length = 4 * num_pokes
    case = inputs(("query-causal", num_pokes), length, length, 64, 32, "float32", "heads last", batch, heads)
    once, twice = results(case, "triton"), results(case, "triton")
    return {"case": "same bytes twice", "same": all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))}


def broadcast_gradient() -> dict:
    """The gradient of a sum arrives with strides of 0."""
    case = inputs(("query-causal", 7), 28, 28, 64, 32, "float32", "contiguous")
    case["dout"] = torch.ones((), device=DEVICE).expand(case["q"].shape)
    return {
        "case": "gradient of a sum",
        "dtype": "float32",
        "errors": errors(results(case, "triton"), results(case, "reference", torch.float64)),
    }


@contextlib.contextmanager
def wide_float32() -> Iterator[None]:
    """The loops of bfloat16 in float32, whose rounding hides nothing; a GPU never launches them so."""
    from kinema.kernels.cosine_attention import op

    before = op.WIDE_DTYPES
    op.WIDE_DTYPES = (*before, torch.float32)
    try:
        yield
    finally:
        op.WIDE_DTYPES = before


def strong_heads(*dtypes: str) -> Iterator[dict]:
    """Scales below and above the one from which exponentials of logits do not fit, 64 ln 2 = 44.36."""
    for pattern, N, M, D, dtype, largest in (
        (("query-causal", 20), 80, 80, 64, "float32", 150.0),
        ("full", 7, 40, 64, "float32", 150.0),
        ("full", 7, 70, 128, "bfloat16", 44.5),
    ):
        if dtypes and dtype not in dtypes:
            continue
        case = inputs(pattern, N, M, D, None, dtype, "heads last")
        case["scale"] = torch.tensor([-44.3, 44.4, largest], device=DEVICE)
        if dtype == "float32":  # weights next to 1 and lost ones, which leave bfloat16 no gradient to compare
            case["q"][:, :, :7] = case["k"][:, :, 1:8]
            case["q"][:, :, 3] = -case["k"][:, :, 0]
        yield {
            "case": f"strong {pattern} {dtype}",
            "dtype": f"{dtype} strong",
            "errors": errors(results(case, "triton"), results(case, "reference", torch.float64)),
        }


def one_sided_angles() -> dict:
    case = inputs("full", 7, 9, 64, 32, "float32", "contiguous")
    case["angles"] = (None, case["angles"][1])
    return {
        "case": "angles for keys only",
        "dtype": "float32",
        "errors": errors(results(case, "triton"), results(case, "reference", torch.float64)),
    }


def compiled_kernel() -> dict:
    """torch.compile without graph breaks around the kernels, forward and backward."""
    case = inputs(("query-causal", 3), 12, 12, 32, 16, "float32", "heads last", batch=2, H=1)
    plain = results(case, "auto")
    whole = torch.compile(cosine_attention, fullgraph=True, backend="aot_eager")
    leaves = [case[name].detach().requires_grad_() for name in ("q", "k", "v", "scale")]
    out = whole(*leaves[:3], *case["angles"], leaves[3], case["pattern"])
    compiled = [out, *torch.autograd.grad(out, leaves, case["dout"])]
    return {
        "case": "same bytes compiled",
        "same": all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True)),
    }


def operator_checks() -> dict:
    """torch.library's own tests of schema, fake tensors and autograd registration."""
    from kinema.kernels.cosine_attention import op

    case = inputs(("query-causal", 3), 12, 12, 32, 16, "float32", "heads last", batch=2, H=1)
    q, k, v, scale = (case[name].requires_grad_() for name in ("q", "k", "v", "scale"))
    arguments = (q, k, v, *case["angles"], scale, "query_causal", 3)
    forward = torch.library.opcheck(torch.ops.kinema.cosine_attention.default, arguments)
    out, lse = (x.detach() for x in op.attention_forward(*arguments))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    backward = torch.library.opcheck(
        torch.ops.kinema.cosine_attention_backward.default,
        (case["dout"], *detached[:6], out, lse, *detached[6:]),
    )
    return {"case": "opcheck", "forward": forward, "backward": backward}


def refusals() -> Iterator[dict]:
    """What the kernel does not take, in words."""
    case = inputs("full", 5, 5, 64, 32, "float32", "contiguous")
    q, k, v, scale = (case[name] for name in ("q", "k", "v", "scale"))
    angle = case["angles"][0].requires_grad_()
    for name, arguments in {
        "float64": (q.double(), k.double(), v.double(), None, None, scale),
        "odd": (q[..., :33], k[..., :33], v[..., :33], None, None, scale),
        "large": (*(x.repeat(1, 1, 1, 3) for x in (q, k, v)), None, None, scale),
        "angles": (q, k, v, angle, angle, scale),
        "empty": (q[:0], k[:0], v[:0], None, None, scale),
    }.items():
        reason = why_not_triton(*arguments, "full")
        try:
            cosine_attention(*arguments, "full", impl="triton")
            raised = None
        except ValueError as error:
            raised = str(error)
        yield {"case": f"refuses {name}", "reason": reason, "raised": raised}


def wrong_arguments() -> Iterator[dict]:
    """Errors that the shape checks of the other tests would catch first."""
    case = inputs("full", 5, 5, 64, 32, "float32", "contiguous")
    q, k, v, scale = (case[name] for name in ("q", "k", "v", "scale"))
    theta = case["angles"][0]
    for name, arguments in {
        "rank": (q[0], k, v, None, None, scale),
        "integers": (q.int(), k.int(), v.int(), None, None, scale),
        "mixed": (q, k.half(), v, None, None, scale),
        "integer scale": (q, k, v, None, None, scale.int()),
        "integer angles": (q, k, v, theta.int(), None, scale),
        "angle rank": (q, k, v, theta[0], None, scale),
        "scale rank": (q, k, v, None, None, scale[:, None]),
    }.items():
        try:
            cosine_attention(*arguments, "full")
            raised = None
        except ValueError as error:
            raised = str(error)
        yield {"case": f"wrong {name}", "raised": raised}


def more_cases() -> Iterator[dict]:
    poison()
    yield from accuracy(MORE_SHAPES)


def all_cases() -> Iterator[dict]:
    yield operator_checks() if DEVICE == "cpu" else {"case": "opcheck", "forward": {}, "backward": {}}
    yield compiled_kernel()
    yield from refusals()
    yield from wrong_arguments()
    poison()
    yield from accuracy(SHAPES + MORE_SHAPES if DEVICE == "cuda" else SHAPES)
    yield from alone()
    yield repeated()
    yield broadcast_gradient()
    yield from strong_heads()
    if DEVICE == "cpu":
        with wide_float32():
            yield from strong_heads("float32")
            yield from accuracy([shape for shape in SHAPES if "float32" in shape])
    yield one_sided_angles()


def compiled_and_exported() -> Iterator[dict]:
    """The public function without graph breaks, and exported for any batch size."""
    for pattern in ("full", ("query-causal", 3), ("query-inference", 5)):

        class Attention(torch.nn.Module):
            def forward(self, q, k, v, theta_q, theta_k, scale):
                return cosine_attention(q, k, v, theta_q, theta_k, scale, pattern)  # noqa: B023

        case = inputs(pattern, 12, 12, 32, 16, "float32", "heads last", batch=2)
        arguments = (case["q"], case["k"], case["v"], *case["angles"], case["scale"])
        compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
        batch = {0: torch.export.Dim("batch", min=2, max=64)}
        exported = torch.export.export(Attention(), arguments, dynamic_shapes=(*[batch] * 3, None, batch, None))
        larger = inputs(pattern, 12, 12, 32, 16, "float32", "contiguous", batch=5)
        others = (larger["q"], larger["k"], larger["v"], *larger["angles"], larger["scale"])
        yield {
            "case": f"compiled {pattern}",
            "compiled": (compiled(*arguments) - Attention()(*arguments)).abs().max().item(),
            "exported": (exported.module()(*others) - Attention()(*others)).abs().max().item(),
        }


if __name__ == "__main__":
    for row in {"compile": compiled_and_exported, "more": more_cases}.get(MODE, all_cases)():
        print(json.dumps(row), flush=True)
