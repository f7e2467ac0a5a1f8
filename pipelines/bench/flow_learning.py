"""A flow network learns rendered motion from its initialisation, on the CPU: its error beside `dis` and zero flow.

`python -m kinema.pipelines.bench.flow_learning [dinoflow|raft_small] [FOLDER [STEPS]]` trains with
configs/NAME_nano.yaml, which renders its pairs as it goes, and prints mean end-point errors in pixels over pairs of
another seed, none of which it saw. Same pairs for all three methods; hidden pixels count. Given a FOLDER, it goes on
from what is there.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kinema.configs import TrainConfig, load_stage
from kinema.models.flow.dis import DIS
from kinema.pipelines import train
from kinema.pipelines.loader.rendered import RenderedIndex

CONFIGS = {"dinoflow": "dinoflow_nano.yaml", "raft_small": "raft_small_nano.yaml"}
NUM_HELD_OUT = 64
HELD_OUT_SEED = 10_000

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
            f"{title}, {self.pairs} pairs never seen: zero flow {self.zero:.3f} px, dis {self.dis:.3f} px, "
            f"trained {self.trained:.3f} px (zero / trained = {ratio:.2f})"
        )


def learn(model: str, folder: Path, overrides: Sequence[str] = ()) -> FlowErrorTable:
    """Train, or go on, and judge."""
    config = load_stage("train", CONFIGS[model], [f"out={folder / 'run'}", *overrides])
    wall, cpu = time.monotonic(), time.process_time()
    train.run(config)
    spent = time.monotonic() - wall, time.process_time() - cpu
    return judge(train.load_model(folder / "run"), held_out(config), spent)


def held_out(config: TrainConfig) -> RenderedIndex:
    """Pairs that are drawn as those of the training, from another seed."""
    return RenderedIndex.of(replace(config.rendered, seed=config.rendered.seed + HELD_OUT_SEED, count=NUM_HELD_OUT))


@torch.inference_mode()
def judge(network: torch.nn.Module, index: RenderedIndex, spent: tuple[float, float] = (0.0, 0.0)) -> FlowErrorTable:
    """The network, DIS and zero flow on the same pairs."""
    methods: dict[str, Flow] = {"zero": lambda a, b: torch.zeros_like(a[:, :2]), "dis": DIS(), "trained": network}
    errors: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(len(index)):
        shot = index.clip(number)
        images = torch.from_numpy(shot.frames([0, 1]))
        first, second = rearrange(images, "n h w c -> n 1 c h w").float() / 255
        truth = torch.from_numpy(shot.flow(0, 1))
        for name, method in methods.items():
            errors[name].append((method(first, second)[0] - truth).norm(dim=0).mean().item())
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    return FlowErrorTable(**means, pairs=len(index), train_seconds=spent[0], train_cpu_seconds=spent[1])


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
        table = learn(model, folder, [f"steps={arguments[2]}"] if len(arguments) > 2 else ())
    print(table.line(model))
    print(f"training took {table.train_seconds:.0f} s, {table.train_cpu_seconds:.0f} s of them on the processor")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
