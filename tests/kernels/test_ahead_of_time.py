"""Every kernel configuration compiles for the GPUs that matter, on a machine that has none."""

import json
import os
import subprocess
import sys

import pytest

from kinema.kernels.ahead_of_time import CAPABILITIES, OPS, SHARED_LIMIT_BYTES


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda pair: ".".join(map(str, pair)))
def test_every_configuration_compiles(op, capability):
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    # In a process of its own: the tests' import hook rewrites functions, and triton reads their sources.
    command = [sys.executable, "-m", "kinema.kernels.ahead_of_time", "--json", "--op", op]
    command += ["--capability", ".".join(map(str, capability))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["case"] for row in rows}) == len(rows) > 0
    assert any(row["chosen"] for row in rows)
    for row in rows:
        print(row)
        assert row["shared_bytes"] <= SHARED_LIMIT_BYTES[capability], row
        assert row["spilled_bytes"] == 0 or not row["chosen"], row
        assert row["matrix_instructions"] > 0 or not row["has_dot"], row
