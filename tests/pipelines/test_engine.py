"""Bounded tasks and actor pools: results, failures as data, crashes, timeouts, and the serial twin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from kinema.pipelines import engine, ray_start
from kinema.pipelines.engine import Failure, Result, run_on_actors, run_tasks
from kinema.pipelines.errors import StageError


def square_or_fail(item: int) -> int:
    if item == 3:
        raise ValueError("three is\nnot allowed")
    return item * item


class Multiplier:
    """An actor's work: the factor is "loaded" once."""

    def __init__(self, factor: int):
        self.factor = factor
        self.pid = os.getpid()

    def __call__(self, item: int) -> tuple[int, int]:
        return self.factor * square_or_fail(item), self.pid


@pytest.mark.parametrize("backend", ["serial", "ray"])
def test_an_exception_is_a_failure_with_its_reason_and_place(backend, request):
    if backend == "ray":
        request.getfixturevalue("ray_session")
    outcomes = dict(run_tasks(square_or_fail, range(5), engine=backend))
    failure = outcomes.pop(3)
    assert outcomes == {i: Result(i * i) for i in (0, 1, 2, 4)}
    assert (failure.kind, failure.error_class, failure.message) == ("error", "ValueError", "three is not allowed")
    assert failure.where.startswith("test_engine.py:")
    assert failure.attempts == 1


@pytest.mark.parametrize("backend", ["serial", "ray"])
def test_actors_load_once_and_serve_many(backend, request):
    if backend == "ray":
        request.getfixturevalue("ray_session")
    outcomes = dict(run_on_actors(lambda: Multiplier(10), range(8), num_actors=2, num_cpus=0.5, engine=backend))
    assert isinstance(outcomes.pop(3), Failure)
    assert {i: o.value[0] for i, o in outcomes.items()} == {i: 10 * i * i for i in outcomes}
    assert 1 <= len({o.value[1] for o in outcomes.values()}) <= 2


def full_disk(item: int) -> int:
    raise StageError("disk full while writing x: free at least 3 MB")


def no_weights():
    raise ValueError("raft needs weights=; none were given")


@pytest.mark.parametrize("backend", ["serial", "ray"])
def test_what_concerns_the_run_stops_it(backend, request):
    if backend == "ray":
        request.getfixturevalue("ray_session")
    with pytest.raises(StageError, match="disk full while writing x"):
        list(run_tasks(full_disk, [1, 2], engine=backend))
    with pytest.raises(ValueError, match="raft needs weights="):
        list(run_on_actors(no_weights, [1, 2], num_actors=2, num_cpus=0.5, engine=backend))


def die_once(item: tuple[str, int]) -> int:
    folder, number = item
    marker = Path(folder) / f"tried-{number}"
    tries = len(marker.read_text()) if marker.exists() else 0
    marker.write_text("x" * (tries + 1))
    if (number == 1 and tries == 0) or number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("pool", [False, True])
def test_a_killed_worker_costs_a_retry_and_never_the_run(ray_session, tmp_path, pool):
    items = [(str(tmp_path), n) for n in range(4)]
    if pool:
        outcomes = dict(run_on_actors(lambda: die_once, items, num_actors=2, num_cpus=0.5, retries=1))
    else:
        outcomes = dict(run_tasks(die_once, items, num_cpus=0.5, retries=1))
    by_number = {item[1]: outcome for item, outcome in outcomes.items()}
    assert [by_number[n] for n in (0, 3)] == [Result(0), Result(3)]
    assert by_number[1] == Result(1, attempts=2)
    assert (by_number[2].kind, by_number[2].attempts) == ("crash", 2)
    assert (tmp_path / "tried-2").read_text() == "xx"


def sleep_if_odd(item: int) -> int:
    time.sleep(60 if item % 2 else 0)
    return item


def test_a_task_that_takes_too_long_is_ended(ray_session):
    started = time.monotonic()
    outcomes = dict(run_tasks(sleep_if_odd, [0, 1], retries=0, timeout_s=1.0))
    assert outcomes[0] == Result(0)
    assert (outcomes[1].kind, outcomes[1].message) == ("timeout", "took longer than 1 s")
    assert time.monotonic() - started < 30


def test_leaving_the_iterator_stops_what_runs(ray_session):
    started = time.monotonic()
    for item, _ in run_tasks(sleep_if_odd, [0, 1, 3, 5], num_cpus=0.5):
        assert item == 0
        break
    assert dict(run_tasks(sleep_if_odd, [2, 4], num_cpus=0.5)) == {2: Result(2), 4: Result(4)}
    assert time.monotonic() - started < 30


def test_what_has_ended_by_then_is_not_cancelled(ray_session, monkeypatch):
    """Ray may end the driver for the answer of a task that was cancelled meanwhile (ray-project/ray#54785)."""
    cancelled = []
    cancel = ray.cancel
    monkeypatch.setattr(ray, "cancel", lambda one, force: (cancelled.append(one), cancel(one, force=force)))
    results = run_tasks(sleep_if_odd, [0, 2, 1], max_in_flight=3, num_cpus=0.1)
    next(results)
    time.sleep(3)  # the other short one has ended, and nobody has looked at it
    results.close()
    assert len(cancelled) == 1


def test_nothing_to_do_starts_nothing(monkeypatch):
    monkeypatch.setattr(engine, "connect", lambda **_: pytest.fail("Ray was started for nothing"))
    assert list(run_tasks(square_or_fail, [])) == []
    assert list(run_on_actors(no_weights, [], num_actors=2)) == []


def test_unknown_engine_and_job_server_addresses_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="KINEMA_ENGINE=dask is not an engine; use ray or serial"):
        list(run_tasks(square_or_fail, [1], engine="dask"))
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ValueError, match="job server; use `kinema submit`"):
        engine.connect()


def test_a_cluster_that_cannot_be_joined_is_one_line(monkeypatch):
    import ray

    tries = []

    def init(**settings):
        tries.append(settings["address"])
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_start, "_check_answers", lambda address: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(StageError, match="cannot start on Ray at 10.0.0.1:6379 .The current node timed out during"):
        engine.connect()
    assert tries == ["10.0.0.1:6379"]


def test_a_task_that_fits_nowhere_is_said_at_once(ray_session):
    with pytest.raises(StageError, match="a task needs 64 CPU, the cluster has 2"):
        list(run_tasks(square_or_fail, [1], num_cpus=64))


def test_the_package_travels_as_files(tmp_path):
    """Links under src/kinema would be dead on another node; the archive must hold what they point to."""
    import zipfile

    from ray._private.runtime_env import packaging

    modules = ray_start._own_code()
    archive = tmp_path / "code.zip"
    packaging._zip_files(
        modules["py_modules"][0], modules["excludes"], str(archive), include_gitignore=False, include_parent_dir=True
    )
    names = zipfile.ZipFile(archive).namelist()
    assert "kinema/pipelines/engine.py" in names
    assert "kinema/models/__init__.py" in names
    assert not any("__pycache__" in name for name in names)


def test_a_local_ray_that_does_not_start_is_tried_again_and_leaves_nothing(monkeypatch, capsys):
    """As on a machine so busy that Ray's agent misses its 15 s; what a failed start left is ended."""
    import ray

    left = []

    def init(**_):
        if len(left) == 2:
            return
        left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "ray/gcs_server"]))
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    ray_start._init("", {}, num_cpus=1)
    assert not any(psutil.pid_exists(child.pid) for child in left)
    assert capsys.readouterr().err.count("trying again") == 2
    monkeypatch.setattr(ray_start, "_START_S", -1.0)
    left.pop()
    with pytest.raises(StageError, match="is the machine overloaded.*timed out during startup"):
        ray_start._init("local", {}, num_cpus=1)
    assert not psutil.pid_exists(left[-1].pid)


def test_a_lost_node_is_not_held_against_the_item():
    """It is tried again beyond its retries, but not for ever: it may be what takes the nodes down."""
    lost, crash = (Failure("crash", name, "m") for name in ("NodeLost", "WorkerCrashed"))
    one, tries = engine._Try("item"), 0
    while (again := one.after(lost, retries=0)) is not None:
        one, tries = again, tries + 1
    assert tries == 8 and one.attempt == 1
    assert engine._Try("item").after(crash, retries=1) == engine._Try("item", attempt=2)
    assert engine._Try("item", attempt=2).after(crash, retries=1) is None
    assert engine._Try("item").after(Failure("error", "ValueError", "m"), 3) is None
    assert engine._Try("item").after(Result(1), 3) is None


def test_a_count_that_is_lost_keeps_its_last_sums(ray_session):
    """The node it was on, say; the work goes on without."""
    counter = engine.Counter(engine="ray")
    counter.add(2, 5)
    deadline = time.monotonic() + 60
    while counter.read() != [2, 5]:
        assert time.monotonic() < deadline
    ray_session.kill(counter._remote)
    counter.add(1, 1)
    assert counter.read() == [2, 5]
