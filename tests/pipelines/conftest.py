"""One local Ray for all tests that need one; the table of faults that chaos tests inject."""

import os
import secrets
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import chaos


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


def pytest_addoption(parser):
    parser.addoption(
        "--chaos-table", metavar="FILE", help="where the table of faults goes; a table that lacks some fails the run"
    )


def pytest_configure(config):
    """One file of faults for this process and those that xdist starts from it."""
    if not hasattr(config, "workerinput"):
        number, os.environ[chaos.ROWS_FILE] = tempfile.mkstemp(prefix="kinema-chaos-", suffix=".jsonl")
        os.close(number)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput") and chaos.ROWS_FILE in os.environ:
        Path(os.environ.pop(chaos.ROWS_FILE)).unlink(missing_ok=True)


def pytest_sessionfinish(session):
    """The table as a file, and whether it holds all that it should."""
    file = session.config.getoption("--chaos-table", None)
    if not file or hasattr(session.config, "workerinput"):
        return
    rows = chaos.read_rows(os.environ[chaos.ROWS_FILE])
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("\n".join([*chaos.table(rows), *chaos.missing(rows)]) + "\n")
    if chaos.missing(rows):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """The table of injected faults, after chaos tests."""
    rows = chaos.read_rows(os.environ[chaos.ROWS_FILE])
    if not rows:
        return
    terminalreporter.section("injected faults")
    for line in chaos.table(rows):
        terminalreporter.write_line(line)
    file = terminalreporter.config.getoption("--chaos-table", None)
    if file:
        terminalreporter.write_line(f"written to {file}")
        for line in chaos.missing(rows):
            terminalreporter.write_line(line, red=True)
