"""The loop on a toy recipe: resume, accumulation, stopping, failures."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from kinema.configs import TrainConfig
from kinema.pipelines.errors import StageError
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.loop import rank_batch_size, train_worker
from kinema.pipelines.train.meter import read_metrics
from kinema.pipelines.train.optimizer import learning_rate
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.stop import Notice, Stop

sys.path.insert(0, str(Path(__file__).parent))
from toy_training import NUM_SAMPLES, MakeLoader, StopAt, ToyRecipe, toy_job


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes) -> TrainConfig:
    defaults = dict(
        steps=12, batch_size=4, lr=0.01, checkpoint_every=5, log_every=3, pictures_every=6, warmup_steps=3, seed=3,
        keep_checkpoints=3, clip_norm=1.0, schedule="cosine",
    )  # fmt: skip
    return TrainConfig(**(defaults | changes))


def train(run: Path, cfg: TrainConfig, recipe=None, stop=None, **kwargs):
    run.mkdir(parents=True, exist_ok=True)
    return train_worker(toy_job(run, cfg, recipe, **kwargs), Place(), stop or Stop())


def same_bytes(a: Path, b: Path) -> None:
    """Both runs end in the same checkpoint: weights, optimizer, position, and the metrics they logged."""
    one, other = checkpoint.latest_checkpoint(a), checkpoint.latest_checkpoint(b)
    assert one.name == other.name
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    left, right = checkpoint.read_state(one), checkpoint.read_state(other)
    assert left["loader"] == right["loader"] and left["window"] == right["window"]
    for name, values in left["optimizer"]["state"].items():
        for key, value in values.items():
            assert torch.equal(value, right["optimizer"]["state"][name][key])
    names = ("step", "loss", "lr", "grad_norm", "error_again")
    points = [[{n: line[n] for n in names} for line in read_metrics(run)] for run in (a, b)]
    assert points[0] == points[1]


def test_it_learns_and_writes_what_it_says(tmp_path):
    cfg = config(steps=200, pictures_every=100, log_every=10, checkpoint_every=50, lr=0.03, clip_norm=0.0)
    done = train(tmp_path / "run", cfg, ToyRecipe(noise=0))
    points = read_metrics(tmp_path / "run")
    assert done.step == 200 and done.stopped is None
    assert points[-1]["loss"] < 0.5 * points[0]["loss"]
    assert points[-1]["step"] == 200 and points[-1]["skipped.too dark"] == 2
    assert {"lr", "grad_norm", "samples_per_second", "data_wait_share", "memory_rss_mb"} <= points[0].keys()
    found = sorted(p.name for p in (tmp_path / "run/pictures").iterdir())
    assert found == ["input_00000100.png", "input_00000200.png"]
    kept = [p.name for p in checkpoint.complete_checkpoints(tmp_path / "run")]
    assert kept == ["step_00000100", "step_00000150", "step_00000200"]


@pytest.mark.parametrize(("accumulate", "copy_ahead"), [(1, "off"), (2, "off"), (1, "on")])
def test_resumed_equals_undisturbed_bit_for_bit(tmp_path, accumulate, copy_ahead):
    """Stopped at step 5 (in the middle of the first epoch: 23 samples, 4 a step) and again at 7."""
    train(tmp_path / "whole", config(accumulate=accumulate))
    cfg = config(accumulate=accumulate, copy_ahead=copy_ahead)
    for steps in (5, 7, 12):
        # Steps may grow between runs, but the cosine ends where it ends: stop by request instead.
        stop = Stop()
        recipe = StopAt(steps, stop)
        train(tmp_path / "parts", cfg, recipe, stop)
    same_bytes(tmp_path / "whole", tmp_path / "parts")


def test_stop_saves_the_last_finished_step_at_once(tmp_path):
    """A step of seconds does not delay the checkpoint: it is there long before the step ends."""
    stop = Stop()
    recipe = ToyRecipe(slow_s=3.0)
    thread = threading.Thread(target=train, args=(tmp_path, config(), recipe, stop))
    thread.start()
    time.sleep(0.5)
    stop.request("SIGTERM")
    time.sleep(1.0)
    assert thread.is_alive() and checkpoint.latest_checkpoint(tmp_path).name == "step_00000000"
    thread.join()
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["step_00000000"]


class Killed(ToyRecipe):
    """Dies in a step."""

    def after_step(self, module, step):
        super().after_step(module, step)
        if step == 8:
            raise ConnectionError("the machine is gone")


def test_a_notice_that_the_machine_goes_brings_checkpoints_forward(tmp_path):
    """No checkpoint is due before step 100; the notice comes with step 4, the end in step 8."""
    cfg, asked = config(checkpoint_every=100, keep_checkpoints=9), []

    def ask() -> bool:
        asked.append(None)
        return len(asked) >= 4

    (tmp_path / "run").mkdir()
    job = toy_job(tmp_path / "run", cfg, Killed())
    with pytest.raises(ConnectionError):
        train_worker(job, Place(), Stop(), Notice(ask, every_s=0.0))
    kept = [path.name for path in checkpoint.complete_checkpoints(tmp_path / "run")]
    assert kept[0] == "step_00000004"
    train(tmp_path / "run", cfg)
    train(tmp_path / "calm", cfg)
    same_bytes(tmp_path / "run", tmp_path / "calm")


def test_accumulation_and_skipped_samples_do_not_change_a_samples_weight(tmp_path):
    """Micro-batches with unequal numbers of counted samples: the gradient is the mean over those that count."""
    weights = []
    for accumulate in (1, 2, 4):
        run = tmp_path / str(accumulate)
        cfg = config(accumulate=accumulate, batch_size=8, steps=6)
        train(run, cfg, ToyRecipe(noise=0), skipped=(1, 2, 3, 5, 8, 13))
        weights.append(checkpoint.read_tensors(checkpoint.latest_checkpoint(run)))
        assert read_metrics(run)[0]["samples_not_counted"] > 0
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-5)


def test_shared_tensors_come_back_shared(tmp_path):
    train(tmp_path, config())
    saved = checkpoint.read_tensors(checkpoint.latest_checkpoint(tmp_path))
    assert torch.equal(saved["alias.0.weight"], saved["online.0.weight"])
    assert not torch.equal(saved["average.0.weight"], saved["online.0.weight"])


def test_nan_loss_names_step_and_samples(tmp_path):
    with pytest.raises(StageError, match=r"loss is nan at step \d+; .*sample7") as caught:
        train(tmp_path, config(), ToyRecipe(nan_at_key="sample7"))
    step = int(str(caught.value).split("step ")[1].split(";")[0])
    saved = checkpoint.read_meta(checkpoint.latest_checkpoint(tmp_path))["step"] if step >= 5 else None
    assert saved is None or saved <= step


def test_nothing_to_learn_from_is_an_error(tmp_path):
    with pytest.raises(StageError, match="no sample of .* batches in a row"):
        train(tmp_path, config(steps=50), skipped=tuple(range(NUM_SAMPLES)))


def test_resume_into_other_settings_is_refused_with_both_values(tmp_path):
    train(tmp_path, config())
    with pytest.raises(ValueError, match=r"lr: 0.01 in the checkpoint, 0.02 now"):
        train(tmp_path, config(lr=0.02))


def test_finished_run_does_nothing_again(tmp_path):
    train(tmp_path, config())
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert train(tmp_path, config()).step == 12
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}


def test_damaged_checkpoints_are_passed_over(tmp_path):
    train(tmp_path, config())
    newest = checkpoint.latest_checkpoint(tmp_path)
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (tmp_path / "checkpoints" / ".partial-step_00000099-1").mkdir()
    assert checkpoint.latest_checkpoint(tmp_path).name == "step_00000010"
    train(tmp_path, config())
    assert checkpoint.latest_checkpoint(tmp_path).name == "step_00000012"
    assert not list((tmp_path / "checkpoints").glob(".partial*"))


def test_full_disk_while_saving_is_one_line_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    train(tmp_path, config(steps=5, schedule="constant"))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StageError, match="disk full while writing checkpoint"):
        train(tmp_path, config(schedule="constant"))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate", "message"),
    [
        (100, 8, 1, "train.batch_size=100 is not divisible by world_size=8; use 96 or 104"),
        (3, 4, 1, "train.batch_size=3 is not divisible by world_size=4; use 4"),
        (10, 2, 2, r"train.batch_size=10 is not divisible by world_size=2 \* accumulate=2; use 8 or 12"),
    ],
)
def test_indivisible_batches_name_the_sizes_that_work(batch_size, world_size, accumulate, message):
    with pytest.raises(ValueError, match=message):
        rank_batch_size(config(batch_size=batch_size, accumulate=accumulate), world_size)


def test_schedules_warm_up_and_end_where_they_should():
    for schedule in ("cosine", "poly", "linear"):
        cfg = config(schedule=schedule, steps=20, warmup_steps=4, min_lr=0.001, lr=0.01)
        rates = [learning_rate(cfg, step) for step in range(20)]
        assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
        assert rates[4] == pytest.approx(0.01) and rates[-1] == pytest.approx(0.001)
        assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert learning_rate(config(schedule="constant", warmup_steps=0), 7) == 0.01


def test_sigterm_in_another_process_saves_and_resumes_bit_for_bit(tmp_path):
    """A real signal to a real process in the middle of training; then the same command to the end."""
    script = tmp_path / "go.py"
    script.write_text(SCRIPT)
    run = tmp_path / "parts"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    first = subprocess.Popen([sys.executable, str(script), str(run)], env=environment)
    progress = run / "progress.json"
    deadline = time.monotonic() + 60
    while not progress.exists() or json.loads(progress.read_text())["step"] < 3:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=30) == 7
    assert checkpoint.latest_checkpoint(run) is not None
    train(run, config(steps=40))
    train(tmp_path / "whole", config(steps=40))
    same_bytes(run, tmp_path / "whole")


SCRIPT = """
import sys
from pathlib import Path
import torch
from toy_training import ToyRecipe, toy_job
from kinema.configs import TrainConfig
from kinema.pipelines.train.loop import train_worker
from kinema.pipelines.train.parallel import Place
from kinema.pipelines.train.stop import CatchSignals, Stop
torch.set_num_threads(1)
config = TrainConfig(steps=40, batch_size=4, lr=0.01, checkpoint_every=5, log_every=3, pictures_every=6,
    warmup_steps=3, seed=3, keep_checkpoints=3, clip_norm=1.0, schedule="cosine")
run = Path(sys.argv[1])
run.mkdir()
stop = Stop()
with CatchSignals(stop.request):
    done = train_worker(toy_job(run, config, ToyRecipe(slow_s=0.25)), Place(), stop)
sys.exit(7 if done.stopped == "SIGTERM" else 0)
"""


def test_second_signal_ends_the_process(tmp_path):
    code = (
        "import os, signal, time\n"
        "from kinema.pipelines.train.stop import CatchSignals\n"
        "with CatchSignals(lambda name: None):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGTERM


def test_loader_is_closed_and_gets_its_share(tmp_path):
    made = []
    job = toy_job(tmp_path, config())

    class Keep(MakeLoader):
        def __call__(self, place):
            made.append(super().__call__(place))
            return made[-1]

    train_worker(dataclasses.replace(job, make_loader=Keep(job.config)), Place(), Stop())
    assert made[0].closed and made[0].batch_size == 4


def test_best_checkpoints_are_judged_by_the_mean_loss_since_the_one_before(tmp_path):
    train(tmp_path, config(steps=8, checkpoint_every=2, keep_checkpoints=1, keep_best=8, log_every=1))
    points = {point["step"]: point["loss"] for point in read_metrics(tmp_path)}
    for folder in checkpoint.complete_checkpoints(tmp_path):
        meta = checkpoint.read_meta(folder)
        assert meta["mean_loss"] == pytest.approx((points[meta["step"]] + points[meta["step"] - 1]) / 2)
