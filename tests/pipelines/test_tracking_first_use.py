"""The first runs of several processes, on no database yet; and what is said when MLflow cannot be used."""

import subprocess
import sys

import pytest

from kinema.pipelines import tracking
from kinema.pipelines.errors import StageError

FIRST_RUN = """
import sys, time
from pathlib import Path
import mlflow.tracking
from kinema.pipelines import tracking
Path(sys.argv[1] + ".ready" + sys.argv[2]).touch()
while not Path(sys.argv[1] + ".go").exists():
    time.sleep(0.005)
run = tracking.start_run("shared", "run " + sys.argv[2], {"number": int(sys.argv[2])}, workspace=sys.argv[1])
run.log_metrics({"loss": 1.0})
run.end()
assert not run.problems, run.problems
"""


def test_three_first_runs_at_once_all_succeed(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workspace = tmp_path / "workspace"
    command = [sys.executable, "-c", FIRST_RUN, str(workspace)]
    running = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True) for i in range(3)]
    while not all((tmp_path / f"workspace.ready{i}").exists() for i in range(3)):
        assert all(process.poll() is None for process in running), [p.stderr.read() for p in running if p.poll()]
    (tmp_path / "workspace.go").touch()
    errors = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], errors
    client = tracking.open_client(tracking.tracking_uri(workspace))
    (experiment,) = [e for e in client.search_experiments() if e.name == "shared"]
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["number"] for run in runs) == ["0", "1", "2"]
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_an_experiment_that_another_process_made_meanwhile_is_taken(tmp_path, monkeypatch):
    """As on a server, which no lock guards: both ask, neither finds it, one is told that it is there already."""
    uri = tracking.tracking_uri(tmp_path)
    client = tracking.open_client(uri)
    made = tracking.experiment_id(client, uri, "shared")
    ask, asked = client.get_experiment_by_name, []

    def not_there_yet(name):
        asked.append(name)
        return ask(name) if len(asked) > 2 else None

    monkeypatch.setattr(client, "get_experiment_by_name", not_there_yet)
    assert tracking.experiment_id(client, uri, "shared") == made
    assert len(asked) == 3


def test_a_locked_database_is_waited_for_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(tracking, "LOCKED_WAITS_S", (0.0, 0.0))
    tries = []

    def locked_at_first(times: int):
        tries.append(1)
        if len(tries) <= times:
            raise OSError("database is locked")
        return "done"

    assert tracking.patiently(lambda: locked_at_first(2)) == "done"
    tries.clear()
    with pytest.raises(OSError, match="locked"):
        tracking.patiently(lambda: locked_at_first(9))
    assert len(tries) == 3


def test_the_embedded_database_is_not_called_a_server(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StageError) as caught:
        tracking.open_client(tracking.tracking_uri(tmp_path))
    message = str(caught.value)
    assert "mlflow.db (MLFLOW_TRACKING_URI is unset) cannot be used" in message
    assert "does not answer" not in message and "\n" not in message
