"""Local correlation: the definition written out, precision on many shapes, gradients, memory, the kernels' source."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.kernels import local_correlation
from kinema.kernels.correlation_lookup import correlation_lookup
from kinema.kernels.local_correlation import why_not_triton
from kinema.kernels.local_correlation.reference import local_correlation_plain
from kinema.pipelines.bench import local_correlation as bench
from tests.kernels.local_correlation_interpreted import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    TOLERANCES,
    case_name,
    interpreted_cases,
    maps,
    quick_cases,
    relative_errors,
)

# As large as the CPU does in a moment; the interpreter could not.
LARGER_SHAPES = ((1, 63, 63, 127, 4), (2, 7, 127, 63, 3), (1, 3, 1000, 7, 4), (1, 127, 7, 1000, 1), (1, 1000, 9, 11, 2))
GRADIENTS = ("result", "gradient 1", "gradient 2")


def _windows_by_hand(fmap1, fmap2, radius):
    B, C, H, W = fmap1.shape
    rows = []
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            plane = torch.zeros(B, H, W)
            for y in range(H):
                for x in range(W):
                    if 0 <= y + dy < H and 0 <= x + dx < W:
                        plane[:, y, x] = (fmap1[:, :, y, x] * fmap2[:, :, y + dy, x + dx]).sum(1) / math.sqrt(C)
            rows.append(plane)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("function", [local_correlation, local_correlation_plain])
def test_windows_follow_the_definition(function):
    fmap1, fmap2 = maps((2, 3, 4, 6), torch.float32, "contiguous")
    found = function(fmap1, fmap2, 2)
    assert found.shape == (2, 25, 4, 6) and found.dtype == torch.float32
    assert torch.allclose(found, _windows_by_hand(fmap1, fmap2, 2), atol=1e-6)


def test_a_shift_shows_in_the_channel_of_its_displacement():
    """The scene moves 3 right and 1 up: each pixel agrees best with the one at (dy, dx) = (-1, 3)."""
    scene = F.normalize(torch.randn(1, 32, 20, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    moved = torch.roll(scene, (-1, 3), (2, 3))
    best = local_correlation(scene, moved, 4).argmax(1)[0, 4:-4, 4:-4]
    assert (best == (-1 + 4) * 9 + (3 + 4)).all()


def test_it_is_the_lookup_at_zero_motion():
    """RAFT's lookup on one level with every pixel looking at its own place; there, x is the outer axis."""
    fmap1, fmap2 = maps((2, 19, 9, 12), torch.float32, "contiguous")
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    looked_up = correlation_lookup(fmap1, [fmap2], torch.stack([x, y]).expand(2, 2, 9, 12), 3)
    expected = looked_up.unflatten(1, (7, 7)).transpose(1, 2).flatten(1, 2)
    assert torch.allclose(local_correlation(fmap1, fmap2, 3), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LARGER_SHAPES, ids=str)
def test_reference_is_as_precise_as_its_dtype(shape, dtype):
    layout = LAYOUTS[(sum(shape) + DTYPES.index(dtype)) % len(LAYOUTS)]
    errors = relative_errors(shape, dtype, layout, impl="reference", device="cpu")
    assert max(errors.values()) < TOLERANCES[dtype], errors
    assert errors["result"] < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LARGER_SHAPES, ids=str)
def test_kernels_on_the_device_are_as_precise_as_their_dtype(shape, dtype, layout):
    errors = relative_errors(shape, dtype, layout, impl="triton", device="cuda")
    assert max(errors.values()) < TOLERANCES[dtype], errors


@pytest.mark.parametrize(("shape", "radius"), [((2, 2, 3, 4), 0), ((2, 3, 4, 3), 1), ((1, 2, 3, 5), 3)])
def test_gradients_of_first_and_second_order(shape, radius):
    fmap1, fmap2 = (t.double().requires_grad_() for t in maps(shape, torch.float32, "channels-last"))

    def function(a, b):
        return local_correlation(a, b, radius)

    assert torch.autograd.gradcheck(function, (fmap1, fmap2))
    assert torch.autograd.gradgradcheck(function, (fmap1, fmap2))


def test_one_map_may_need_no_gradient():
    fmap1, fmap2 = maps((1, 4, 5, 6), torch.float32, "contiguous")
    both = [fmap1.clone().requires_grad_(), fmap2.clone().requires_grad_()]
    local_correlation(both[0], both[1], 2).sum().backward()
    for index in range(2):
        one = [fmap1.clone(), fmap2.clone()]
        one[index].requires_grad_()
        local_correlation(one[0], one[1], 2).sum().backward()
        assert torch.equal(one[index].grad, both[index].grad)


def test_the_same_input_gives_the_same_bytes():
    results = []
    for _ in range(2):
        leaves = [t.requires_grad_() for t in maps((2, 40, 30, 41), torch.float32, "contiguous")]
        out = local_correlation(leaves[0], leaves[1], 4)
        results.append([out, *torch.autograd.grad(out, leaves, out.detach().sin())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class _LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_no_copy_of_the_features_per_displacement():
    """Unfolding makes 81 copies of a map; here no tensor exceeds the map or the windows by half, and maps are kept."""
    fmap1, fmap2 = (t.requires_grad_() for t in maps((1, 128, 40, 64), torch.float32, "contiguous"))
    kept = []
    with _LargestStorage() as storage:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
            out = local_correlation(fmap1, fmap2, 4)
        out.sum().backward()
    assert storage.largest < 1.5 * max(fmap1.nbytes, out.nbytes)
    assert set(kept) == {fmap1.data_ptr(), fmap2.data_ptr()}


@pytest.mark.parametrize(
    ("layout", "memory_format"), [("contiguous", torch.contiguous_format), ("channels-last", torch.channels_last)]
)
def test_memory_format_is_kept(layout, memory_format):
    leaves = [t.requires_grad_() for t in maps((2, 3, 4, 5), torch.float32, layout)]
    out = local_correlation(leaves[0], leaves[1], 1)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(t.is_contiguous(memory_format=memory_format) for t in (out, *grads))


def test_autocast_does_not_lower_the_precision():
    leaves = [t.requires_grad_() for t in maps((1, 16, 9, 8), torch.float32, "contiguous")]
    plain = local_correlation(leaves[0], leaves[1], 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = local_correlation(leaves[0], leaves[1], 2)
        grads = torch.autograd.grad(out.square().sum(), leaves)
    assert torch.equal(out, plain)
    assert all(map(torch.equal, grads, torch.autograd.grad(plain.square().sum(), leaves)))


def test_exports_with_free_sizes():
    class Correlate(torch.nn.Module):
        def forward(self, fmap1, fmap2):
            return local_correlation(fmap1, fmap2, 2)

    free = torch.export.Dim.DYNAMIC
    sizes = {0: free, 2: free, 3: free}
    example = maps((2, 5, 7, 9), torch.float32, "contiguous")
    exported = torch.export.export(Correlate(), example, dynamic_shapes=(sizes, sizes)).module()
    other = maps((3, 5, 12, 4), torch.float32, "contiguous")
    assert torch.allclose(exported(*other), local_correlation(*other, 2), atol=1e-5)


def test_an_empty_batch_gives_an_empty_result():
    leaves = [t.requires_grad_() for t in maps((0, 3, 4, 5), torch.float32, "contiguous")]
    out = local_correlation(leaves[0], leaves[1], 2)
    out.sum().backward()
    assert out.shape == (0, 25, 4, 5) and leaves[0].grad.shape == (0, 3, 4, 5)


def test_bad_arguments_are_named():
    fmap1, fmap2 = maps((2, 3, 4, 5), torch.float32, "contiguous")
    with pytest.raises(ValueError, match=r"fmap2 is \[2, 3, 4, 4\].*one shape.*pad"):
        local_correlation(fmap1, fmap2[..., 1:], 1)
    with pytest.raises(ValueError, match=r"fmap1 is \[3, 4, 5\].*must be \[B, C, H, W\].*unsqueeze"):
        local_correlation(fmap1[0], fmap2[0], 1)
    with pytest.raises(ValueError, match=r"at least one channel and pixel"):
        local_correlation(fmap1[:, :0], fmap2[:, :0], 1)
    with pytest.raises(ValueError, match=r"float32 and fmap2 is torch.float16.*one dtype.*\.to\(dtype\)"):
        local_correlation(fmap1, fmap2.half(), 1)
    with pytest.raises(ValueError, match=r"int64.*must have one dtype out of float32"):
        local_correlation(fmap1.long(), fmap2.long(), 1)
    with pytest.raises(ValueError, match=r"on cpu and fmap2 on meta.*one device"):
        local_correlation(fmap1, fmap2.to("meta"), 1)
    with pytest.raises(ValueError, match=r"radius=-1 is not a whole number of at least 0; radius=4"):
        local_correlation(fmap1, fmap2, -1)
    with pytest.raises(ValueError, match=r"impl='cuda' is not one of"):
        local_correlation(fmap1, fmap2, 1, impl="cuda")


def test_a_forced_kernel_that_cannot_run_says_why():
    fmap1, fmap2 = maps((1, 3, 4, 5), torch.float32, "contiguous")
    reason = why_not_triton(fmap1, fmap2, 2)
    assert reason is not None
    with pytest.raises(ValueError) as caught:
        local_correlation(fmap1, fmap2, 2, impl="triton")
    assert reason in str(caught.value)
    assert "float64" in why_not_triton(fmap1.double(), fmap2.double(), 2)
    assert "radius=29" in why_not_triton(fmap1, fmap2, 29)


def test_the_benchmark_compares_equals():
    fmap1, fmap2 = maps((2, 5, 7, 9), torch.float32, "contiguous")
    assert torch.allclose(
        bench.local_correlation_unfolded(fmap1, fmap2, 3), local_correlation(fmap1, fmap2, 3), atol=1e-5
    )
    rows = bench.run(channels=4, height=5, width=6, radius=1, rounds=1)
    assert len(rows) == 4 and all(row["ratio"] == pytest.approx(row["baseline"] / row["value"]) for row in rows)


@pytest.fixture(scope="module")
def interpreted():
    """What the kernels' source gives in the interpreter, by case name."""
    return _run_script()


def _run_script(*arguments):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    script = Path(__file__).with_name("local_correlation_interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


def _assert_precise(errors, dtype):
    assert all(errors[name] < TOLERANCES[dtype] for name in GRADIENTS), errors
    assert errors["result"] < 1e-5


@pytest.mark.parametrize("case", quick_cases(), ids=lambda case: case_name(*case))
def test_kernels_in_the_interpreter_are_as_precise_as_their_dtype(interpreted, case):
    """Results and gradients; memory that a kernel left unwritten would be nan."""
    _assert_precise(interpreted[case_name(*case)], case[1])


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_so_are_they_on_every_other_shape():
    found = _run_script("more")
    others = [case for case in interpreted_cases() if case not in quick_cases()]
    assert len(found) == len(others) >= 25
    for case in others:
        _assert_precise(found[case_name(*case)], case[1])


def test_kernels_in_the_interpreter_keep_the_contract(interpreted):
    assert interpreted["deterministic"] is True
    assert interpreted["memory formats"] == {"contiguous": True, "channels-last": True}
    assert interpreted["second derivatives"] < 1e-5
    assert interpreted["empty batch"] == [0, 9, 4, 5]
    # The reference is compiled there too: the import hook of this process is more than torch.compile can trace.
    assert interpreted["compiled"]["triton"] < 1e-6 and interpreted["compiled"]["reference"] < 1e-5
    copied = {name for name, is_copy in interpreted["repacked"].items() if is_copy}
    assert copied == {"odd radius", "odd width", "odd channels"}
    for op, checks in interpreted["opcheck"].items():
        assert len(checks) == 4 and set(checks.values()) == {"SUCCESS"}, (op, checks)
