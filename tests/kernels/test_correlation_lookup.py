"""Correlation lookup: the definition written out, on demand against the volume, gradients, edges, errors, kernels."""

import importlib
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

from kinema.kernels import correlation_lookup
from kinema.kernels.correlation_lookup import (
    correlation_pyramid,
    feature_pyramid,
    free_memory,
    plan_lookup,
    volume_bytes,
    volume_lookup,
    why_not_triton,
)
from kinema.kernels.correlation_lookup.reference import correlation_lookup_reference
from kinema.kernels.correlation_lookup.window import check_window
from kinema.kernels.dispatch import INTERPRETING
from tests.kernels.correlation_lookup_interpreted import (
    DTYPES,
    SHAPES,
    TOLERANCES,
    case_name,
    interpreted_cases,
    quick_cases,
    relative_errors,
)

# (B, C, H, W, h, w, levels, radius): as large as the CPU does in a moment; the interpreter could not.
LARGER_SHAPES = (
    *((1, 7, 63, 127, 63, 127, 4, 2), (1, 7, 127, 63, 127, 63, 2, 3), (1, 3, 3, 1000, 3, 1000, 1, 4)),
    *((1, 1000, 17, 11, 11, 17, 2, 1), (1, 127, 1, 63, 8, 127, 3, 1)),
)


def _case(batch=2, channels=19, height=21, width=17, target=(23, 18), spread=6.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fmap1 = torch.randn(batch, channels, height, width, generator=generator)
    fmap2 = torch.randn(batch, channels, *target, generator=generator)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    noise = spread * torch.randn(batch, 2, height, width, generator=generator)
    return fmap1, fmap2, torch.stack([x, y]) + noise


def _value(level, b, y, x):
    """Bilinear value of a map [B, h, w] at one point, by definition; 0 outside."""
    h, w = level.shape[1:]
    total = 0.0
    for yi in (math.floor(y), math.floor(y) + 1):
        for xi in (math.floor(x), math.floor(x) + 1):
            if 0 <= yi < h and 0 <= xi < w:
                total += (1 - abs(y - yi)) * (1 - abs(x - xi)) * level[b, yi, xi].item()
    return total


def test_windows_follow_the_definition():
    fmap1, fmap2, coords = _case(batch=1, channels=3, height=3, width=4, target=(9, 11), spread=3.0)
    radius, levels = 2, 3
    found = correlation_lookup(fmap1, feature_pyramid(fmap2, levels), coords, radius)
    width = 2 * radius + 1
    assert found.shape == (1, levels * width * width, 3, 4)
    for row, column in ((0, 0), (2, 3), (1, 2)):
        products = (fmap1[0, :, row, column, None, None] * fmap2[0]).sum(0)[None] / math.sqrt(3)
        channel = 0
        for level in range(levels):
            volume = products if level == 0 else F.avg_pool2d(products, 2**level)
            x, y = (coords[0, :, row, column] / 2**level).tolist()
            for dx in range(-radius, radius + 1):
                for dy in range(-radius, radius + 1):
                    expected = _value(volume, 0, y + dy, x + dx)
                    assert found[0, channel, row, column].item() == pytest.approx(expected, abs=1e-5)
                    channel += 1


@pytest.mark.parametrize("radius", [1, 3, 4])
@pytest.mark.parametrize("sizes", [((21, 17), (23, 18)), ((8, 8), (8, 8)), ((13, 31), (63, 9))])
def test_on_demand_equals_the_volume(sizes, radius):
    fmap1, fmap2, coords = _case(height=sizes[0][0], width=sizes[0][1], target=sizes[1])
    whole = volume_lookup(correlation_pyramid(fmap1, fmap2), coords, radius)
    on_demand = correlation_lookup(fmap1, feature_pyramid(fmap2), coords, radius)
    assert on_demand.shape == whole.shape and on_demand.dtype == torch.float32
    assert (on_demand - whole).abs().max() < 1e-5 * whole.abs().max()


def _published(fmap1, fmap2, coords, radius, num_levels, y_major=False):
    """The published formulation: grid sampling of the volume, align_corners True, zeros outside, float64."""
    B, C, H, W = fmap1.shape
    volume = torch.einsum("bcyx,bcvu->byxvu", fmap1, fmap2).reshape(-1, 1, *fmap2.shape[2:]) / math.sqrt(C)
    offsets = torch.arange(-radius, radius + 1.0, dtype=fmap1.dtype)
    delta = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)  # [x, y, 2]
    delta = delta.transpose(0, 1) if y_major else delta
    rows = []
    for level in range(num_levels):
        points = coords.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2) / 2**level + delta
        size = torch.tensor([volume.shape[-1], volume.shape[-2]])
        rows.append(F.grid_sample(volume, 2 * points / (size - 1) - 1, align_corners=True).view(B, H, W, -1))
        volume = F.avg_pool2d(volume, 2) if level + 1 < num_levels else volume
    return torch.cat(rows, -1).permute(0, 3, 1, 2)


def _relative(found, expected):
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("way", ["volume", "boxed", "gathered"])
@pytest.mark.parametrize("window_order", ["x_major", "y_major"])
@pytest.mark.parametrize("spread", [0.4, 7.0, 40.0])
@pytest.mark.parametrize("target", [(16, 24), (23, 31)], ids=str)
def test_values_and_gradients_are_those_of_the_published_sampling(target, spread, window_order, way):
    """Inside, across the border and outside; at odd sizes pooling drops a row and a column."""
    fmap1, fmap2, coords = _case(height=19, width=13, target=target, spread=spread)
    leaves = [fmap1.requires_grad_(), fmap2.requires_grad_()]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    if way == "volume":
        found = volume_lookup(correlation_pyramid(*leaves), coords, 3, window_order)
    else:
        pyramid = feature_pyramid(leaves[1])
        found = correlation_lookup_reference(leaves[0], pyramid, coords, 3, window_order, boxed=way == "boxed")
    exact = _published(*exact_leaves, coords.double(), 3, 4, window_order == "y_major")
    assert _relative(found, exact) < 3e-6
    weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(found, leaves, weight)
    for grad, exact_grad in zip(grads, torch.autograd.grad(exact, exact_leaves, weight.double()), strict=True):
        assert _relative(grad, exact_grad) < 3e-6


@pytest.mark.parametrize("way", ["volume", "boxed", "gathered"])
def test_coordinates_that_are_not_finite_give_nan_without_gradient(way):
    """As grid sampling does, so that one bad vector does not poison the weights of a network."""
    fmap1, fmap2, coords = _case(height=9, width=10, target=(9, 10))
    coords[0, 0, 2, 3], coords[0, 1, 5, 5], coords[1, 0, 0, 0] = math.nan, math.inf, -math.inf
    results = []
    for function in (way, "published"):
        leaves = [t.double().requires_grad_() for t in (fmap1, fmap2)]
        if function == "published":
            out = _published(*leaves, coords.double(), 2, 2)
        elif function == "volume":
            out = volume_lookup(correlation_pyramid(*leaves, 2), coords, 2)
        else:
            out = correlation_lookup_reference(
                leaves[0], feature_pyramid(leaves[1], 2), coords, 2, boxed=way == "boxed"
            )
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    assert results[0][0].isnan().any(1).sum() == 3 and results[0][0].isnan().all(1).sum() == 3
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("boxed", [True, False])
def test_gradcheck(boxed):
    """Two tiles, some queries far from their neighbours, windows across the border."""
    fmap1, fmap2, coords = _case(batch=1, channels=2, height=2, width=9, target=(9, 30), spread=2.0)
    coords[:, :, 0, ::4] += 17.0
    leaves = [fmap1.double().requires_grad_(), *(t.double().requires_grad_() for t in feature_pyramid(fmap2, 2))]
    assert torch.autograd.gradcheck(
        lambda a, *b: correlation_lookup_reference(a, list(b), coords.double(), 1, boxed=boxed), leaves, fast_mode=True
    )


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_as_precise_as_its_dtype(dtype, boxed):
    """Results and gradients against float64, on many shapes, layouts and motions."""
    own = [case for case in interpreted_cases() if case[1] == dtype]
    turn = DTYPES.index(dtype) + 3 * boxed  # each of the larger shapes meets every dtype, one way or the other
    larger = [(shape, dtype, "strided", "y_major", 3.0) for n, shape in enumerate(LARGER_SHAPES) if (n + turn) % 2]
    assert len(SHAPES) + len(LARGER_SHAPES) >= 40
    for case in (*own, *larger):
        errors = relative_errors(case, "reference", "cpu", boxed=boxed)
        assert max(errors.values()) < TOLERANCES[dtype] and errors["result"] < 1e-5, (case_name(case), errors)


def test_gradients_of_both_ways_agree_and_are_those_of_the_definition():
    fmap1, fmap2, coords = (t.double() for t in _case(batch=1, channels=4, height=5, width=4, target=(9, 8)))
    weight = torch.randn(1, 4 * 9, 5, 4)
    gradients = []
    for look_up in (
        lambda a, b, c: volume_lookup(correlation_pyramid(a, b), c, 1),
        lambda a, b, c: correlation_lookup(a, feature_pyramid(b), c, 1),
    ):
        leaves = [t.float().requires_grad_() for t in (fmap1, fmap2, coords)]
        (look_up(*leaves) * weight).sum().backward()
        assert leaves[2].grad is None  # as published: positions carry no gradient
        gradients.append([leaf.grad for leaf in leaves[:2]])
    for whole, on_demand in zip(*gradients, strict=True):
        assert (whole - on_demand).abs().max() < 1e-5 * whole.abs().max()
    step, direction = 1e-2, torch.randn(1, 4, 9, 8)

    def total(b):
        return (volume_lookup(correlation_pyramid(fmap1.float(), b), coords.float(), 1) * weight).sum()

    numeric = (total(fmap2.float() + step * direction) - total(fmap2.float() - step * direction)) / (2 * step)
    assert numeric.item() == pytest.approx((gradients[0][1] * direction).sum().item(), rel=1e-3)


@pytest.mark.parametrize("far", [-1e4, 1e4, -1e20, 1e20, 60.0, -60.0])
def test_far_outside_is_zero(far):
    fmap1, fmap2, coords = _case()
    coords = torch.full_like(coords, far)
    assert (correlation_lookup(fmap1, feature_pyramid(fmap2), coords, 3) == 0).all()
    assert (volume_lookup(correlation_pyramid(fmap1, fmap2), coords, 3) == 0).all()


def test_memory_outside_the_maps_is_not_read():
    """Maps cut out of nan-filled storage, with strides: windows at the border stay finite."""
    fmap1, fmap2, coords = _case()
    stores = [torch.full((2, 19, s.shape[2] + 4, 2 * s.shape[3] + 4), math.nan) for s in (fmap1, fmap2)]
    views = [
        store[:, :, 2 : 2 + t.shape[2], 2 : 2 + 2 * t.shape[3] : 2]
        for store, t in zip(stores, (fmap1, fmap2), strict=True)
    ]
    for view, t in zip(views, (fmap1, fmap2), strict=True):
        view.copy_(t)
    found = correlation_lookup(views[0], feature_pyramid(views[1]), coords, 3)
    assert torch.allclose(found, correlation_lookup(fmap1, feature_pyramid(fmap2), coords, 3), atol=1e-6)


def test_half_precision_features_are_accumulated_in_float32():
    fmap1, fmap2, coords = _case()
    half = [t.bfloat16() for t in (fmap1, fmap2)]
    found = volume_lookup(correlation_pyramid(*half), coords, 3)
    exact = volume_lookup(correlation_pyramid(*(t.float() for t in half)), coords, 3)
    assert found.dtype == torch.float32 and torch.equal(found, exact)


def test_memory_of_the_volume_is_known_beforehand():
    fmap1, fmap2, _ = _case(height=23, width=18)
    pyramid = correlation_pyramid(fmap1, fmap2)
    assert volume_bytes(2, 23, 18) == sum(4 * level.numel() for level in pyramid)


def test_bad_arguments_are_named():
    fmap1, fmap2, coords = _case()
    pyramid = feature_pyramid(fmap2)
    with pytest.raises(ValueError, match="batch size and channels"):
        correlation_lookup(fmap1[:, :5], pyramid, coords, 3)
    with pytest.raises(ValueError, match="batch size and channels"):
        correlation_pyramid(fmap1[:1], fmap2)
    with pytest.raises(ValueError, match="one \\(x, y\\) per pixel"):
        correlation_lookup(fmap1, pyramid, coords[..., 1:], 3)
    with pytest.raises(ValueError, match="impl='cuda'"):
        correlation_lookup(fmap1, pyramid, coords, 3, impl="cuda")
    with pytest.raises(ValueError, match="at least 8"):
        feature_pyramid(fmap2[..., :7])
    with pytest.raises(ValueError, match="window_order='z'"):
        check_window(3, "z")  # in the tests, the annotation is checked before
    with pytest.raises(ValueError, match="radius=-1 must be at least 0"):
        correlation_lookup(fmap1, pyramid, coords, -1)
    with pytest.raises(ValueError, match="fmap2_pyramid is empty"):
        correlation_lookup(fmap1, [], coords, 3)
    with pytest.raises(ValueError, match="float16.*must have one floating-point type"):
        correlation_lookup(fmap1.half(), pyramid, coords, 3)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("spread", [0.5, 30.0])
def test_memory_is_linear_in_the_pixels(spread):
    """Sixteen times the pixels: no tensor grows more, forward or backward, and only the inputs are kept."""
    largest = []
    for side in (24, 96):
        fmap1, fmap2, coords = _case(1, 8, side, side, (side, side), spread)
        leaves = [fmap1.requires_grad_(), *(t.requires_grad_() for t in feature_pyramid(fmap2))]
        saved = []
        with _Largest() as mode:
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                out = correlation_lookup(leaves[0], leaves[1:], coords, 4)
            out.backward(torch.ones_like(out))
        assert sum(t.numel() for t in saved) == coords.numel() + sum(t.numel() for t in leaves)
        largest.append(mode.elements)
    assert largest[1] <= 16 * largest[0] and largest[1] < volume_bytes(1, 96, 96) / 4


@pytest.mark.skipif(INTERPRETING, reason="the interpreter takes CPU tensors")
def test_forced_triton_says_why_it_cannot_run():
    fmap1, fmap2, coords = _case()
    pyramid = feature_pyramid(fmap2)
    reason = why_not_triton(fmap1, pyramid, coords, 3)
    assert reason is not None
    with pytest.raises(ValueError, match="impl='triton' cannot run: ") as error:
        correlation_lookup(fmap1, pyramid, coords, 3, impl="triton")
    assert reason in str(error.value)


def test_limits_of_the_kernels_are_sentences(monkeypatch):
    # By name: the package's attribute is the function.
    module = importlib.import_module("kinema.kernels.correlation_lookup")
    monkeypatch.setattr(module, "why_no_triton", lambda *tensors: None)
    fmap1, fmap2, coords = _case()
    assert why_not_triton(fmap1, feature_pyramid(fmap2), coords, 3) is None
    assert "float64" in why_not_triton(fmap1.double(), feature_pyramid(fmap2.double()), coords, 3)
    wide = torch.zeros(1, 1, 1, 1).expand(1, 64, 5000, 5000)
    assert "2^31" in why_not_triton(wide, [wide], torch.zeros(1, 2, 1, 1).expand(1, 2, 5000, 5000), 4)
    many = torch.zeros(1, 1, 1, 1).expand(70000, 1, 1, 1)
    assert "70000" in why_not_triton(many, [many], torch.zeros(1, 2, 1, 1).expand(70000, 2, 1, 1), 0)


def test_plan_takes_the_volume_where_it_fits_and_is_faster():
    small = plan_lookup(1, 28, 28, 256, 12, 8 * 2**30)
    assert small.kind == "volume" and small.volume_s < small.on_demand_s
    assert small.volume_bytes == volume_bytes(1, 28, 28) and "fits in 50% of the 8.00 GiB free" in small.reason
    large = plan_lookup(1, 135, 240, 256, 12, 64 * 2**30)  # 1080p: it fits, and is slower
    assert large.kind == "on_demand" and large.on_demand_s < large.volume_s and "of the time" in large.reason
    tight = plan_lookup(1, 55, 128, 256, 32, 400 * 2**20)
    assert "estimates are a CPU's" not in small.reason
    on_card = plan_lookup(1, 28, 28, 256, 12, 8 * 2**30, device_type="cuda")
    assert on_card.reason.endswith("the estimates are a CPU's, nothing was measured on this cuda device")
    assert tight.kind == "on_demand" and "249.2 MiB" in tight.reason and "400.0 MiB free on the cpu" in tight.reason
    assert plan_lookup(1, 28, 28, 256, 12, 8 * 2**20).kind == "volume"
    assert plan_lookup(1, 28, 28, 256, 12, 8 * 2**20, training=True).kind == "on_demand"  # two copies more
    with pytest.raises(ValueError, match="iters=0 must be at least 1"):
        plan_lookup(1, 28, 28, 256, 0, 2**30)


def test_iterations_pay_for_the_volume():
    """More lookups in the same pair turn the choice from on demand to the volume, never back."""
    kinds = [plan_lookup(1, 90, 160, 256, iters, 16 * 2**30).kind for iters in (1, 4, 12, 32, 100, 400)]
    assert kinds[0] == "on_demand" and kinds[-1] == "volume" and kinds == sorted(kinds)


def test_free_memory_is_no_more_than_the_machine_has():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory(torch.device("cpu")) <= total


@pytest.fixture(scope="module")
def interpreted():
    """What the kernels' source gives in the interpreter, by case name."""
    return _run_script()


def _run_script(*arguments):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    script = Path(__file__).with_name("correlation_lookup_interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


def _assert_precise(errors, case):
    assert len(errors) == 2 + case[0][6]
    assert all(error < TOLERANCES[case[1]] for error in errors.values()), errors
    assert errors["result"] < 1e-5


@pytest.mark.parametrize("case", quick_cases(), ids=case_name)
def test_kernels_in_the_interpreter_are_as_precise_as_their_dtype(interpreted, case):
    """Results and gradients; memory that a kernel left unwritten would be nan."""
    _assert_precise(interpreted[case_name(case)], case)


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_so_are_they_on_every_other_shape():
    found = _run_script("more")
    others = [case for case in interpreted_cases() if case not in quick_cases()]
    assert len(found) == len(others) >= 25
    for case in others:
        _assert_precise(found[case_name(case)], case)


def test_kernels_in_the_interpreter_keep_the_contract(interpreted):
    assert interpreted["not finite"] == {"nan": True, "zero": True, "finite elsewhere": True, "no gradient": True}
    assert interpreted["deterministic"] is True
    assert interpreted["needed gradients"] is True
    assert interpreted["compiled"] is True
    for op, checks in interpreted["opcheck"].items():
        assert len(checks) == 4 and set(checks.values()) == {"SUCCESS"}, (op, checks)


def test_float32_maps_may_be_multiplied_with_fewer_bits(interpreted):
    """2^-11 is what TF32 rounds by."""
    full, fewer = interpreted["tf32"]["float32"], interpreted["tf32"]["tf32"]
    assert max(full.values()) < 1e-5
    assert all(1e-5 < error < 1e-3 for error in fewer.values()), fewer
    with pytest.raises(ValueError, match="precision='half' is not one of"):
        correlation_lookup(
            *_case(1, 4, 8, 8, (8, 8))[:1], [torch.zeros(1, 4, 8, 8)], torch.zeros(1, 2, 8, 8), 1, precision="half"
        )


def test_a_lookup_is_one_launch_and_maps_are_split_once(interpreted):
    assert interpreted["launches"] == ["split_kernel", "split_kernel", "lookup_kernel", "lookup_kernel"]


def test_the_kernel_reads_a_stored_volume_as_torch_samples_it(interpreted):
    errors = interpreted["stored volume"]
    assert len(errors) == 2 * 4 + 1
    assert max(errors.values()) < 1e-5, errors


def test_compiler_and_export_see_through_the_dispatch(interpreted):
    """Measured in the other process: here the tests' shape checks draw random numbers, which a compiler refuses."""
    errors = interpreted["reference compiled"]
    assert set(errors) == {"compiled", "gradient", "exported"}
    assert max(errors.values()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_on_the_device_are_as_precise_as_their_dtype(dtype):
    layouts = ("contiguous", "channels-last", "strided", "transposed")
    for index, shape in enumerate((*SHAPES, *LARGER_SHAPES)):
        case = (shape, dtype, layouts[index % 4], ("x_major", "y_major")[index % 2], (0.5, 6.0, 30.0)[index % 3])
        errors = relative_errors(case, "triton", "cuda")
        assert max(errors.values()) < TOLERANCES[dtype] and errors["result"] < 1e-5, (case_name(case), errors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_gives_the_same_bytes_twice():
    fmap1, fmap2, coords = (t.cuda() for t in _case(2, 64, 63, 127, (63, 127)))
    results = []
    for _ in range(2):
        leaves = [fmap1.clone().requires_grad_(), *(t.clone().requires_grad_() for t in feature_pyramid(fmap2))]
        out = correlation_lookup(leaves[0], leaves[1:], coords, 4, impl="triton")
        results.append([out, *torch.autograd.grad(out, leaves, out.detach().sin())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("boxed", [True, False])
def test_autocast_rounds_no_products(boxed):
    """Callers who want 16 bits give maps of 16 bits; products and their sums stay float32."""
    fmap1, fmap2, coords = _case(batch=1, height=17, width=18, target=(17, 18))
    pooled = feature_pyramid(fmap2, 2)
    expected = [correlation_pyramid(fmap1, fmap2, 2)[0], correlation_lookup_reference(fmap1, pooled, coords, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        volume = correlation_pyramid(fmap1, fmap2, 2)[0]
        windows = correlation_lookup_reference(fmap1, pooled, coords, 2, boxed=boxed)
    for found, exact in zip((volume, windows), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
