"""One local Ray for all tests that need one."""

import os
import secrets
import sys

import pytest


@pytest.fixture(scope="session")
def ray_session():
    """A Ray of 2 CPUs inside the test process; skipped nowhere, started at first use."""
    from kinema.pipelines import engine

    ray = pytest.importorskip("ray")
    names = ("RAY_ADDRESS", "KINEMA_ENGINE")
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise a token file in the home folder
    engine.connect(num_cpus=2)
    yield ray
    ray.shutdown()
    os.environ.update(saved)


def pytest_terminal_summary(terminalreporter):
    """The table of injected faults, after chaos tests."""
    chaos = sys.modules.get("chaos")
    if chaos is not None and chaos.ROWS:
        terminalreporter.section("injected faults")
        for line in chaos.table():
            terminalreporter.write_line(line)
