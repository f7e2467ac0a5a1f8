"""Wrong input as a user meets it: one line on stderr, the right exit status, nothing half-written."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kinema.pipelines import cli

sys.path.insert(0, str(Path(__file__).parent))
from made_videos import numbered

SMALL_FLOW = ("teacher=dis", "gaps=[1]", "stride=4", "short_side=32")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, tmp_path):
    monkeypatch.setenv("KINEMA_ENGINE", "serial")
    monkeypatch.delenv("KINEMA_DEBUG", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")


@pytest.fixture
def kinema(capfd):
    """`kinema("shard", ...)` -> (status, lines of stdout, lines of stderr)."""

    def call(*arguments):
        capfd.readouterr()
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return status, out.splitlines(), err.splitlines()

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with videos/, clips/ and flow/ of one small video, made once."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "videos").mkdir()
    numbered(folder / "videos" / "a.mp4", 20)
    before = os.environ.get("KINEMA_ENGINE")
    os.environ["KINEMA_ENGINE"] = "serial"
    try:
        assert cli.main(["shard", f"videos={folder / 'videos'}", f"out={folder / 'clips'}"]) == 0
        assert cli.main(["teach", f"clips={folder / 'clips'}", f"out={folder / 'flow'}", *SMALL_FLOW]) == 0
    finally:
        os.environ.pop("KINEMA_ENGINE")
        if before is not None:
            os.environ["KINEMA_ENGINE"] = before
    run = folder / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    save_file({"no.such.key": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "empty").mkdir()
    (folder / "texts" / "below").mkdir(parents=True)
    (folder / "texts" / "below" / "a.md").write_text("no video")
    (folder / "file").write_text("x")
    (folder / "short.pth").write_bytes(b"PK\x03\x04 cut short")
    return folder


def refused(made: Path, kinema, command: str, says: tuple[str, ...], status: int = 2) -> None:
    """The command ends with one line that says all of `says`, and writes nothing at out."""
    out = made / "out"
    code, stdout, stderr = kinema(*command.format(m=made, out=out).split(" "))
    assert code == status, stderr
    assert stdout == []
    assert len([line for line in stderr if line.startswith("kinema ")]) == 1
    assert stderr[-1].startswith(f"kinema {command.split()[0]}: ")
    for text in says:
        assert text.format(m=made) in stderr[-1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("shard viedos={m}/videos out={out}", ("unknown key viedos", "did you mean videos?")),
        ("shard --config nope.yaml out={out}", ("nope.yaml", "demo.yaml")),
        ("shard videos={m}/nope out={out}", ("videos={m}/nope does not exist",)),
        ("shard videos={m}/empty out={out}", ("no video found", "it is empty")),
        ("shard videos={m}/texts out={out}", ("no video found", "1 files: 1 x .md")),
        ("shard videos={m}/nope*.mp4 out={out}", ("no video found", "none matches")),
        ("shard videos=nope://bucket/x out={out}", ("videos=nope://bucket/x", "Protocol not known")),
        ("shard videos={m}/videos out={m}/videos", ("is the folder of the videos", "choose another out=")),
        ("shard videos={m}/videos out={m}/file", ("{m}/file cannot be written", "choose another out=")),
        ("shard videos={m}/videos out={m}/file/below", ("cannot be written", "choose another out=")),
        ("shard videos={m}/videos out={m}/run", ("holds a training run", "choose another out=")),
        ("shard videos={m}/videos out={m}/flow", ("holds flow, not clips",)),
        ("shard videos={m}/videos out={m}/clips clip.fps=12", ("it has ", "this run ", "clip.fps was 0.0, is 12.0")),
        ("shard videos={m}/videos out={out} clip.fps=-1", ("clip.fps=-1", "use a positive rate")),
        ("teach clips={m}/nope out={out}", ("{m}/nope holds no artifact",)),
        ("teach clips={m}/run out={out}", ("{m}/run holds no artifact: it is a training run",)),
        ("teach clips={m}/flow out={out}", ("holds flow, not clips",)),
        ("teach clips={m}/clips out={out} gaps=1", ("gaps is a list; write gaps=[1]",)),
        ("teach clips={m}/clips out={out} gaps=[500]", ("gaps=[500] leave no pair", "use a gap under 20")),
        ("teach clips={m}/clips out={out} teacher=raft device=tpu", ("device=tpu", "cuda")),
        ("teach clips={m}/clips out={out} precision=bf16", ("precision=bf16", "precision=fp32")),
        ("teach clips={m}/clips out={m}/flow gaps=[2]", ("gaps was [1], is [2]", "choose another out=")),
        ("teach clips={m}/clips out={out} teacher=raft weights={m}/no.pth", ("no.pth", "the file does not exist")),
        ("teach clips={m}/clips out={out} teacher=raft weights={m}/file", ("not a readable checkpoint",)),
        ("teach clips={m}/clips out={out} teacher=raft weights={m}/short.pth", ("not a readable checkpoint",)),
        (
            "teach clips={m}/clips out={out} teacher=raft weights={m}/other.safetensors",
            ("do not fit raft (missing: ", "convc1.weight", " more; ", "unexpected: no.such.key"),
        ),
        ("teach clips={m}/clips out={out} teacher=raft weights={m}/clips", ("weights={m}/clips is neither", "a run")),
        ("teach clips={m}/clips out={out} teacher=smurf", ("no published weights", "'smurf'; give weights=FILE")),
        ("teach clips={m}/clips out={out} teacher=sea_raft_s scale=3", ("scale=3 is out of range", "-4 to 2")),
        ("teach clips={m}/clips out={out} short_side=4", ("short_side=4 is out of range", "use 16 pixels or more")),
        ("teach clips={m}/clips out={out} padding=kitti", ("padding=kitti: dis", "raft_small")),
        ("teach clips={m}/clips out={out} too_large=tile", ("too_large=tile needs max_megapixels",)),
        (
            "teach clips={m}/clips out={out} threads_per_actor=999",
            ("threads_per_actor=999, but there are", "use at most"),
        ),
        ("teach clips={m}/clips out={out} compare={m}/clips", ("compare={m}/clips holds clips, not flow",)),
        ("teach clips={m}/clips out={out} compare={m}/flow gaps=[3]", ("holds flow over [-1, 1]", "asks for [-3, 3]")),
        ("track clips={m}/clips out={out}", ("flow= is empty", "kinema teach")),
        ("track clips={m}/clips flow={m}/clips out={out}", ("flow={m}/clips holds clips, not flow",)),
        ("track clips={m}/clips flow={m}/flow out={out}", ("no flow from frame 1 to 2", "stride=1")),
        ("track clips={m}/clips flow={m}/flow out={out} grid=0", ("grid=0 is out of range", "1 to 1024")),
        ("track clips={m}/clips flow={m}/flow out={out} iters=4", ("iters=4: the tracker chain", "leave iters out")),
        ("track clips={m}/clips out={out} tracker=cotracker3 weights={m}/clips", ("the file is a folder", ".pth")),
        ("train clips={m}/clips out={out}", ("train.flow is empty", "flow=DIR")),
        ("train clips={m}/clips flow={m}/clips out={out}", ("holds clips, not flow",)),
        ("train clips={m}/clips flow={m}/flow out={m}/clips", ("holds an artifact", "choose another folder")),
        ("train clips={m}/clips flow={m}/flow out={out} loader.min_motion=1e9", ("no usable sample", "1 motion")),
        (
            "train clips={m}/clips flow={m}/flow out={out} loader.pairs.max_uncertainty_px=1",
            ("loader.pairs.max_uncertainty_px has nothing to go by", "uncertainty=true"),
        ),
        ("train clips={m}/clips flow={m}/flow out={out} loader.pairs.max_occluded_share=30", ("use 0 to 1",)),
        ("train clips={m}/clips flow={m}/flow out={out} flow_use=average", ("flow_use=average", "other_flow=[DIR]")),
        ("train clips={m}/clips out={out} model=raft_small flow_network.flip=3", ("flow_network.flip=3", "0 to 1")),
        (
            "train clips={m}/clips flow={m}/flow out={out} model=raft weights={m}/clips",
            ("weights={m}/clips is neither",),
        ),
        ("train clips={m}/clips flow={m}/flow out={out} batch_size=3 accumulate=2", ("batch_size=3", "use 2 or 4")),
        ("evaluate model=nonsense data={m}/empty out={out}", ("{m}/empty: not a DAVIS folder",)),
        ("evaluate model=dis data={m}/empty out={m}/file benchmark=kitti", ("{m}/file is not a folder",)),
        ("register model=nonsense", ("model=nonsense does not exist", "kinema train")),
        ("register model={m}/clips", ("neither a checkpoint nor a run",)),
        ("register model={m}/run name=a/b", ("name=a/b", "without /")),
        ("embed clips={m}/clips out={out} model=nonsense", ("model=nonsense does not exist",)),
        ("embed clips={m}/clips out={out} model=models:/no@champion", ("not in the registry", "kinema register")),
        ("embed clips={m}/run out={out} model=nonsense", ("it is a training run",)),
        ("run shard.videos={m}/nope workspace={out}", ("videos={m}/nope does not exist",)),
        (
            "run shard.videos={m}/videos workspace={out} stages=[shard,tech]",
            ("does not fit", "teach"),
        ),
        ("run shard.videos={m}/videos workspace={m}/file/ws", ("cannot be created",)),
        ("verify {m}/nope", ("holds no artifact",)),
        ("inspect {m}/empty", ("neither an artifact",)),
        ("inspect {m}/clips --out {m}/file/x.html", ("{m}/file", "check the path")),
        ("submit shard videos=x", ("--address http://HEAD:8265",)),
        ("demo", ("model",)),
    ],
)
def test_bad_arguments_are_one_line_with_status_2_and_leave_nothing(made, kinema, command, says):
    refused(made, kinema, command, says)


def test_yes_and_no_are_words_where_they_are_choices(tmp_path):
    from kinema.configs import load_stage

    (tmp_path / "x.yaml").write_text("train: {use_gpu: no}\n")
    assert load_stage("train", tmp_path / "x.yaml").use_gpu == "no"
    assert load_stage("train", None, ["use_gpu=yes"]).use_gpu == "yes"


def test_videos_that_are_all_broken_end_with_status_3_and_a_full_count(kinema, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "empty.mp4").touch()
    (folder / "noise.mkv").write_bytes(os.urandom(4096))
    for _ in range(2):
        status, out, err = kinema("shard", f"videos={folder}", f"out={tmp_path / 'clips'}", "--json")
        assert status == 3
        summary = json.loads(out[-1])
        assert {"sources", "clips", "quarantined", "shards", "seconds"} <= summary.keys()
        assert (summary["sources"], summary["clips"], summary["quarantined"]) == (2, 0, 2)
        assert "2 of 2 videos quarantined" in err[-1]
    status, _, err = kinema("teach", f"clips={tmp_path / 'clips'}", f"out={tmp_path / 'flow'}")
    assert status == 2 and "holds no clip (2 inputs are quarantined" in err[-1]
    assert not (tmp_path / "flow").exists()


def test_json_of_teach_has_the_promised_keys(made, kinema):
    status, out, _ = kinema("teach", f"clips={made / 'clips'}", f"out={made / 'flow'}", *SMALL_FLOW, "--json")
    assert status == 0
    assert {"clips", "pairs", "quarantined", "seconds"} <= json.loads(out[-1]).keys()


def test_json_of_evaluate_is_one_number_per_metric_and_summaries_for_people_are_flat(kinema, monkeypatch):
    from kinema.pipelines.evaluate.stage import EvaluateSummary

    summary = EvaluateSummary({"davis_jf": 0.5, "davis_mlp_j_mean": float("nan")}, "r", "davis", 1.0, "abc")
    monkeypatch.setattr(
        cli.stages, "stage_module", lambda stage: type("M", (), {"run": staticmethod(lambda _: summary)})
    )
    _, out, _ = kinema("evaluate", "model=r", "data=d", "--json")
    assert json.loads(out[-1]) == {
        "davis_jf": 0.5,
        "davis_mlp_j_mean": None,
        "model": "r",
        "benchmark": "davis",
        "seconds": 1.0,
        "run_id": "abc",
        "out": "",
    }
    nested = {"stages": {"shard": "done"}, "summaries": {"shard": {"clips": 3}}, "outputs": {"register": ""}}
    monkeypatch.setattr(
        cli.stages, "stage_module", lambda stage: type("M", (), {"run": staticmethod(lambda _: nested)})
    )
    _, out, _ = kinema("run")
    assert [line.split() for line in out] == [["stages.shard", "done"], ["summaries.shard.clips", "3"]]


@pytest.mark.parametrize("command", ["shard videos={m}/videos", "teach clips={m}/clips"])
@pytest.mark.parametrize(
    ("address", "status", "says"),
    [
        ("127.0.0.1:{port}", 1, "no Ray cluster answers"),
        ("nonsense", 2, "is not HOST:PORT"),
        ("http://a:1", 2, "kinema submit"),
    ],
)
def test_a_ray_cluster_that_is_not_there_is_told_at_once(made, kinema, monkeypatch, command, address, status, says):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", address.format(port=unused.getsockname()[1]))
        monkeypatch.setenv("KINEMA_ENGINE", "ray")
        monkeypatch.setattr("kinema.pipelines.ray_start._ANSWER_S", 0.3)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        refused(made, kinema, command + " out={out}", ("RAY_ADDRESS=", says), status)


def test_an_mlflow_server_that_is_not_there_leaves_no_run_folder(made, kinema, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    says = ("MLflow at http://127.0.0.1:9 does not answer", "unset MLFLOW_TRACKING_URI")
    small = "flowfeat.variant=dino_vits16_yt flowfeat.resize=32 flowfeat.crop=32 flowfeat.gap=1 batch_size=1"
    refused(made, kinema, f"train clips={{m}}/clips flow={{m}}/flow out={{out}} {small}", says, 1)
    refused(made, kinema, "evaluate model=dis benchmark=kitti data={m}/empty out={out}", says, 1)


@pytest.mark.parametrize("command", ["shard videos={m}/videos", "teach clips={m}/clips gaps=[1] stride=4"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_later(made, kinema, monkeypatch, tmp_path, command):
    from kinema.pipelines.artifacts.store import TemporaryFile

    arguments = [*command.format(m=made).split(), f"out={tmp_path / 'out'}"]
    write = TemporaryFile.write

    def full(self, data):
        if self.target.endswith(".tar"):
            with open("/dev/full", "wb", buffering=0) as device:
                self.file.close()
                self.file = open(os.dup(device.fileno()), "wb", buffering=0)
        write(self, data)

    monkeypatch.setattr(TemporaryFile, "write", full)
    status, out, err = kinema(*arguments)
    assert (status, out) == (1, [])
    assert "disk full while writing" in err[-1] and "set out= to another disk" in err[-1]
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith(".tar") or name.startswith(".kinema-tmp-")]
    monkeypatch.setattr(TemporaryFile, "write", write)
    assert kinema(*arguments)[0] == 0
    assert kinema("verify", tmp_path / "out")[0] == 0


# Ray alone may need some minutes to start on a loaded machine.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "engine"),
    [
        (signal.SIGINT, "serial"),
        (signal.SIGTERM, "serial"),
        pytest.param(signal.SIGTERM, "ray", marks=pytest.mark.slow),  # a Ray of its own for one command
    ],
)
def test_a_stopped_shard_says_so_and_the_rerun_finishes(tmp_path, number, engine):
    for name in "abcdefgh":
        numbered(tmp_path / "videos" / f"{name}.mp4", 48)
    arguments = ["shard", f"videos={tmp_path / 'videos'}", f"out={tmp_path / 'clips'}"]
    command = [sys.executable, "-m", "kinema.pipelines.cli", *arguments]
    environment = {**os.environ, "KINEMA_ENGINE": engine}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell that starts tests in the background lets them ignore SIGINT, and children inherit that.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, **pipes, text=True, env=environment, preexec_fn=heard)
    deadline = time.monotonic() + 400
    while not list(tmp_path.glob("clips/_scan/*")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(number)
    out, err = running.communicate(timeout=300)
    assert (running.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "kinema shard: stopped by the user; run the same command again to go on"
    assert "Traceback" not in err and not list((tmp_path / "clips").glob(".kinema-tmp-*"))
    assert cli.main(arguments) == 0 and cli.main(["verify", str(tmp_path / "clips")]) == 0


def test_a_reader_that_went_away_is_no_traceback(made):
    command = [sys.executable, "-m", "kinema.pipelines.cli", "verify", str(made / "clips")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr.splitlines() == ["kinema verify: whoever read the output went away before its end"]
