"""Several Ray nodes on this machine, in a network namespace of their own, sharing nothing but an object store.

`in_namespace` runs a function of a test module inside `unshare`; there `Nodes` starts a head without CPUs and nodes
that come and go. Every node has a mount namespace of its own, with a file system in memory over its temporary folder:
what it writes is seen by no other node and is gone with it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

REPO_ROOT = Path(__file__).parents[2]
PORT = 6391
ADDRESS = f"127.0.0.1:{PORT}"
_MARK = "RESULT-OF-THE-SCENE "
_SOON_S = 240.0
_CLUSTERS = itertools.count()


def can_unshare() -> bool:
    """Whether this machine lets us have namespaces."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-rnpf", "--mount-proc", "true"], capture_output=True).returncode == 0


needs_namespace = pytest.mark.skipif(not can_unshare(), reason="namespaces are not permitted (unshare -rnpf)")


def in_namespace(scene: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """What `scene(*arguments)`, a function of a test module, returns (as JSON) inside of namespaces of its own.

    Nothing it starts outlives it: the process namespace ends with it.
    """
    names = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "KINEMA_ENGINE"):
        names.pop(name, None)
    call = json.dumps([Path(sys.modules[scene.__module__].__file__).stem, scene.__name__, list(arguments)])
    with tempfile.TemporaryDirectory(prefix="kn-", dir="/tmp") as folder:
        names["TMPDIR"] = folder
        command = ["unshare", "-rnpf", "--mount-proc", sys.executable, "-m", "tests.pipelines.ray_nodes", call]
        done = subprocess.run(command, capture_output=True, text=True, env=names, cwd=REPO_ROOT, timeout=timeout)
    assert _MARK in done.stdout, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.split(_MARK)[1])


def _python_path() -> str:
    """The sources of this checkout first, then the checkout, so that tests.pipelines can be imported."""
    return os.pathsep.join([str(REPO_ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")]), str(REPO_ROOT)])


class Nodes:
    """A head with a driver's place and no CPUs, and nodes by name."""

    def __init__(self) -> None:
        # One for each cluster of a scene, with a short name: Ray's sockets live below it.
        self.folder = Path(tempfile.gettempdir()) / f"c{next(_CLUSTERS)}"
        self.folder.mkdir()
        self.running: dict[str, subprocess.Popen] = {}
        self.starts: dict[str, int] = {}
        self.cores: dict[str, int | None] = {}
        self.lock = threading.Lock()
        self.ending = threading.Event()
        threading.Thread(target=self._start_again, daemon=True).start()

    def __enter__(self) -> Nodes:
        self._start("head", ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"], private=False)
        deadline = time.monotonic() + _SOON_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", PORT)) == 0:
                    return self
            time.sleep(0.2)
        raise RuntimeError(f"the head has not started:\n{self.log('head')}")

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        for name in [*self.running]:
            self.kill(name)

    def add(self, name: str, core: int | None = None) -> None:
        """Start a node with one CPU, on one core of the machine if asked for; it counts as soon as Ray sees it."""
        self.cores[name] = core
        with self.lock:
            self._start(name, [f"--address={ADDRESS}", "--num-cpus=1"], private=True)

    def wait_for(self, number: int) -> None:
        """Until so many nodes are there besides the head. Raises: RuntimeError."""
        code = "import ray, sys; ray.init(sys.argv[1], logging_level=40); print(sum(n['Alive'] for n in ray.nodes()))"
        deadline = time.monotonic() + _SOON_S
        while time.monotonic() < deadline:
            seen = subprocess.run([sys.executable, "-c", code, ADDRESS], capture_output=True, text=True)
            if seen.stdout.strip().endswith(str(number + 1)):
                return
        raise RuntimeError(f"{number} nodes are not there: {seen.stdout[-500:]} {seen.stderr[-1000:]}")

    def kill(self, name: str) -> None:
        """SIGKILL to everything that runs on a node, at once."""
        with self.lock:
            process = self.running.pop(name)
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            try:
                os.kill(one.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()

    def holding(self, pattern: str) -> str:
        """The running node in whose temporary folder there are files like this."""
        for name, process in self.running.items():
            folder = Path(f"/proc/{process.pid}/root{self.folder}/{name}{self.starts[name]}")
            if name != "head" and any(folder.glob(pattern)):
                return name
        raise RuntimeError(f"no node holds {pattern}")

    def _start_again(self) -> None:
        """Nodes that Ray gave up while they started: on a machine with other work their agents are too slow for it."""
        while not self.ending.wait(1.0):
            with self.lock:
                for name, process in [*self.running.items()]:
                    if name != "head" and process.poll() is not None and self.starts[name] < 6:
                        self._start(name, [f"--address={ADDRESS}", "--num-cpus=1"], private=True)

    def log(self, name: str) -> str:
        """What `ray start` said."""
        return (self.folder / f"{name}.log").read_text()[-3000:] + f"\n(started {self.starts[name]} times)"

    def _start(self, name: str, options: list[str], private: bool) -> None:
        self.starts[name] = self.starts.get(name, 0) + 1
        folder = self.folder / f"{name}{self.starts[name]}"
        folder.mkdir()
        ray = [str(Path(sys.executable).with_name("ray")), "start", *options, "--block", "--disable-usage-stats"]
        ray += ["--object-store-memory=100000000", "--temp-dir", str(folder)]
        if self.cores.get(name) is not None:
            ray = ["taskset", "-c", str(self.cores[name]), *ray]
        if private:
            script = f'mount -t tmpfs none "{folder}" && exec "$@"'
            ray = ["unshare", "-m", "sh", "-c", script, "node", *ray]
        # A lost node is noticed after a few seconds instead of half a minute.
        quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_initial_delay_ms": "20000"}
        with (self.folder / f"{name}.log").open("w") as log:
            self.running[name] = subprocess.Popen(
                ray, env={**os.environ, **quick, "TMPDIR": str(folder)}, stdout=log, stderr=log
            )


def start_stage(*arguments: str, engine: str = "ray") -> subprocess.Popen:
    """`kinema STAGE ...` as a driver on the head, or serially without Ray."""
    names = {**os.environ, "KINEMA_ENGINE": engine, **({"RAY_ADDRESS": ADDRESS} if engine == "ray" else {})}
    command = [sys.executable, "-m", "kinema.pipelines.cli", *arguments, "--json"]
    return subprocess.Popen(command, env=names, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end_of(stage: subprocess.Popen, timeout: float = 600) -> dict[str, Any]:
    """The stage's summary; what it said, if it failed."""
    out, errors = stage.communicate(timeout=timeout)
    if stage.returncode != 0:
        raise RuntimeError(f"status {stage.returncode} of {stage.args}: {errors[-4000:]}")
    return json.loads(out.splitlines()[-1])


def objects(url: str) -> dict[str, str]:
    """sha256 of every object below a URL, by relative name."""
    import fsspec

    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    found = sorted(files.find(root))
    return {path[len(root) + 1 :]: hashlib.sha256(files.cat_file(path)).hexdigest() for path in found}


def num_commits(url: str) -> int:
    """Commit records below an artifact's URL."""
    import fsspec

    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return len(files.glob(f"{root}/_commits/*.json"))


def _bring_loopback_up() -> None:
    plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fcntl.ioctl(plain, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))


def _main(module: str, function: str, arguments: list[Any]) -> None:
    _bring_loopback_up()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    found = getattr(importlib.import_module(f"tests.pipelines.{module}"), function)(*arguments)
    print(_MARK + json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _main(*json.loads(sys.argv[1]))
