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

# Brings loopback up without iproute2, starts a head, waits for the job server, runs the commands, stops the head.
INSIDE = """
import fcntl, json, os, socket, struct, subprocess, sys, time, urllib.request
plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(plain, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))
head = ["start", "--head", "--port=6399", "--num-cpus=3", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
        "--dashboard-port=8299", "--disable-usage-stats", "--object-store-memory=200000000", "--temp-dir", sys.argv[1]]
ray = os.path.join(os.path.dirname(sys.executable), "ray")
subprocess.run([ray, *head], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
for _ in range(120):
    try:
        urllib.request.urlopen("http://127.0.0.1:8299/api/version", timeout=2)
        break
    except OSError:
        time.sleep(0.5)
results = []
for command in json.loads(sys.argv[2]):
    if command[0] == "plain":  # a job of Ray's own client, in a working folder that Ray copies
        command = [ray, "job", "submit", "--address", "http://127.0.0.1:8299", *command[1:]]
        done = subprocess.run(command, capture_output=True, text=True)
        results.append({"status": done.returncode, "out": done.stdout, "err": done.stderr})
        continue
    if command[0] == "stop":  # a job that is stopped as soon as it says what is waited for
        started = subprocess.run([sys.executable, "-m", "kinema.pipelines.cli", *command[2:]], capture_output=True, text=True)
        job, client = started.stdout.strip(), [ray, "job"]
        for _ in range(120):
            logs = subprocess.run([ray, "job", "logs", "--address", "http://127.0.0.1:8299", job], capture_output=True, text=True)
            if command[1] in logs.stdout:
                break
            time.sleep(0.5)
        began = time.time()
        subprocess.run([ray, "job", "stop", "--address", "http://127.0.0.1:8299", job], capture_output=True)
        took = time.time() - began
        logs = subprocess.run([ray, "job", "logs", "--address", "http://127.0.0.1:8299", job], capture_output=True, text=True)
        info = json.load(urllib.request.urlopen("http://127.0.0.1:8299/api/jobs/" + job))
        results.append({"status": took, "out": logs.stdout, "err": info})
        continue
    done = subprocess.run([sys.executable, "-m", "kinema.pipelines.cli", *command], capture_output=True, text=True)
    results.append({"status": done.returncode, "out": done.stdout, "err": done.stderr})
subprocess.run([ray, "stop", "--force"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("RESULTS" + json.dumps(results))
"""


def can_unshare() -> bool:
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-rnpf", "--mount-proc", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="network namespaces are not permitted here (unshare -rnpf)")
@pytest.mark.timeout(420)
def test_shard_and_two_worker_training_as_jobs(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for seed in range(2):
        write_scene(Scene(seed=seed, height=64, width=96, num_frames=12), videos / f"{seed}.mp4")
    clips, flow, run = (str(tmp_path / name) for name in ("clips", "flow", "run"))
    address = ["submit", "--address", "http://127.0.0.1:8299"]
    with_broken = tmp_path / "with_broken"
    shutil.copytree(videos, with_broken)
    (with_broken / "broken.mp4").write_bytes(b"not a video")
    package = tmp_path / "package"
    submit.stage_package(package)
    plain = ["plain", "--working-dir", str(package), "--", "python", "-m", "kinema.pipelines.cli"]
    small = ["flowfeat.variant=dino_vits16_yt", "flowfeat.resize=48", "flowfeat.crop=32", "loader.num_workers=0"]
    commands = [
        [*address, "shard", f"videos={videos}", f"out={clips}"],
        [*address, "teach", f"clips={clips}", f"out={flow}"],
        [*address, "train", f"clips={clips}", f"flow={flow}", f"out={run}", "steps=2", "batch_size=2", "num_workers=2",
         "cpus_per_worker=0.5", *small],
        [*address, "train", f"clips={tmp_path / 'nothing'}", f"out={run}2", f"flow={flow}"],
        [*address, "--json", "shard", f"root={tmp_path}", "videos=with_broken", "out=clips_3", "allowed_quarantine=0"],
        [*plain, "shard", f"videos={videos}", "out=lost"],
        ["stop", "train 2/", *address, "--no-wait", "train", f"clips={clips}", f"flow={flow}", f"out={run}3",
         "steps=100000", "batch_size=2", *small],
    ]  # fmt: skip
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    environment.pop("MLFLOW_TRACKING_URI", None)
    # A job runs with the `python` of the head's PATH, which on a cluster is that of the environment (ray_cluster.yaml).
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # Ray's sockets live below this folder: their paths must stay short.
    with_short_path = Path("/tmp") / f"kinema-head-{os.getpid()}"
    try:
        done = subprocess.run(
            ["unshare", "-rnpf", "--mount-proc", sys.executable, "-c", INSIDE, with_short_path, json.dumps(commands)],
            capture_output=True, text=True, env=environment, timeout=400, cwd=tmp_path,
        )  # fmt: skip
    finally:
        shutil.rmtree(with_short_path, ignore_errors=True)
    assert "RESULTS" in done.stdout, done.stderr[-3000:]
    shard, teach, train, wrong, some_lost, plain_job, stopped = json.loads(done.stdout.split("RESULTS")[1])
    for job in (shard, teach, train):
        assert job["status"] == 0, job["err"][-3000:]
    assert (Path(clips) / "samples.parquet").exists() and (Path(flow) / "samples.parquet").exists()
    assert list((Path(run) / "checkpoints").glob("step_00000002"))
    assert shard["out"].split()[:2] == ["sources", "2"] and f"out              {clips}" in shard["out"]
    assert "is untrained; set train.flowfeat.backbone_weights" in train["err"], "said by the driver, not by a worker"
    assert (tmp_path / "mlflow.db").is_file(), "without MLFLOW_TRACKING_URI runs are logged beside out="
    assert f"runs are logged to sqlite:///{tmp_path}/mlflow.db" in train["err"]
    assert wrong["status"] == 2 and "nothing" in wrong["err"] and "Traceback" not in wrong["err"]
    assert some_lost["status"] == 3, some_lost["err"][-2000:]
    (line,) = some_lost["out"].splitlines()
    found = json.loads(line)
    assert (found["quarantined"], found["out"]) == (1, str(tmp_path / "clips_3")) and "kinema-result" not in some_lost["err"]
    assert plain_job["status"] != 0 and "out=lost is a relative path" in plain_job["out"] + plain_job["err"]
    assert "Traceback" not in plain_job["out"] + plain_job["err"]
    assert stopped["status"] < 15 and "Traceback" not in stopped["out"], stopped["out"][-3000:]
    assert "written, the same command goes on from it" in stopped["out"], stopped["out"][-3000:]
    assert stopped["err"]["metadata"]["stage"] == "train" and stopped["err"]["metadata"]["out"] == f"{run}3"


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
