"""The path from videos to features over Ray nodes that come and go and share nothing but an object store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ray_nodes import ADDRESS, Nodes, end_of, in_namespace, needs_namespace, num_commits, objects, start_stage
from s3_server import s3_server
from toy_training import ToyRecipe, toy_job

BUCKET = "s3://kinema"
NUM_FILMS = 12
SMALL_MODEL = ["model=flowfeat", "flowfeat.variant=dino_vits16_yt", "flowfeat.resize=48", "flowfeat.crop=32"]


def path_of_stages(root: str) -> dict[str, list[str]]:
    """Each stage's arguments, in order; the clips of a film are a shard each."""
    clips, flow, tracks = f"{root}/clips", f"{root}/flow", f"{root}/tracks"
    shard = [f"videos={BUCKET}/videos", f"out={clips}", "clip.preset=ultrafast", "clip.seconds=0.5"]
    return {
        "shard": [*shard, f"min_shards={NUM_FILMS}"],
        "teach": [f"clips={clips}", f"out={flow}", "teacher=dis", "gaps=[1]"],
        "track": [f"clips={clips}", f"flow={flow}", f"out={tracks}", "tracker=chain", "grid=4"],
        "embed": [f"clips={clips}", f"model={BUCKET}/run", f"out={root}/features", "frame_stride=6", "num_actors=2"],
    }


def train_in_bucket() -> None:
    """A checkpoint at BUCKET/run, for embed."""
    inputs = [f"clips={BUCKET}/calm/clips", f"flow={BUCKET}/calm/flow", "steps=1", "batch_size=1"]
    where = [f"out={BUCKET}/run", "loader.num_workers=0", "use_gpu=no"]
    end_of(start_stage("train", *inputs, *where, *SMALL_MODEL, engine="serial"))


def put_films() -> None:
    from kinema.pipelines.scenes import Scene
    from kinema.pipelines.scenes.demo import write_scene

    files = fsspec.filesystem("s3")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(NUM_FILMS):
            path = Path(folder) / f"{seed}.mp4"
            write_scene(Scene(seed=seed, height=64, width=96, num_frames=12), path)
            files.put_file(str(path), f"kinema/videos/{path.name}")


def lose_a_node(stage: subprocess.Popen, out: str, nodes: Nodes, lost: str, brought: str) -> int:
    """Kill one node between two commits and bring another. Returns: commits at that moment."""
    deadline = time.monotonic() + 300
    while (there := num_commits(out)) < 2:
        if stage.poll() is not None or time.monotonic() > deadline:
            stage.kill()
            raise RuntimeError(f"{there} commits: {stage.communicate()[1][-4000:]}; {nodes.log(lost)}")
        time.sleep(0.05)
    nodes.kill(lost)
    nodes.add(brought)
    return there


def scene() -> dict[str, Any]:
    """Serially, then on nodes of which one is lost while clips are made and one while flow is computed."""
    with s3_server() as faults:
        put_films()
        for name, arguments in path_of_stages(f"{BUCKET}/calm").items():
            if name == "embed":
                train_in_bucket()
            end_of(start_stage(name, *arguments, engine="serial"))
        faults.latency_s = 0.03
        found: dict[str, Any] = {"killed_at": {}, "summaries": {}}
        with Nodes() as nodes:
            nodes.add("a")
            nodes.add("b")
            for name, arguments in path_of_stages(f"{BUCKET}/nodes").items():
                stage = start_stage(name, *arguments)
                lost = {"shard": ("a", "c"), "teach": ("b", "d")}.get(name)
                if lost:
                    out = next(text for text in arguments if text.startswith("out=")).partition("=")[2]
                    found["killed_at"][name] = lose_a_node(stage, out, nodes, *lost)
                found["summaries"][name] = end_of(stage)
        faults.latency_s = 0.0
        return found | {"calm": objects(f"{BUCKET}/calm"), "nodes": objects(f"{BUCKET}/nodes")}


@needs_namespace
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nodes_that_are_lost_and_brought_change_no_byte():
    found = in_namespace(scene, timeout=1400)
    assert set(found["killed_at"]) == {"shard", "teach"}
    assert all(2 <= commits < NUM_FILMS for commits in found["killed_at"].values()), "in the middle of the work"
    assert found["summaries"]["shard"]["clips"] == found["summaries"]["embed"]["clips"] == NUM_FILMS
    assert sum(name.endswith(".tar") for name in found["calm"]) == 4 * NUM_FILMS
    assert found["nodes"] == found["calm"]


RANKS = ["num_workers=2", "cpus_per_worker=1", "steps=10", "batch_size=4", "checkpoint_every=1", "log_every=1"]
RANKS += ["lr=1e-3", "pictures_every=0", "loader.num_workers=0", "use_gpu=no", "keep_checkpoints=3", *SMALL_MODEL]


def checkpoints(run: str) -> list[str]:
    """Names of the checkpoints that are whole in the bucket."""
    from kinema.pipelines.train.bucket_run import run_store, whole_checkpoints

    return whole_checkpoints(run_store(run))


def lose_the_node_of_rank_0(stage: subprocess.Popen, run: str, nodes: Nodes) -> tuple[str, str]:
    """Once a few checkpoints are in the bucket. Returns: the node, and the newest checkpoint at that moment."""
    deadline = time.monotonic() + 400
    while len(there := checkpoints(run)) < 3:
        if stage.poll() is not None or time.monotonic() > deadline:
            stage.kill()
            raise RuntimeError(f"{there}: {stage.communicate()[1][-4000:]}")
        time.sleep(0.2)
    name = nodes.holding("kinema-run-*-rank0/checkpoints/*/meta.json")
    nodes.kill(name)
    nodes.add("another")
    return name, there[-1]


def training_scene() -> dict[str, Any]:
    """Two ranks on two nodes without a shared folder: undisturbed, and with the node of rank 0 lost on the way."""
    with s3_server():
        put_films()
        for name in ("shard", "teach"):
            end_of(start_stage(name, *path_of_stages(f"{BUCKET}/calm")[name], engine="serial"))
        inputs = [f"clips={BUCKET}/calm/clips", f"flow={BUCKET}/calm/flow"]
        with Nodes() as nodes:
            nodes.add("a")
            nodes.add("b")
            calm = end_of(start_stage("train", *inputs, f"out={BUCKET}/calm-run", *RANKS))
            stage = start_stage("train", *inputs, f"out={BUCKET}/run", *RANKS)
            lost, at = lose_the_node_of_rank_0(stage, f"{BUCKET}/run", nodes)
            summary = end_of(stage)
        found = {"lost": lost, "at": at, "calm": calm, "summary": summary}
        for name in ("calm-run", "run"):
            newest = checkpoints(f"{BUCKET}/{name}")[-1]
            files = objects(f"{BUCKET}/{name}/checkpoints/{newest}")
            lines = fsspec.filesystem("s3").cat_file(f"kinema/{name}/metrics.jsonl").decode().splitlines()
            losses = [(point["step"], point["loss"]) for point in map(json.loads, lines)]
            found[name] = {"newest": newest, "weights": files["model.safetensors"], "losses": losses}
        return found


@needs_namespace
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_node_of_rank_0_is_lost_and_the_weights_are_the_same():
    found = in_namespace(training_scene, timeout=1400)
    assert found["lost"] in ("a", "b") and found["at"] < "step_00000010"
    assert found["run"]["newest"] == "step_00000010" and len(found["run"]["losses"]) == 10
    assert found["run"] == found["calm-run"]
    assert found["summary"]["step"] == 10 and found["summary"]["checkpoint"].startswith("s3://kinema/run/checkpoints/")


STEPS_OF_NOTICE = dict(steps=60, batch_size=4, lr=0.01, log_every=1, pictures_every=0, num_workers=2, use_gpu="no")


class Watched(ToyRecipe):
    """Every rank says which steps it has done; rank 0 where it is, in the node's own folder and to all."""

    def __init__(self, folder: str, slow_s: float):
        super().__init__(noise=0, slow_s=slow_s)
        self.folder = folder

    def after_step(self, module, step):
        import ray
        import torch.distributed as dist

        super().after_step(module, step)
        if self.folder and dist.get_rank() == 0:
            (Path(tempfile.gettempdir()) / "rank-0-is-here").touch()
            (Path(self.folder) / "node").write_text(ray.get_runtime_context().get_node_id())
            with (Path(self.folder) / "steps").open("a") as steps:
                steps.write(f"{step}\n")


def take_away_with_notice(nodes: Nodes, folder: Path, found: dict[str, Any]) -> None:
    """Tell Ray, some steps on, that the node of rank 0 goes in 15 s, and let it go then."""
    while not (folder / "steps").exists() or len((folder / "steps").read_text().split()) < 5:
        time.sleep(0.1)
    lost, node = nodes.holding("rank-0-is-here"), (folder / "node").read_text()
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    when = ["--deadline-remaining-seconds", "15"]
    ray = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", ADDRESS]
    told = subprocess.run([*ray, "--node-id", node, *reason, *when], capture_output=True, text=True)
    found |= {"drained": told.returncode == 0, "said": told.stderr[-500:]}
    found["told_at"] = int((folder / "steps").read_text().split()[-1])
    time.sleep(15)
    nodes.kill(lost)


def notice_scene() -> dict[str, Any]:
    """Two ranks on two of three nodes; no checkpoint is due before the end, and no failure is allowed."""
    import toy_training
    from ray import cloudpickle
    from test_train_elastic import train

    from kinema.configs import TrainConfig
    from kinema.pipelines.train import checkpoint
    from kinema.pipelines.train.launch import launch

    for module in (toy_training, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)
    folder = Path(tempfile.mkdtemp())
    calm, run, found = folder / "calm", folder / "run", {}
    train(calm, [(2, STEPS_OF_NOTICE["steps"])], **STEPS_OF_NOTICE, cpus_per_worker=1, checkpoint_every=1000)
    run.mkdir()
    config = TrainConfig(**STEPS_OF_NOTICE, cpus_per_worker=1, checkpoint_every=1000, max_failures=0, seed=3)
    os.environ |= {"RAY_ADDRESS": ADDRESS}
    with Nodes() as nodes:
        for name in "abc":
            nodes.add(name)
        nodes.wait_for(3)
        arguments = nodes, folder, found
        threading.Thread(target=take_away_with_notice, args=arguments, daemon=True).start()
        finished = launch(toy_job(run, config, Watched(str(folder), 0.5)))
    weights = [(checkpoint.latest_checkpoint(one) / "model.safetensors").read_bytes() for one in (run, calm)]
    steps = [int(step) for step in (folder / "steps").read_text().split()]
    return found | {"step": finished.step, "same": weights[0] == weights[1], "steps": steps}


@needs_namespace
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_notice_saves_what_the_node_has_done_and_is_no_failure():
    found = in_namespace(notice_scene, timeout=800)
    assert found["drained"], found["said"]
    assert found["step"] == STEPS_OF_NOTICE["steps"] and found["same"]
    (place,) = [place for place in range(1, len(found["steps"])) if found["steps"][place] <= found["steps"][place - 1]]
    left, began = found["steps"][place - 1], found["steps"][place]
    print(f"told after step {found['told_at']}, gone after {left}, on from {began}")
    assert found["told_at"] < began <= left
