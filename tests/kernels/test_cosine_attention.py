"""Cosine attention against a dense mask in float64: on the CPU, in Triton's interpreter, and on a GPU."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kinema.kernels import cosine_attention
from kinema.kernels.cosine_attention import AttentionPattern, as_pattern, gpu_cases, why_not_triton
from kinema.kernels.cosine_attention.reference import cosine_attention_reference

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
# Scales of 44 to 150 instead of 10: logits of 216 in units of log 2 are rounded to 1e-5, and gradients follow.
STRONG = {"float32 strong": 1e-4, "bfloat16 strong": 4e-2}
INTERPRETED = Path(__file__).with_name("cosine_attention_interpreted.py")


def visible(pattern, N, M):
    """The pattern as a boolean matrix, row by row as the paper words it."""
    mask = torch.zeros(N, M, dtype=torch.bool)
    P = pattern.num_pokes
    for r in range(N):
        if pattern.kind == "full":
            mask[r] = True
        elif pattern.kind == "causal" or r < P:
            mask[r, : r + 1] = True
        else:
            seen = (r - P) // ((N - P) // P) if pattern.kind == "query_causal" else P
            mask[r, :seen] = True
            mask[r, r] = True
    return mask


def unit(x):
    return x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()


def turned(x, theta):
    """Rotation as multiplication of complex numbers."""
    if theta is None:
        return x
    R = theta.shape[-1]
    number = torch.complex(x[..., :R], x[..., R : 2 * R]) * torch.exp(1j * theta.to(x.dtype))
    return torch.cat([number.real, number.imag, x[..., 2 * R :]], dim=-1)


def oracle(q, k, v, theta_q, theta_k, scale, pattern):
    """Dense, in float64."""
    q, k, v, scale = (x.double() for x in (q, k, v, scale))
    logits = turned(unit(q), theta_q) @ turned(unit(k), theta_k).transpose(2, 3) * (scale.abs() + 1e-6)[:, None, None]
    hidden = ~visible(as_pattern(pattern), q.shape[2], k.shape[2])
    return logits.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v


def draw(N, M, D, R, batch=2, heads=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, dout = (torch.randn(batch, N, heads, D, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(batch, heads, M, D, generator=generator).to(dtype) for _ in range(2))
    theta_q = theta_k = None
    if R is not None:
        theta_q = 9 * torch.randn(1, heads, N, R, generator=generator)
        theta_k = torch.randn(batch, 1, M, R, generator=generator)
    scale = torch.tensor([10.0, -4.0, 1.0, 7.0])[:heads]
    return [q, k, v, theta_q, theta_k, scale], dout


def with_gradients(function, arguments, dout):
    q, k, v, theta_q, theta_k, scale = arguments
    leaves = [x.detach().requires_grad_() for x in (q, k, v, scale)]
    out = function(*leaves[:3], theta_q, theta_k, leaves[3])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def largest_error(found, right):
    """Relative to the largest value; where that is 0 (rows that see one key only), absolute."""
    errors = []
    for a, b in zip(found, right, strict=True):
        largest = b.abs().max().item()
        errors.append(((a.double() - b).abs().max() / (largest if largest > 1e-9 else 1.0)).item())
    return max(errors)


HEADS = ((32, 16), (64, 32), (64, 24), (72, 18), (96, None), (128, 64), (33, 7))
LENGTHS = [("full", n, m) for n, m in ((1, 7), (7, 1), (63, 127), (127, 63), (1000, 7), (7, 1000))]
LENGTHS += [("causal", n, n) for n in (7, 63, 127, 1000)]
LENGTHS += [
    (("query-causal", p), p * (1 + n), p * (1 + n)) for p, n in ((7, 1), (63, 2), (2, 63), (9, 13), (5, 0), (125, 7))
]
LENGTHS += [(("query-inference", p), p + n, p + n) for p, n in ((1, 6), (7, 1), (63, 64), (1, 126), (7, 0), (7, 993))]
SHAPES = [(*length, *head) for length, head in zip(LENGTHS, itertools.cycle(HEADS), strict=False)]
SHAPES += [(*length, *head) for length, head in zip(LENGTHS, itertools.cycle(HEADS[3:] + HEADS[:3]), strict=False)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("pattern", "N", "M", "D", "R"), SHAPES)
def test_equals_a_dense_mask_in_float64(pattern, N, M, D, R, dtype):
    batch = 1 if N > 100 or M > 100 else 2
    arguments, dout = draw(N, M, D, R, batch=batch, dtype=getattr(torch, dtype), seed=N + D)
    found = with_gradients(lambda *a: cosine_attention(*a, pattern, impl="reference"), arguments, dout)
    assert found[0].dtype == arguments[0].dtype and found[0].shape == arguments[0].shape
    exact = [x if x is None else x.double() for x in arguments]
    right = with_gradients(lambda *a: oracle(*a, pattern), exact, dout)
    assert largest_error(found, right) < TOLERANCE[dtype]


def test_there_are_enough_shapes():
    assert len(set(SHAPES)) >= 40


@pytest.mark.parametrize("pattern", ["full", "causal", ("query-causal", 2), ("query-inference", 3)])
def test_gradients_by_finite_differences(pattern):
    (q, k, v, theta_q, theta_k, scale), _ = draw(6, 6, 6, 2, batch=1)
    leaves = [x.double().requires_grad_() for x in (q, k, v, scale)]

    def function(q, k, v, scale):
        return cosine_attention(q, k, v, theta_q.double(), theta_k.double(), scale, pattern)

    assert torch.autograd.gradcheck(function, leaves)


def test_rows_that_see_only_themselves_return_their_value():
    for pattern, N in ((("query-inference", 0), 5), (("query-causal", 1), 4)):
        (q, k, v, theta_q, theta_k, scale), _ = draw(N, N, 32, 16)
        assert torch.allclose(cosine_attention(q, k, v, theta_q, theta_k, scale, pattern), v, atol=1e-6)


def test_pattern_of_the_published_training_mask(golden):
    """`mask_dense` of the published code: 6 pokes, then 3 queries for each."""
    mask = torch.from_numpy(golden("fpt_small__s0_train").data["mask_dense"]).bool().squeeze()
    assert torch.equal(visible(AttentionPattern("query_causal", 6), 24, 24), mask)


def test_a_shift_of_all_angles_changes_nothing():
    (q, k, v, theta_q, theta_k, scale), _ = draw(9, 9, 64, 32)
    plain = cosine_attention(q, k, v, theta_q, theta_k, scale, "causal")
    shifted = cosine_attention(q, k, v, theta_q + 1.5, theta_k + 1.5, scale, "causal")
    assert torch.allclose(plain, shifted, atol=1e-5)
    assert not torch.allclose(plain, cosine_attention(q, k, v, theta_q + 1.5, theta_k, scale, "causal"), atol=1e-2)


def test_length_of_queries_and_keys_does_not_matter():
    (q, k, v, theta_q, theta_k, scale), _ = draw(9, 9, 64, 32)
    plain = cosine_attention(q, k, v, theta_q, theta_k, scale, "full")
    assert torch.allclose(plain, cosine_attention(30 * q, 7 * k, v, theta_q, theta_k, scale, "full"), atol=1e-5)


def test_angles_get_a_gradient_from_the_reference():
    (q, k, v, theta_q, theta_k, scale), _ = draw(9, 9, 64, 32)
    theta_q.requires_grad_()
    cosine_attention(q, k, v, theta_q, theta_k, scale, "causal").square().sum().backward()
    assert theta_q.grad.abs().max() > 0


def test_autocast_leaves_the_numbers_alone():
    (q, k, v, theta_q, theta_k, scale), _ = draw(12, 12, 64, 32)
    plain = cosine_attention(q, k, v, theta_q, theta_k, scale, ("query-causal", 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cosine_attention(q, k, v, theta_q, theta_k, scale, ("query-causal", 3)), plain)


def test_no_quadratic_tensor():
    """2048 rows: one [N, N] tensor per head would be 16 MiB, the queries against 128 pokes are 1 MiB."""
    (q, k, v, _, _, scale), _ = draw(2048, 2048, 16, None, batch=1, heads=1)
    for pattern in (("query-causal", 128), ("query-inference", 128)):
        with torch.profiler.profile(profile_memory=True) as profile:
            cosine_attention(q, k, v, None, None, scale, pattern)
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert 0 < largest < 8 * 2**20


def test_compiles_and_exports_without_graph_breaks():
    rows = _run_script("compile")
    assert len(rows) == 3
    for row in rows:
        assert row["compiled"] < 1e-6 and row["exported"] < 1e-6, row


def test_pattern_spellings():
    assert as_pattern(("query-causal", 3)) == as_pattern(("query_causal", 3)) == AttentionPattern("query_causal", 3)
    assert as_pattern("full") == AttentionPattern("full")
    pattern = AttentionPattern("query_inference", 2)
    assert as_pattern(pattern) is pattern


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "diagonal"}, "'diagonal' is not one of"),
        ({"pattern": ("causal", 3)}, "no poke prefix"),
        ({"pattern": "query-causal"}, "needs at least 1"),
        ({"pattern": ("query-inference", -1)}, "needs at least 0"),
        ({"pattern": ("query-causal", 5)}, "7 queries cannot be shared out over num_pokes=5"),
        ({"pattern": ("query-inference", 13)}, "a sequence of 12 cannot begin with num_pokes=13"),
        ({"impl": "cuda"}, "impl='cuda' is not one of"),
        ({"impl": "triton"}, "impl='triton' cannot run: .*cpu"),
        ({"k": torch.zeros(2, 2, 11, 32)}, "k and v must have the same shape"),
        ({"k": torch.zeros(2, 2, 11, 32), "v": torch.zeros(2, 2, 11, 32), "theta_k": None}, "as many keys as rows"),
        ({"scale": torch.ones(3)}, r"scale has shape \[3\]; it must be \[2\]"),
        ({"theta_q": torch.zeros(3, 1, 12, 16)}, "theta_q has shape"),
        ({"theta_q": torch.zeros(1, 1, 12, 17)}, "turn 34 dims of a head of size 32; give at most 16"),
        ({"theta_k": torch.zeros(1, 1, 12, 8)}, "must turn alike"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    if os.environ.get("TRITON_INTERPRET") and change.get("impl") == "triton":
        pytest.skip("TRITON_INTERPRET is set, so that the kernel runs on the CPU")
    names = ("q", "k", "v", "theta_q", "theta_k", "scale")
    arguments = dict(zip(names, draw(12, 12, 32, 16)[0], strict=True)) | {"pattern": "causal"} | change
    with pytest.raises(ValueError, match=message):
        cosine_attention(**arguments)


def test_says_why_it_takes_the_reference():
    arguments, _ = draw(12, 12, 32, 16)
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("TRITON_INTERPRET is set, so that the kernel runs on the CPU")
    assert why_not_triton(*arguments, "causal") is not None
    assert torch.equal(
        cosine_attention(*arguments, "causal"), cosine_attention_reference(*arguments, AttentionPattern("causal"))
    )


@pytest.fixture(scope="module")
def interpreted():
    """Rows of the script that runs the kernels in the interpreter."""
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    return _run_script()


def _run_script(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(INTERPRETED), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _assert_right(rows, at_least):
    measured = [row for row in rows if "errors" in row]
    assert len(measured) >= at_least
    wrong = [
        (row["case"], name, error)
        for row in measured
        for name, error in row["errors"].items()
        if not error < (TOLERANCE | STRONG)[row["dtype"]]
    ]
    assert not wrong


def _assert_same_bytes(rows):
    assert [row["same"] for row in rows if "same" in row] == [True, True]


def test_kernels_in_the_interpreter(interpreted):
    """Outputs and gradients against the reference in float64, on poisoned memory; and the same bytes twice."""
    _assert_right(interpreted, at_least=27)
    _assert_same_bytes(interpreted)


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_kernels_in_the_interpreter_on_more_shapes():
    _assert_right(_run_script("more"), at_least=22)


def test_operators_pass_the_library_checks(interpreted):
    (row,) = [row for row in interpreted if row["case"] == "opcheck"]
    for checks in (row["forward"], row["backward"]):
        assert len(checks) == 4 and set(checks.values()) == {"SUCCESS"}


def test_kernel_says_what_it_does_not_take(interpreted):
    rows = {row["case"]: row for row in interpreted if row["case"].startswith("refuses")}
    words = {"float64": "float64", "odd": "33", "large": "192", "angles": "detach", "empty": r"[0, "}
    assert len(rows) == len(words)
    for name, word in words.items():
        row = rows[f"refuses {name}"]
        assert word in row["reason"] and row["reason"] in row["raised"]


def test_wrong_ranks_and_dtypes_are_named(interpreted):
    rows = {row["case"]: row["raised"] for row in interpreted if row["case"].startswith("wrong")}
    assert len(rows) == 7
    assert "[3, 5, 64]" in rows["wrong rank"] and "torch.int32" in rows["wrong integers"]
    assert "torch.float16" in rows["wrong mixed"] and "torch.int32" in rows["wrong integer scale"]
    assert all("must" in message for message in rows.values())


@pytest.mark.parametrize(("kind", "P", "N"), [("causal", 0, 9), ("query_causal", 3, 12), ("query_inference", 4, 9)])
def test_masks_and_counts_of_the_gpu_baselines(kind, P, N):
    pattern = AttentionPattern(kind, P)
    mask = visible(pattern, N, N)
    assert torch.equal(gpu_cases.visible(pattern, N, torch.arange(N)[:, None], torch.arange(N)[None]), mask)
    assert gpu_cases.num_seen(pattern, N, N) == mask.sum()


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = _run_script("cuda")
    _assert_right(rows, at_least=41)
    _assert_same_bytes(rows)
