"""Convex upsampling: the definition, RAFT's own form, arguments, gradients, the kernels' source."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kinema.kernels.convex_upsampling import convex_upsample, why_not_triton
from tests.kernels.convex_upsampling_interpreted import CASES, TOLERANCES, case_name, errors, inputs

SMALL = ((2, 2, 3, 5, 2), torch.float32, "contiguous")


def test_fine_pixels_follow_the_definition():
    maps, logits = inputs(SMALL)
    found = convex_upsample(maps, logits, 0.25)
    B, C, H, W = maps.shape
    padded = F.pad(maps, (1, 1, 1, 1))
    assert found.shape == (B, C, 2 * H, 2 * W)
    for y, x, j, i in ((0, 0, 0, 0), (1, 2, 1, 0), (2, 4, 0, 1), (2, 4, 1, 1)):
        weights = (0.25 * logits[:, [(k * 2 + j) * 2 + i for k in range(9)], y, x]).softmax(1)
        near = torch.stack([padded[:, :, y + k // 3, x + k % 3] for k in range(9)], 2)
        assert torch.allclose(found[:, :, 2 * y + j, 2 * x + i], (weights[:, None] * near).sum(2), atol=1e-6)


def test_one_sure_neighbour_is_copied_and_outside_is_zero():
    maps = torch.arange(1.0, 13.0).view(1, 1, 3, 4)
    logits = torch.zeros(1, 9, 8, 8, 3, 4)
    logits[:, 5] = 100.0
    found = convex_upsample(maps, logits.view(1, 576, 3, 4))
    right = F.pad(maps, (0, 1))[..., 1:]
    assert torch.allclose(found, F.interpolate(right, scale_factor=8, mode="nearest"))


def test_gradients_by_finite_differences():
    maps, logits = (t.double().requires_grad_() for t in inputs(((1, 2, 2, 3, 2), torch.float32, "contiguous")))
    assert torch.autograd.gradcheck(lambda a, b: convex_upsample(a, b, 0.25), (maps, logits))


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_the_reference_is_as_precise_as_its_dtype(case):
    found = errors(case, "reference")
    assert found["result"] < 1e-6 and found["maps"] < 1e-6 and found["logits"] < TOLERANCES[case[1]], found


@pytest.mark.parametrize(
    ("maps", "logits", "words"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(1, 36, 3, 4), r"maps are \[2, 3, 4\]"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 36, 3, 5), "B, H and W must agree"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 37, 3, 4), "37 channels, which must be 9 f"),
        (torch.zeros(1, 2, 3, 4), torch.zeros(1, 36, 3, 4, dtype=torch.int32), "torch.int32"),
    ],
)
def test_wrong_arguments_are_named(maps, logits, words):
    with pytest.raises(ValueError, match=words):
        convex_upsample(maps, logits)


def test_says_why_it_takes_the_reference():
    maps, logits = inputs(SMALL)
    assert "float64" in why_not_triton(maps.double(), logits)
    assert "the factor 9" in why_not_triton(maps, torch.zeros(2, 729, 3, 5))
    assert "17 channels" in why_not_triton(torch.zeros(2, 17, 3, 5), logits)
    with pytest.raises(ValueError, match="cannot run"):
        convex_upsample(maps.double(), logits, impl="triton")


@pytest.fixture(scope="module")
def interpreted():
    """What the kernels' source gives in the interpreter, by case name."""
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    script = Path(__file__).with_name("convex_upsampling_interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_kernels_in_the_interpreter_are_as_precise_as_their_dtype(interpreted, case):
    """Result and gradients; memory that a kernel left unwritten would be nan."""
    found = interpreted[case_name(case)]
    assert found["result"] < 1e-6 and found["maps"] < 1e-6 and found["logits"] < TOLERANCES[case[1]], found


def test_kernels_in_the_interpreter_keep_the_contract(interpreted):
    assert interpreted["deterministic"] is True and interpreted["compiled"] is True
    assert interpreted["empty batch"] == [[0, 2, 6, 8], [0, 2, 3, 4], [0, 36, 3, 4]]
    assert len(interpreted["opcheck"]) == 4 and set(interpreted["opcheck"].values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", (*CASES, ((2, 2, 55, 128, 8), torch.float16, "channels-last")), ids=case_name)
def test_kernels_on_the_device_are_as_precise_as_their_dtype(case):
    found = errors(case, "triton", "cuda")
    assert found["result"] < 1e-6 and found["maps"] < 1e-5 and found["logits"] < TOLERANCES[case[1]], found
