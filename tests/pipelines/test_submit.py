"""`kinema submit` against a real head with its job server, on loopback in a network namespace of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kinema.pipelines import submit
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.demo import write_scene

ADDRESS = "http://127.0.0.1:8299"
SMALL = ["flowfeat.variant=dino_vits16_yt", "flowfeat.resize=48", "flowfeat.crop=32", "loader.num_workers=0"]
SUBMIT = ["submit", "--address", ADDRESS]

# Brings loopback up without iproute2, starts a head, waits for the job server, runs the commands, stops the head.
INSIDE = """
import fcntl, json, os, socket, struct, subprocess, sys, time, urllib.request
plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(plain, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))
head = ["start", "--head", "--port=6399", "--num-cpus=3", f"--num-gpus={sys.argv[3]}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", "--dashboard-port=8299",
        "--disable-usage-stats", "--metrics-export-port=8298",
        "--object-store-memory=200000000", "--temp-dir", sys.argv[1]]
ray = os.path.join(os.path.dirname(sys.executable), "ray")
subprocess.run([ray, *head], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
for _ in range(120):
    try:
        urllib.request.urlopen("http://127.0.0.1:8299/api/version", timeout=2)
        break
    except OSError:
        time.sleep(0.5)
results = []
job = [ray, "job"]
where = ["--address", "http://127.0.0.1:8299"]
def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    return {"status": done.returncode, "out": done.stdout, "err": done.stderr}
for kind, *command in json.loads(sys.argv[2]):
    if kind == "ray":  # a job of Ray's own client
        results.append(run([*job, "submit", *where, *command]))
    elif kind == "metrics":  # lines of Ray's Prometheus endpoint that begin so, as soon as there are some
        for _ in range(60):
            text = urllib.request.urlopen("http://127.0.0.1:8298/metrics").read().decode()
            lines = [line for line in text.splitlines() if line.startswith(command[0])]
            if lines:
                break
            time.sleep(1)
        results.append({"status": 0, "out": "\\n".join(lines), "err": ""})
    elif kind == "until":  # kinema, again and again until it says so
        for _ in range(40):
            last = run([sys.executable, "-m", "kinema.pipelines.cli", *command[1:]])
            if command[0] in last["out"]:
                break
        results.append(last)
    elif kind == "kinema":
        results.append(run([sys.executable, "-m", "kinema.pipelines.cli", *command]))
    else:  # a job that is stopped as soon as its log has what `kind` says
        started = run([sys.executable, "-m", "kinema.pipelines.cli", *command])["out"].strip()
        for _ in range(300):
            if kind in run([*job, "logs", *where, started])["out"]:
                break
            time.sleep(0.5)
        began = time.time()
        run([*job, "stop", *where, started])
        took = time.time() - began
        info = json.load(urllib.request.urlopen("http://127.0.0.1:8299/api/jobs/" + started))
        results.append({"status": took, "out": run([*job, "logs", *where, started])["out"], "err": info})
subprocess.run([ray, "stop", "--force"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("RESULTS" + json.dumps(results))
"""


def can_unshare() -> bool:
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-rnpf", "--mount-proc", "true"], capture_output=True).returncode == 0


NO_NAMESPACE = pytest.mark.skipif(not can_unshare(), reason="network namespaces are not permitted (unshare -rnpf)")


def on_a_head(commands: list[list[str]], folder: Path, timeout: float, num_gpus: int = 0) -> list[dict]:
    """What each command came to, on a head of its own. Args: num_gpus, which Ray believes to be there."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    environment.pop("MLFLOW_TRACKING_URI", None)
    # A job runs with the `python` of the head's PATH, which on a cluster is that of the environment (ray_cluster.yaml).
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # Ray's sockets live below this folder: their paths must stay short.
    with_short_path = Path("/tmp") / f"kinema-head-{os.getpid()}"
    try:
        done = subprocess.run(
            ["unshare", "-rnpf", "--mount-proc", sys.executable, "-c", INSIDE, with_short_path, json.dumps(commands),
             str(num_gpus)],
            capture_output=True, text=True, env=environment, timeout=timeout, cwd=folder,
        )  # fmt: skip
    finally:
        shutil.rmtree(with_short_path, ignore_errors=True)
    assert "RESULTS" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULTS")[1])


def two_films(folder: Path) -> Path:
    folder.mkdir()
    for seed in range(2):
        write_scene(Scene(seed=seed, height=64, width=96, num_frames=12), folder / f"{seed}.mp4")
    return folder


@NO_NAMESPACE
@pytest.mark.slow
@pytest.mark.timeout(420)
def test_shard_and_two_worker_training_as_jobs(tmp_path):
    """Results come back as of the stage itself; runs are logged beside out=; workers' warnings are the driver's."""
    two_films(tmp_path / "videos")
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"not a video")
    clips, flow, run = (str(tmp_path / name) for name in ("clips", "flow", "run"))
    no_losses = ["allowed_quarantine=0"]
    training = [f"clips={clips}", f"flow={flow}", f"out={run}", "steps=2", "batch_size=2", "num_workers=2", *SMALL]
    shard, teach, train = on_a_head(
        [
            ["kinema", *SUBMIT, "--json", "shard", f"root={tmp_path}", "videos=videos", "out=clips", *no_losses],
            ["kinema", *SUBMIT, "teach", f"clips={clips}", f"out={flow}"],
            ["kinema", *SUBMIT, "train", *training, "cpus_per_worker=0.5"],
        ],
        tmp_path,
        400,
    )  # fmt: skip
    assert shard["status"] == 3, "the stage's own status: too much in quarantine; " + shard["err"][-3000:]
    (line,) = shard["out"].splitlines()
    found = json.loads(line)
    assert (found["sources"], found["quarantined"], found["out"]) == (3, 1, clips)
    assert "kinema-result" not in shard["err"] and "broken.mp4" not in shard["out"]
    for job in (teach, train):
        assert job["status"] == 0, job["err"][-3000:]
    assert f"out           {flow}" in teach["out"]
    assert (Path(clips) / "samples.parquet").exists() and (Path(flow) / "samples.parquet").exists()
    assert list((Path(run) / "checkpoints").glob("step_00000002"))
    assert "is untrained; set train.flowfeat.backbone_weights" in train["err"], "said by the driver, not by a worker"
    assert "is untrained" in train["out"] and "is untrained" in (Path(run) / "run.json").read_text()
    assert (tmp_path / "mlflow.db").is_file(), "without MLFLOW_TRACKING_URI runs are logged beside out="
    assert f"runs are logged to sqlite:///{tmp_path}/mlflow.db" in train["err"]


@NO_NAMESPACE
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wrong_jobs_are_refused_and_a_stopped_one_ends_in_order(tmp_path):
    videos = two_films(tmp_path / "videos")
    clips, flow, run = (str(tmp_path / name) for name in ("clips", "flow", "run"))
    submit.stage_package(tmp_path / "package")
    plain = ["ray", "--working-dir", str(tmp_path / "package"), "--", "python", "-m", "kinema.pipelines.cli"]
    training = [f"clips={clips}", f"flow={flow}", f"out={run}", "steps=100000", "batch_size=2", *SMALL]
    wrong, plain_job, shard, teach, stopped = on_a_head(
        [
            ["kinema", *SUBMIT, "train", f"clips={tmp_path / 'nothing'}", f"out={run}", f"flow={flow}"],
            [*plain, "shard", f"videos={videos}", "out=lost"],
            ["kinema", *SUBMIT, "shard", f"videos={videos}", f"out={clips}"],
            ["kinema", *SUBMIT, "teach", f"clips={clips}", f"out={flow}"],
            ["steps/s", *SUBMIT, "--no-wait", "train", *training],
        ],
        tmp_path,
        800,
    )  # fmt: skip
    assert wrong["status"] == 2 and "nothing" in wrong["err"] and "Traceback" not in wrong["err"]
    said = plain_job["out"] + plain_job["err"]
    assert plain_job["status"] != 0 and "out=lost is a relative path" in said and "Traceback" not in said
    assert shard["status"] == teach["status"] == 0
    assert stopped["status"] < 15 and "Traceback" not in stopped["out"], stopped["out"][-3000:]
    assert "readonly database" not in stopped["out"] and (tmp_path / "mlflow.db").is_file()
    assert stopped["err"]["metadata"]["stage"] == "train" and stopped["err"]["metadata"]["out"] == run
    assert list((Path(run) / "checkpoints").glob("step_*")), "the step at which it was stopped"


def test_what_travels_is_the_whole_package_as_real_files(tmp_path):
    submit.stage_package(tmp_path)
    staged = tmp_path / "kinema"
    assert {"models", "kernels", "pipelines", "configs"} <= {p.name for p in staged.iterdir()}
    assert not [p for p in staged.rglob("*") if p.is_symlink()]
    assert (staged / "configs" / "demo.yaml").is_file() and not list(staged.rglob("__pycache__"))
    code = "import kinema, kinema.configs; print(kinema.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_wrong_address_and_arguments_are_refused_before_anything_is_sent():
    with pytest.raises(ValueError, match="--address http://HEAD:8265"):
        submit.submit("shard", [], address="ray://x", wait=True, stdout=sys.stdout)
    with pytest.raises(ValueError, match="out=clips is a relative path.*give absolute paths.*root=FOLDER"):
        arguments = ["videos=/v", "out=clips"]
        submit.submit("shard", arguments, address="http://127.0.0.1:9", wait=True, stdout=sys.stdout)
    with pytest.raises(ValueError, match="did you mean videos"):
        submit.submit("shard", ["viedos=1"], address="http://127.0.0.1:9", wait=True, stdout=sys.stdout)
