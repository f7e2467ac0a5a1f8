"""A flow network learns rendered motion from its initialisation, on the CPU: its error beside `dis` and zero flow.

`python -m kinema.pipelines.bench.flow_learning [dinoflow|raft_small] [FOLDER [STEPS]]` renders scenes, trains with
configs/NAME_nano.yaml on their exact flow, and prints mean end-point errors in pixels: on scenes it learned from, and
on scenes it never saw. Same pairs for all three rows; hidden pixels count.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kinema.configs import ClipConfig, load_stage
from kinema.models.flow.dis import DIS
from kinema.pipelines import train
from kinema.pipelines.loader import ClipIndex
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow

CONFIGS = {"dinoflow": "dinoflow_nano.yaml", "raft_small": "raft_small_nano.yaml"}
SIZES = {"dinoflow": (96, 128), "raft_small": (128, 128)}
NUM_SCENES, NUM_HELD_OUT, NUM_FRAMES, SPEED_PX = 200, 24, 3, 3.0
FIRST_HELD_OUT_SEED = 10_000

Flow = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FlowErrorTable:
    """Mean end-point errors over the same pairs, pixels."""

    zero: float
    dis: float
    trained: float
    pairs: int
    train_seconds: float
    train_cpu_seconds: float

    def line(self, title: str) -> str:
        """For people."""
        ratio = self.zero / self.trained
        return (
            f"{title}, {self.pairs} pairs: zero flow {self.zero:.3f} px, dis {self.dis:.3f} px, "
            f"trained {self.trained:.3f} px (zero / trained = {ratio:.2f})"
        )


def learn(model: str, folder: Path, overrides: Sequence[str] = ()) -> dict[str, FlowErrorTable]:
    """Render, train and judge; tables for `training scenes` and `held-out scenes`."""
    data = {"training scenes": folder / "train", "held-out scenes": folder / "held_out"}
    write_data(data["training scenes"], range(NUM_SCENES), SIZES[model])
    write_data(data["held-out scenes"], range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + NUM_HELD_OUT), SIZES[model])
    places = [f"{kind}={data['training scenes'] / kind}" for kind in ("clips", "flow")]
    config = load_stage("train", CONFIGS[model], [*places, f"out={folder / 'run'}", *overrides])
    wall, cpu = time.monotonic(), time.process_time()
    train.run(config)
    spent = time.monotonic() - wall, time.process_time() - cpu
    network = train.load_model(folder / "run")
    return {name: judge(network, path, spent) for name, path in data.items()}


def write_data(folder: Path, seeds: range, size: tuple[int, int]) -> None:
    """clips/ and flow/ of scenes, both directions of time."""
    scenes = [Scene(seed, *size, NUM_FRAMES, num_objects=2, speed_px=SPEED_PX) for seed in seeds]
    clips = write_scene_clips(scenes, folder / "clips", ClipConfig(preset="veryfast", gop=4, crf=12), 50)
    write_scene_flow(scenes, clips, folder / "flow", gaps=(1, -1))


@torch.inference_mode()
def judge(network: torch.nn.Module, folder: Path, spent: tuple[float, float], most_clips: int = 24) -> FlowErrorTable:
    """The network, DIS and zero flow on the same stored pairs."""
    index = ClipIndex.open(folder / "clips", folder / "flow")
    methods: dict[str, Flow] = {"zero": lambda a, b: torch.zeros_like(a[:, :2]), "dis": DIS(), "trained": network}
    errors: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(min(len(index), most_clips)):
        clip = index.clip(number)
        for t, gap in clip.flow_pairs:
            images = torch.from_numpy(np.ascontiguousarray(clip.frames([t, t + gap])))
            first, second = rearrange(images, "n h w c -> n 1 c h w").float() / 255
            truth = torch.from_numpy(clip.flow(t, gap))
            for name, method in methods.items():
                errors[name].append((method(first, second)[0] - truth).norm(dim=0).mean().item())
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    return FlowErrorTable(**means, pairs=len(errors["zero"]), train_seconds=spent[0], train_cpu_seconds=spent[1])


def main(arguments: Sequence[str]) -> int:
    """See the top of the file."""
    model = arguments[0] if arguments else "dinoflow"
    if model not in CONFIGS:
        sys.stderr.write(f"{model!r} does not learn here; choose from {', '.join(CONFIGS)}\n")
        return 2
    os.environ.setdefault("KINEMA_ENGINE", "serial")
    with tempfile.TemporaryDirectory(prefix="kinema-learning-") as temporary:
        folder = Path(arguments[1] if len(arguments) > 1 else temporary)
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        folder.mkdir(parents=True, exist_ok=True)
        tables = learn(model, folder, [f"steps={arguments[2]}"] if len(arguments) > 2 else ())
    for name, table in tables.items():
        print(table.line(f"{model} on {name}"))
    print(f"training took {table.train_seconds:.0f} s, {table.train_cpu_seconds:.0f} s of them on the processor")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
