"""`make gpu` without a device, and with tasks that stand in for those of one."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.kernels.cosine_attention import gpu_cases as attention
from kinema.kernels.gpu import __main__ as driver
from kinema.kernels.gpu import rows, timing, worker
from kinema.kernels.gpu.cases import BUDGET_S, Task, tasks
from kinema.kernels.local_correlation import gpu_cases as local_correlation
from kinema.models import gpu_steps
from kinema.models.cuda_graphs import Graphed, Recording

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = "stand_in_tasks:tasks"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Rows and statuses of all stand-ins: those that end their process are started as such, the others run here."""
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        patch.setenv("PYTHONPATH", str(HERE))
        statuses = {t.name: worker.run(t, out) for t in worker.tasks_of(SOURCE) if t.stage != "processes"}
        options = ["--out", str(out), "--minutes", "30", "--only", "processes", "--without-device", "--tasks", SOURCE]
        statuses["processes"] = driver.main(options)
    found = rows.read(out / "rows.csv")
    return statuses, {(row["task"], row["case"], row["way"]): row for row in found}


def test_limits_of_all_tasks_fit_into_nine_minutes():
    assert sum(task.limit_s for task in tasks()) <= BUDGET_S == 540
    assert len({task.name for task in tasks()}) == len(tasks())
    stages = list(dict.fromkeys(task.stage for task in tasks()))
    assert stages == ["rates", "attention", "lookup", "local", "upsampling", "steps", "sanitizer", "tuning"]


def test_every_task_names_a_function_that_exists():
    for task in tasks():
        module, function = task.source.split(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function)), task


def test_without_a_device_it_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.main(["--out", str(tmp_path / "out")]) == 0
    assert "no CUDA device" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_good_case_has_a_row_for_itself_and_for_each_baseline(stand_ins):
    _, found = stand_ins
    ours, plain = found["good", "right", "ours"], found["good", "right", "plain"]
    assert ours["status"] == "ok" and float(ours["warm_ms"]) > 0 and ours["of_ours"] == "1.0"
    assert plain["status"] == "measured" and float(plain["of_ours"]) > 0
    # A baseline says how far its results are from ours: here they are the same.
    assert float(plain["error"]) == 0 and ours["error"] == "1.0e-06"
    # Rates were measured by an earlier task, and are the roofline of this one.
    assert float(ours["of_roofline"]) > 0
    missing = found["good", "right", "localcorr"]
    assert missing["status"] == "missing" and missing["note"] == "ImportError: No module named 'localcorr'"


def test_wrong_cases_are_timed_and_marked(stand_ins):
    _, found = stand_ins
    for case in ("over tolerance", "not a number"):
        row = found["wrong", case, "ours"]
        assert row["status"] == "wrong" and float(row["warm_ms"]) > 0 and "out is over" in row["note"]


@pytest.mark.parametrize(
    "task, note",
    [
        ("raises while built", "RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered"),
        ("raises in kernel", "ValueError: out of resource: shared memory"),
        ("no such module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("crashes", "ended by SIGSEGV"),
        ("ends without a row", "ended with status 1"),
        ("one of three raises", "AssertionError: the results differ between two runs"),
        ("hangs", "ended after its limit of 8 s"),
    ],
)
def test_what_goes_wrong_costs_one_failed_row(stand_ins, task, note):
    _, found = stand_ins
    failed = [row for row in found.values() if row["task"] == task and row["status"] == "failed"]
    assert [row["note"] for row in failed] == [note]


def test_rows_before_a_crash_and_tasks_behind_it_stay(stand_ins):
    statuses, found = stand_ins
    for task in ("raises while built", "crashes"):
        assert found[task, "before", "ours"]["status"] == "ok"
    assert found["good at the end", "right", "ours"]["status"] == "ok"
    assert statuses.pop("rates") == statuses.pop("good") == 0
    assert statuses.pop("processes") == 1
    assert all(status == worker.ROWS_WRONG for status in statuses.values()), statuses


def test_a_case_that_raises_costs_no_other_and_baselines_come_last(stand_ins, tmp_path):
    _, found = stand_ins
    mine = [(case, way, row["status"]) for (task, case, way), row in found.items() if task == "one of three raises"]
    assert mine == [
        ("first", "ours", "ok"),
        ("second", "", "failed"),
        ("third", "ours", "ok"),
        ("first", "plain", "measured"),
        ("third", "plain", "measured"),
    ]
    late = Task("one", "late", "stand_in_tasks:one_of_three_raises", 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        worker.run(late, tmp_path, until=time.monotonic() + worker.BASELINE_S / 2)
    left_out = {row["case"]: row["status"] for row in rows.read(tmp_path / "rows.csv") if row["way"] == "plain"}
    assert left_out == {"first": "skipped", "third": "skipped"}


def test_a_baseline_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(worker, "BASELINE_S", 0.1)
    monkeypatch.setattr(worker, "SPARE_S", 0.5)
    written = []
    baselines = {"endless": lambda: time.sleep(600), "plain": lambda: torch.ones(4).sum()}
    ours = worker.GpuCase("case", lambda: torch.ones(4).sum(), dict, 1e-5, baselines)
    worker.compare(ours, timing.Times(1.0, 1.0, "clock"), {}, written.append, time.monotonic() + 1)
    assert [(row["way"], row["status"]) for row in written][0] == ("endless", "skipped")
    assert "not done within" in written[0]["note"] and written[1]["way"] == "plain"


def test_a_killed_run_takes_its_task_along(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(HERE)])}
    command = [sys.executable, "-m", "kinema.kernels.gpu", "--out", str(tmp_path), "--without-device"]
    command += ["--tasks", SOURCE, "--only", "hangs", "--minutes", "60"]
    driver_process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert "hangs" in driver_process.stdout.readline()
    driver_process.send_signal(signal.SIGKILL)
    assert driver_process.wait(60) == -signal.SIGKILL

    def left():
        return [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in read_or_nothing(p)]

    # It sleeps for ten minutes; importing torch takes its time before it looks for its driver.
    deadline = time.monotonic() + 120
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left() == []


def read_or_nothing(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_only_and_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(HERE)
    options = ["--out", str(tmp_path), "--without-device", "--tasks", SOURCE]
    assert driver.main(["--minutes", "0.1", "--only", "one", *options]) == 0
    notes = [row["note"] for row in rows.read(tmp_path / "rows.csv")]
    assert len(notes) == 6 and all("not run" in note for note in notes)
    assert driver.main(["--only", "nine", *options]) == 2
    assert "ONLY=nine names no task; stages are rates, one" in capsys.readouterr().err
    chosen = driver.select(tasks(), "rates, lookup 1080p")
    assert [t.name for t in chosen] == ["rates", "lookup 1080p", "lookup 1080p bf16"]


def test_wheels_are_laid_out_without_pip(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.whl file"):
        driver.unpack(tmp_path, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "rival-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("rival/__init__.py", "answer = 42")
    assert (driver.unpack(tmp_path, tmp_path / "out") / "rival" / "__init__.py").read_text() == "answer = 42"


def test_only_rows_of_a_device_are_collected(tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        rows.collect(tmp_path / "rows.csv", tmp_path / "gpu.csv")
    for device in ("cpu", "NVIDIA H200"):
        source = tmp_path / f"{device}.csv"
        rows.append(source, {**dict.fromkeys(rows.COLUMNS, "1"), "device": device})
    with pytest.raises(ValueError, match="without a CUDA device"):
        rows.collect(tmp_path / "cpu.csv", tmp_path / "gpu.csv")
    assert rows.collect(tmp_path / "NVIDIA H200.csv", tmp_path / "gpu.csv") == 1
    assert len(rows.read(tmp_path / "gpu.csv")) == 1


BARE = """
import importlib.abc, sys
class OnlyThese(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
absent = "einops omegaconf av ray mlflow webdataset pyarrow cv2 safetensors PIL scipy pandas matplotlib".split()
absent += "zstandard pydantic rich tenacity diffusers transformers faiss requests httpx torchvision".split()
sys.meta_path.insert(0, OnlyThese())
import kinema.kernels.gpu.__main__, kinema.kernels.gpu.candidates
from kinema.kernels.gpu.cases import tasks
for task in tasks():
    __import__(task.source.split(":")[0], fromlist=["x"])
from kinema.models import gpu_steps
import kinema.models.flow.raft.network
for what in set(gpu_steps.STEPS) - {"RAFT"}:
    (row,) = gpu_steps.rows(what)
    assert row["status"] == "missing" and row["note"].startswith("left out: einops is not installed"), row
"""


def test_the_run_imports_nothing_but_torch_triton_numpy_and_jaxtyping():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_make_target_needs_no_environment_of_ours():
    target = (ROOT / "Makefile").read_text().split("\ngpu:\n")[1].split("\n\n")[0]
    assert "PYTHONPATH=src" in target and "python3" in target
    for name in ("OUT", "MINUTES", "ONLY", "WHEELS"):
        assert f"$({name})" in target


@pytest.mark.parametrize("what", gpu_steps.STEPS)
def test_steps_of_the_models_run_and_give_finite_results(what, monkeypatch):
    for name in ("STEP_ROUNDS", "STEPS_PER_ROUND", "STEPS_BEFORE"):
        monkeypatch.setattr(timing, name, 1)
    torch.manual_seed(0)
    found = list(gpu_steps.rows(what))
    assert found and {row["status"] for row in found} == {"ok"}
    assert all(row["warm_ms"] > 0 and row["per_second"] > 0 and set(row) <= set(rows.COLUMNS) for row in found)
    assert {task.argument for task in tasks() if task.stage == "steps"} == set(gpu_steps.STEPS)


def test_a_step_that_diverges_is_marked_wrong(monkeypatch):
    monkeypatch.setattr(timing, "STEP_ROUNDS", 1)
    row = gpu_steps.row_of(gpu_steps.Step("diverged", 1, lambda: torch.tensor([1.0, float("nan")])))
    assert row["status"] == "wrong" and "not finite" in row["note"]


def test_a_graph_that_was_given_up_is_no_row_of_a_graph(monkeypatch):
    """The function itself would be timed under the graph's name."""
    for name in ("STEP_ROUNDS", "STEPS_PER_ROUND", "STEPS_BEFORE"):
        monkeypatch.setattr(timing, name, 1)

    def refuses(function, arguments):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of CUDA")

    def records(function, arguments):
        out = function(*arguments)
        return Recording(list(arguments), out, lambda: None)

    for record, status in ((refuses, "failed"), (records, "ok")):
        graphed = Graphed(lambda x: 2 * x, record)
        step = gpu_steps.Step("pairs", 1, lambda graphed=graphed: graphed(torch.ones(2)), "CUDA graph", graphed)
        row = gpu_steps.row_of(step)
        assert row["status"] == status and row["way"] == "CUDA graph" and "peak_mb" not in row
        assert ("warm_ms" in row) == (status == "ok")
        assert ("not permitted" if status == "failed" else "memory is not measured") in row["note"]


def test_float32_steps_are_without_tf32_and_say_so():
    cudnn = torch.backends.cudnn
    assert cudnn.allow_tf32  # PyTorch's default, which a step must not change for others

    class Network(torch.nn.Module):
        def forward(self, *pair, iters):
            return torch.tensor(cudnn.allow_tf32)

    for precision, allowed in (("fp32", False), ("bf16", True)):
        assert bool(gpu_steps._without_gradient(Network(), 1, precision)(torch.ones(1))) == allowed
        assert cudnn.allow_tf32
    notes = {step.name.split()[-2]: step.note for step in gpu_steps.STEPS["RAFT"]("cpu")}
    assert notes == {"fp32": "without TF32", "bf16": ""}


def test_fpts_weights_are_drawn_where_they_are_used(monkeypatch):
    from kinema.models.fpt import model as fpt

    devices = []

    class Noted(Exception):
        pass

    def made(**_):
        devices.append(torch.empty(1).device.type)
        raise Noted

    monkeypatch.setattr(fpt, "FlowPokeTransformer", made)
    with pytest.raises(Noted):
        next(gpu_steps.STEPS["FPT"]("meta"))
    assert devices == ["meta"]


def test_a_graph_without_what_the_call_does_is_refused(monkeypatch):
    """A call that queues its work on a stream of its own leaves an empty graph behind; launches alone are no reason."""

    def once():
        raise AssertionError("not to be called")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def time_call(call_ms, graph_ms):
        def event_ms(function, before=None):
            return call_ms if function is call else graph_ms

        def call():
            pass

        monkeypatch.setattr(timing, "_event_ms", event_ms)
        monkeypatch.setattr(timing, "_captured", lambda function, calls: once)
        return timing.time_call(call)

    with pytest.raises(RuntimeError, match="its graph takes 0.0050 ms and the call 3.0000"):
        time_call(3.0, 0.005)
    assert time_call(3.0, 2.9).timer == "graph"
    assert time_call(0.19, 0.016).warm_ms == 0.002  # of 8 calls: a short kernel behind a slow launch


def test_a_baseline_with_an_empty_graph_is_missing(monkeypatch):
    def refuse(function):
        raise RuntimeError("its graph takes 0.0050 ms and the call 3.0000: not all of it was recorded")

    monkeypatch.setattr(timing, "time_call", refuse)
    written, case = [], worker.GpuCase("case", lambda: torch.ones(2), dict, 1e-5, {"other": lambda: torch.ones(2)})
    worker.compare(case, timing.Times(1.0, 1.0, "graph"), {}, written.append, time.monotonic() + 60)
    assert written[0]["status"] == "missing" and "not all of it was recorded" in written[0]["note"]


def test_the_copy_that_is_rated_is_of_no_size_that_graphs_copy_slowly():
    assert timing.COPIED_BYTES % 2**29 and timing.COPIED_BYTES > 2**29  # and far larger than any L2


def test_the_gradients_weights_are_cast_before_the_timing():
    class Casts(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func.overloadpacket is torch.ops.aten._to_copy
            return func(*args, **(kwargs or {}))

    maps = [torch.randn(1, 3, 4, 5, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    weight = torch.randn(1, 3, 4, 5)
    call = local_correlation._call(lambda a, b: a * b, maps, weight, backward=True)
    first = call()
    with Casts() as casts:
        again = call()
    assert casts.seen == 0
    expected = (weight.bfloat16() * maps[1], weight.bfloat16() * maps[0])
    for found in (first, again):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_float32_is_held_against_the_faster_of_its_two_ways():
    rates = {"copy": 4000.0, "matrix float32": 50.0, "matrix float16": 900.0}
    case = worker.GpuCase("case", lambda: None, dict, 1e-5, flops=300e9, matrix_dtype=torch.float32)
    # 300 GFLOP at 300 TFLOP/s are 1 ms.
    assert worker._figures(case, timing.Times(2.0, 2.0, "graph"), rates)["of_roofline"] == 0.5


@pytest.mark.parametrize("pattern", ["full", "causal", ("query-causal", 3), ("query-inference", 5)])
def test_terms_of_the_scale_add_up_to_its_gradient(pattern):
    checked = attention.as_pattern(pattern)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 2, 12, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    theta = torch.randn(1, 2, 12, 4, generator=generator, dtype=torch.float64)
    scale = torch.tensor([3.0, 5.0], dtype=torch.float64, requires_grad=True)
    out = attention.cosine_attention_reference(q, k, v, theta, theta, scale, checked)
    (gradient,) = torch.autograd.grad(out, scale, dout)
    terms = attention.scale_terms([q, k, v, scale], theta, theta, checked, dout)
    assert (terms >= gradient.abs()).all()
    # Linear in the gradient of the output, and 0 without one.
    assert torch.allclose(attention.scale_terms([q, k, v, scale], theta, theta, checked, -2 * dout), 2 * terms)
    assert (attention.scale_terms([q, k, v, scale], theta, theta, checked, 0 * dout) == 0).all()
