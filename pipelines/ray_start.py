"""Joining a Ray cluster, or starting Ray in this process, on machines that may be busy."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import kinema
from kinema.pipelines.errors import StageError, one_line

_OBJECT_STORE_BYTES = 512 * 1024 * 1024  # paths and rows travel, frames never
_ANSWER_S = 5.0
_START_S = 240.0


def connect(*, worker_logs: bool = False, num_cpus: int | None = None) -> dict[str, float]:
    """Join the cluster at RAY_ADDRESS, or start Ray inside this process; a second call changes nothing.

    On a cluster that this process did not start, its own `kinema` package travels along, so that workers on every
    node run the same code. `worker_logs` copies what workers print to this process's output.
    Returns: the cluster's resources ("CPU", "GPU", ...).
    Raises: StageError when no cluster answers; ValueError for a job server's address.
    """
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        if address.startswith(("http://", "https://")):
            raise ValueError(f"RAY_ADDRESS={address} is a job server; use `kinema submit`, or the cluster's HOST:6379")
        where = f"joining Ray at {address}" if address not in ("", "local") else "starting Ray"
        sys.stderr.write(f"{where} ...\n")
        started = time.monotonic()
        with _signals_kept():
            _init(address, {"logging_level": logging.ERROR, "log_to_driver": worker_logs}, num_cpus)
        found = ray.cluster_resources()
        there = f"{found.get('CPU', 0):g} CPUs, {found.get('GPU', 0):g} GPUs"
        sys.stderr.write(f"Ray is ready after {time.monotonic() - started:.0f} s: {there}\n")
    return ray.cluster_resources()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray's native code takes SIGTERM over, to abort with a stack trace; here it ends a stage like Ctrl-C."""
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.getsignal(name) for name in names}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for name, handler in before.items():
                if handler is not None:
                    signal.signal(name, handler)


def _init(address: str, quiet: dict[str, Any], num_cpus: int | None) -> None:
    """ray.init at an address, or a local Ray, which gets further chances on a machine too busy for the first.

    Ray gives up a node whose agent (a Python process that imports for some seconds) has not reported within 15 s of
    the node's start, a limit that cannot be set: on a machine with ten times more work than cores it is missed.
    """
    import ray

    is_local = address in ("", "local")
    if not is_local and address != "auto":
        _check_answers(address)
    # A stale current-cluster file decides unless "local" is said.
    local = {"address": "local", "include_dashboard": False, "num_cpus": num_cpus}
    remote = {"address": address, "runtime_env": _own_code()}
    settings = {**local, "object_store_memory": _OBJECT_STORE_BYTES} if is_local else remote
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
    started = time.monotonic()
    while True:
        before = _child_pids()
        try:
            ray.init(**settings, **quiet)
            return
        except (ValueError, ImportError):
            raise
        except Exception as error:  # noqa: BLE001  Ray raises bare Exceptions when it cannot start
            ray.shutdown()
            _end_children(before)
            waited_s = time.monotonic() - started
            if not is_local or waited_s > _START_S:
                where = f"at {address}" if not is_local else f"in {waited_s:.0f} s; is the machine overloaded?"
                raise StageError(f"cannot start on Ray {where} ({one_line(error)[:300]})") from None
            sys.stderr.write(f"engine: Ray has not started in {waited_s:.0f} s on this busy machine, trying again\n")


def _child_pids() -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process().children()}


def _end_children(before: set[int]) -> None:
    """End what a start that failed has left: Ray itself forgets it, and each piece holds memory and ports."""
    import psutil

    left = [child for child in psutil.Process().children() if child.pid not in before]
    for child in left:
        with suppress(psutil.NoSuchProcess):
            if any("ray" in part for part in child.cmdline()):
                child.kill()
    psutil.wait_procs(left, timeout=5)


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes. Raises: ValueError for a malformed address, StageError if nobody listens."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (host and colon and port.isdigit() and int(port) < 65536):
        raise ValueError(f"RAY_ADDRESS={address} is not HOST:PORT; use the head's address, for example 10.0.0.1:6379")
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise StageError(
                    f"no Ray cluster answers at RAY_ADDRESS={address} ({error.strerror or error}); start it, or "
                    "unset RAY_ADDRESS to work on this machine"
                ) from None
        time.sleep(0.5)


def _own_code() -> dict[str, Any]:
    """A runtime environment that carries this process's package (files, not links)."""
    return {"py_modules": [str(Path(kinema.__file__).parent)], "excludes": ["__pycache__", "*.pyc"]}
