"""An MLflow server that goes away and comes back: metrics wait on disk, arrive in order, and training never notices."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kinema.configs import TrainConfig
from kinema.pipelines import metric_spool, tracking
from kinema.pipelines.metric_spool import Sender, Spool
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.loop import train_worker
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.stop import Stop

sys.path.insert(0, str(Path(__file__).parent))
from toy_training import toy_job


class StandIn:
    """What sending metrics and pictures needs of MLflow's server; `away` makes it hang up."""

    def __init__(self, artifacts: Path) -> None:
        self.points: list[tuple[str, int]] = []
        self.calls_while_away = 0
        self.away = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
                if outer.away:
                    outer.calls_while_away += 1
                    self.close_connection = True
                    return
                outer.points += [(point["key"], int(point["step"])) for point in body.get("metrics", [])]
                info = {"run_id": "run", "run_uuid": "run", "experiment_id": "0", "artifact_uri": str(artifacts)}
                answer = json.dumps({"run": {"info": info}} if "/runs/get" in self.path else {}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "ARRIVAL_S", 0.2)
    monkeypatch.setattr(metric_spool, "_IMPATIENT_WAIT_S", 0.02)
    import mlflow.tracking  # noqa: F401  before the first try: it takes longer than the tests wait

    standing = StandIn(tmp_path / "artifacts")
    yield standing
    standing.server.shutdown()
    standing.server.server_close()


def test_what_waits_is_sent_in_order_by_the_next_process_too(server, tmp_path):
    handle, file = tracking.RunHandle(server.uri, "run", "0"), tmp_path / "pending.jsonl"
    server.away = True
    tracker = tracking.Tracker.attach(handle, file)
    for step in range(30):
        tracker.log_metrics({"loss": 1.0 / (step + 1), "nan": float("nan")}, step)
    deadline = time.monotonic() + 60
    while not server.calls_while_away and time.monotonic() < deadline:
        tracker.flush(0.05)
    tracker.close()
    tracker.sender.thread.join(60)  # a killed process has no call under way
    assert not tracker.sender.thread.is_alive()
    assert server.points == [] and server.calls_while_away > 0
    assert len(file.read_text().splitlines()) == 60
    with file.open("a") as cut:
        cut.write('{"name": "cut o')  # the process was killed here
    again = tracking.Tracker.attach(handle, file)
    again.log_metrics({"loss": 0.0, "nan": 0.0}, 30)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()][-3:] == [29, 30, 30]
    server.away = False
    again.flush(20)
    assert server.points == [(name, step) for step in range(31) for name in ("loss", "nan")]
    assert not file.exists()
    again.close()


def test_a_call_takes_at_most_so_many_and_files_keep_their_place(tmp_path):
    calls: list[list] = []
    spool = Spool()
    spool.add([{"name": "a", "step": n} for n in range(700)])
    spool.add([{"file": "picture.png", "folder": ""}, {"name": "a", "step": 700}])
    sender = Sender(spool, lambda part: calls.append(part), lambda: (OSError,), *[lambda error: None] * 2)
    assert sender.flush(10) == 0
    assert [len(part) for part in calls] == [500, 200, 1, 1] and "file" in calls[2][0]
    sender.close(1)


def test_a_disk_that_refuses_what_waits_is_told_once_and_the_rest_is_not_promised(server, tmp_path, capfd):
    """A folder stands where the file would be. Everything is in memory, arrives when it can, and is lost otherwise."""
    file = tmp_path / "pending.jsonl"
    tracker = tracking.Tracker.attach(tracking.RunHandle(server.uri, "run", "0"))
    tracker.sender.spool.path, tracker.sender.spool.on_disk = file, True
    file.mkdir()
    server.away = True
    for step in range(3):
        tracker.log_metrics({"loss": 1.0}, step)
    file.rmdir()
    tracker.log_metrics({"loss": 1.0}, 3)
    tracker.close()
    said = capfd.readouterr().err
    assert said.count("cannot be written") == 1 and "in memory only" in said
    assert "4 metric values are lost" in said and not file.exists(), "a file with gaps would be read as the whole"


def test_training_goes_on_at_its_pace_and_nothing_is_lost(server, tmp_path, monkeypatch):
    """The server is away from before the first step to after the last, and answers when the command is run again."""
    config = TrainConfig(steps=12, batch_size=4, lr=0.01, checkpoint_every=5, log_every=1, pictures_every=0, seed=3)
    handle = tracking.RunHandle(server.uri, "run", "0")
    for name in ("calm", "lost"):
        (tmp_path / name).mkdir()
    train_worker(toy_job(tmp_path / "calm", config), Place(), Stop())
    server.away = True
    job = toy_job(tmp_path / "lost", config)
    train_worker(type(job)(**{**vars(job), "tracking": handle}), Place(), Stop())
    runs = [checkpoint.latest_checkpoint(tmp_path / name) / "model.safetensors" for name in ("calm", "lost")]
    assert runs[0].read_bytes() == runs[1].read_bytes()
    assert (tmp_path / "lost" / tracking.PENDING_FILE).is_file()
    server.away = False
    tracker = tracking.Tracker.attach(handle, tmp_path / "lost" / tracking.PENDING_FILE)
    tracker.flush(20)
    tracker.close()
    arrived = dict.fromkeys(server.points)  # a try that was under way may come twice; MLflow keeps one
    assert [step for name, step in arrived if name == "loss"] == list(range(1, 13))
    assert (tmp_path / "artifacts" / "pictures" / "input_00000012.png").is_file()


def test_a_run_that_was_there_goes_on_without_its_server(server, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    server.away = True
    tracker = tracking.start_run("e", "n", {"a": 1}, resume="known")
    assert tracker.run_id == "known" and "goes on, its metrics wait" in capfd.readouterr().err
    with pytest.raises(tracking.StageError, match="does not answer"):
        tracking.start_run("e", "n", {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RealServer:
    """`mlflow server` on loopback over one database, as `make mlflow` starts it."""

    def __init__(self, folder: Path, store: str):
        self.folder, self.store, self.port = folder, store, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises: AssertionError with its log when it does not answer."""
        names = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        options += ["--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "files")]
        with (self.folder / "server.log").open("a") as log:
            command = [str(Path(sys.executable).with_name("mlflow")), "server", *options]
            self.process = subprocess.Popen(command, env=names, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._answers():
                return
            time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-2000:])

    def close(self) -> None:
        """Nothing is left running, however the test ended."""
        if self.process is not None and self.process.poll() is None:
            self.stop()

    def stop(self) -> None:
        """Away at once, with everything that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 60
        while (
            self._answers()
        ):  # its workers hold the socket until they are gone, and would be taken for the next server
            assert time.monotonic() < deadline, f"port {self.port} is still open"
            time.sleep(0.1)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def log_through_a_loss(server: RealServer) -> None:
    """Twenty steps before the server is lost, twenty while it is away, twenty after it is back."""
    server.start()
    tracker = tracking.start_run("lost", "run", {"lr": 0.1})
    for step in range(60):
        if step == 20:
            tracker.flush(60)
            server.stop()
        if step == 40:
            assert tracker.sender.flush(0.5) > 0
            server.start()
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.flush(120)
    history = tracker.client.get_metric_history(tracker.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, float(step)) for step in range(60)]
    tracker.end()
    assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_server_on_sqlite_that_is_killed_and_started_again(tmp_path, monkeypatch):
    server = RealServer(tmp_path, f"sqlite:///{tmp_path / 'store.db'}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with contextlib.closing(server):
        log_through_a_loss(server)


@pytest.fixture
def postgresql(tmp_path):
    """URL of a database on loopback, of Debian's postgresql, run by its own user where we are root."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "none")]
    if not found[-1].is_file():
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="MLflow reaches PostgreSQL through psycopg2: pip install psycopg2-binary")
    folder, port, user = Path(tempfile.mkdtemp(prefix="kinema-pg-", dir="/tmp")), free_port(), "kinema"
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(folder, "postgres")

    def run(program: str, *arguments: str) -> None:
        command = [*as_user, str(found[-1].with_name(program)), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/tmp", timeout=120)

    run("initdb", "-U", user, "--auth=trust")
    listen = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", listen, "start")
    yield f"postgresql+psycopg2://{user}@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(folder)


ONE_WORKER = """
import sys
from kinema.pipelines import tracking

tracker = tracking.start_run("many", f"worker-{sys.argv[1]}", {"number": int(sys.argv[1])})
for step in range(40):
    tracker.log_metrics({"loss": float(step), "share": 0.5}, step)
tracker.flush(120)
tracker.end()
"""
WORKERS = 4


def log_from_many_workers(server: RealServer) -> None:
    """Processes that begin, fill and end a run each, at the same time, in an experiment that none of them finds."""
    server.start()
    workers = [subprocess.Popen([sys.executable, "-c", ONE_WORKER, str(number)]) for number in range(WORKERS)]
    assert [worker.wait(300) for worker in workers] == [0] * WORKERS
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server.uri)
    (found,) = [one for one in client.search_experiments() if one.name == "many"]
    runs = client.search_runs([found.experiment_id])
    assert sorted(run.data.params["number"] for run in runs) == [str(number) for number in range(WORKERS)]
    for run in runs:
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "loss")
        assert [(point.step, point.value) for point in history] == [(step, float(step)) for step in range(40)]
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_server_on_postgresql_by_url(tmp_path, monkeypatch, postgresql):
    """Killed and started again over its database, and used by several processes at the same time."""
    server = RealServer(tmp_path, postgresql)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with contextlib.closing(server):
        log_through_a_loss(server)
        log_from_many_workers(server)
