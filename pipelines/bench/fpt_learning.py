"""A small Flow Poke Transformer learns rendered motion: likelihood and error by number of pokes, on the CPU.

`python -m kinema.pipelines.bench.fpt_learning [FOLDER [SETTING=VALUE ...]]` renders scenes with rigid parts, trains
with configs/fpt_demo.yaml on their exact tracks, with other settings of the stage if given, and prints the table, for
other pokes and queries on the training scenes and for scenes it never saw. The baseline is one mixture, of as many
components, fitted to the motion of all training tracks: what is known without an image and without pokes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinema.configs import ClipConfig, TrainConfig, load_stage
from kinema.models.fpt.mixture import GaussianMixture
from kinema.models.fpt.model import NUM_COMPONENTS
from kinema.pipelines import train
from kinema.pipelines.evaluate.pokes.data import TrackSamples
from kinema.pipelines.evaluate.pokes.scores import predict_samples, score
from kinema.pipelines.loader import ClipIndex, Skip
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_tracks
from kinema.pipelines.train.recipes.fpt.recipe import FPTRecipe

NUM_SCENES, NUM_HELD_OUT = 120, 24
FIRST_HELD_OUT_SEED = 10_000
SIDE_PX, NUM_FRAMES, SPEED_PX, GRID = 96, 16, 1.5, 20
COUNTS = (0, 1, 2, 5, 10)
SMALLEST_VARIANCE = 1e-8


@dataclass(frozen=True)
class PokeTable:
    """Means over the same queries for every number of pokes; errors in units of the square's side, nats per unit."""

    pokes: tuple[int, ...]
    nll: tuple[float, ...]
    epe: tuple[float, ...]
    baseline_nll: float
    baseline_epe: float

    def lines(self, title: str) -> list[str]:
        """The table, for people."""
        head = [f"{title}: pokes known", *(f"{n:>8}" for n in self.pokes), "  one mixture for all"]
        nll = ["  negative log-likelihood, nats", *(f"{v:8.3f}" for v in self.nll), f"{self.baseline_nll:10.3f}"]
        epe = [
            "  error, % of the square's side",
            *(f"{100 * v:8.2f}" for v in self.epe),
            f"{100 * self.baseline_epe:10.2f}",
        ]
        return [f"{row[0]:<40}" + "".join(row[1:]) for row in (head, nll, epe)]


def learn(folder: Path, overrides: Sequence[str] = ()) -> dict[str, PokeTable]:
    """Render, train and judge; tables for `training scenes` and `held-out scenes`."""
    return train_and_judge(render(folder), folder / "run", overrides)


def render(folder: Path) -> dict[str, Path]:
    """Clips and tracks of `training scenes` and `held-out scenes`, as folders."""
    data = {"training scenes": folder / "train", "held-out scenes": folder / "held_out"}
    write_data(data["training scenes"], range(NUM_SCENES))
    write_data(data["held-out scenes"], range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + NUM_HELD_OUT))
    return data


def train_and_judge(data: Mapping[str, Path], run: Path, overrides: Sequence[str] = ()) -> dict[str, PokeTable]:
    """Tables of a model trained on what `render` wrote; `run` is the training's folder."""
    places = {"clips": data["training scenes"] / "clips", "tracks": data["training scenes"] / "tracks"}
    named = [f"{name}={path}" for name, path in places.items()]
    config = load_stage("train", "fpt_demo.yaml", [*named, f"out={run}", *overrides])
    train.run(config)
    baseline = fit_mixture(training_flows(config))
    model = train.load_model(run)
    return {name: judge(model, baseline, path, config) for name, path in data.items()}


def write_data(folder: Path, seeds: range) -> None:
    """clips/ and tracks/ of square scenes."""
    scenes = [Scene(seed, SIDE_PX, SIDE_PX, NUM_FRAMES, num_objects=2, speed_px=SPEED_PX) for seed in seeds]
    clips = write_scene_clips(scenes, folder / "clips", ClipConfig(preset="veryfast", gop=4), clips_per_shard=30)
    write_scene_tracks(scenes, clips, folder / "tracks", grid=GRID)


def judge(model: torch.nn.Module, baseline: GaussianMixture, folder: Path, config: TrainConfig) -> PokeTable:
    """The model and the baseline on pokes and queries that training did not draw."""
    index = ClipIndex.open(folder / "clips", None, folder / "tracks")
    samples = TrackSamples(
        index,
        COUNTS,
        num_queries=64,
        gap_s=config.settings.gap_s,
        image_px=config.settings.image_px,
        max_clips=48,
        seed=1,
    )
    rows = score(predict_samples(model, samples, COUNTS), COUNTS, side_px=1).rows  # type: ignore[arg-type]
    flows = torch.cat([sample.query_flow for sample in samples]).double()
    return PokeTable(
        pokes=COUNTS,
        nll=tuple(row["nll_nats"] for row in rows),
        epe=tuple(row["epe_px"] for row in rows),
        baseline_nll=-baseline.log_prob(flows).mean().item(),
        baseline_epe=(baseline.mean - flows).norm(dim=-1).mean().item(),
    )


def training_flows(config: TrainConfig, draws: int = 8) -> Float[Tensor, "N 2"]:
    """Motion of the tracks that training draws from."""
    recipe = FPTRecipe(config.settings)
    index = ClipIndex.open(config.clips, None, config.tracks)
    flows = []
    for number in range(len(index)):
        samples = recipe.read_samples(index.clip(number), [np.random.default_rng([number, i]) for i in range(draws)])
        flows += [sample["query_flow"] for sample in samples if not isinstance(sample, Skip)]
    return torch.cat(flows).flatten(0, 1).double()


def fit_mixture(values: Float[Tensor, "N 2"], components: int = NUM_COMPONENTS, steps: int = 200) -> GaussianMixture:
    """The mixture of normals of highest likelihood that expectation maximisation finds."""
    generator = torch.Generator().manual_seed(0)
    means = values[torch.randperm(len(values), generator=generator)[:components]]
    covariances = values.T.cov().expand(components, 2, 2)
    weights = torch.full((components,), 1 / components, dtype=values.dtype)
    floor = SMALLEST_VARIANCE * torch.eye(2, dtype=values.dtype)
    for _ in range(steps):
        mixture = GaussianMixture(weights.log(), means, torch.linalg.cholesky(covariances + floor))
        share = (mixture.logits + mixture.component_log_prob(values)).softmax(-1)  # [N, K]
        total = share.sum(0)
        weights, means = total / len(values), share.T @ values / total[:, None]
        offset = values[:, None] - means  # [N, K, 2]
        covariances = torch.einsum("nk,nki,nkj->kij", share, offset, offset) / total[:, None, None]
    return GaussianMixture(weights.log(), means, torch.linalg.cholesky(covariances + floor))


def main(arguments: Sequence[str]) -> int:
    """See the top of the file."""
    os.environ.setdefault("KINEMA_ENGINE", "serial")
    with tempfile.TemporaryDirectory(prefix="kinema-learning-") as temporary:
        folder = Path(arguments[0] if arguments else temporary)
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        folder.mkdir(parents=True, exist_ok=True)
        tables = learn(folder, arguments[1:])
    for name, table in tables.items():
        print("\n".join(table.lines(name)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
