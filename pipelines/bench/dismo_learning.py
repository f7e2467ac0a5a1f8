"""What the embeddings of a small DisMo, trained on rendered objects on the CPU, tell of motion and of appearance.

`python -m kinema.pipelines.bench.dismo_learning [FOLDER [STEPS]]` renders clips in which motion and appearance vary
independently, trains with configs/dismo_nano.yaml, prints kNN accuracies on clips it never saw beside two baselines,
and draws objects it never saw moved by motions of other clips (FOLDER/moved_objects.png).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinema.configs import ClipConfig, DisMoConfig, EmbedConfig, EvaluateConfig, KNNConfig, load_stage
from kinema.models.dismo import DisMo
from kinema.models.dismo.autoencoder import load_autoencoder
from kinema.pipelines import embed, train
from kinema.pipelines.evaluate.knn.stage import run_knn
from kinema.pipelines.pictures.images import panel, write_png
from kinema.pipelines.scenes.motion_classes import LABELS, MOTIONS, MotionClip, motion_clips
from kinema.pipelines.scenes.packed import write_scene_clips
from kinema.pipelines.search.exact import Nearest, search
from kinema.pipelines.search.windows import MotionWindows
from kinema.pipelines.train.checkpoint import read_tensors, resolve_checkpoint
from kinema.pipelines.train.recipes.choose import make_recipe
from kinema.pipelines.train.recipes.dismo.recipe import DisMoRecipe

NUM_CLIPS, NUM_HELD_OUT = 1200, 480
TRAINING_SEED, HELD_OUT_SEED = 1, 2
SIDE_PX, NUM_FRAMES = 32, 12
SHOWN: dict[str, Any] = {"side": SIDE_PX, "num_frames": NUM_FRAMES, "close_up": True}
ENCODED = ClipConfig(preset="veryfast", gop=4, crf=12)
SEARCHED, BLOCK_WINDOWS = 10, 2048
PICTURE_ROWS, PICTURE_STEPS = 4, 40
MIDDLE = 2
"""First frame of the eight that the pictures are made from."""


def learn(folder: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Render, train and judge: metrics of benchmark `knn` on held-out clips, and `train_seconds`."""
    clips = list(motion_clips(NUM_CLIPS, TRAINING_SEED, **SHOWN))
    write_scene_clips(clips, folder / "clips", ENCODED, clips_per_shard=100)
    named = [f"clips={folder / 'clips'}", f"out={folder / 'run'}"]
    config = load_stage("train", "dismo_nano.yaml", [*named, *overrides])
    before = _processor_seconds()
    train.run(config)
    seconds = _processor_seconds() - before
    knn = KNNConfig(num_videos=NUM_HELD_OUT, seed=HELD_OUT_SEED, side_px=SIDE_PX, num_frames=NUM_FRAMES, close_up=True)
    metrics, _ = run_knn(EvaluateConfig(model=str(folder / "run"), benchmark="knn", data="scenes", knn=knn))
    metrics |= search_held_out(folder)
    recipe = make_recipe(config)
    assert isinstance(recipe, DisMoRecipe)
    model = recipe.whole_model(read_tensors(resolve_checkpoint(folder / "run")))
    write_png(folder / "moved_objects.png", moved_objects(model, recipe.config))
    return metrics | {"train_seconds": seconds}


def search_held_out(folder: Path) -> dict[str, float]:
    """What `kinema search` finds for every held-out clip among the others, of the same motion class.

    search_hit: share of the clips that have one of their class among the first `SEARCHED`; search_first: whose first
    is one; search_same: mean share of their class among the first `SEARCHED`. Chance is what drawing would give.
    """
    held_out = list(motion_clips(NUM_HELD_OUT, HELD_OUT_SEED, **SHOWN))
    clips = write_scene_clips(held_out, folder / "held_out", ENCODED, clips_per_shard=100)
    out, fps = str(folder / "held_out_features"), held_out[0].fps
    embed.run(EmbedConfig(model=str(folder / "run"), clips=clips.url, out=out, fps=fps, num_actors=1))
    windows = MotionWindows.open(out, clips)
    table = clips.samples(["key", "labels"])
    motion = {row["key"]: json.loads(row["labels"])["motion"] for row in table.to_pylist()}
    by_key = windows.of_keys(list(motion))
    nearest = [Nearest(SEARCHED, {}, [key]) for key in motion]
    found = search(windows.blocks(BLOCK_WINDOWS), [by_key[key] for key in motion], nearest)
    same = np.array([[motion[m.key] == motion[key] for m in one] for key, one in zip(motion, found, strict=True)])
    others = len(motion) / len(MOTIONS) - 1
    chance = others / (len(motion) - 1)
    return {
        "search_hit": float(same.any(axis=1).mean()),
        "search_hit_chance": 1 - (1 - chance) ** SEARCHED,
        "search_first": float(same[:, 0].mean()),
        "search_same": float(same.mean()),
        "search_same_chance": chance,
    }


def _processor_seconds() -> float:
    """Of this process and of the loader's, once they have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


@torch.no_grad()
def moved_objects(model: DisMo, config: DisMoConfig) -> np.ndarray:
    """A row per held-out object: its frame, and that frame moved by a held-out clip of every motion class.

    The clips that give the motion show other objects.
    """
    window, reach = model.motion_extractor.window, model.motion_extractor.max_delta_time
    autoencoder = load_autoencoder("pixels", config.pixels_per_latent, pixel_gain=config.pixel_gain)
    drivers = [MotionClip(7_000_003 + i, m, "disc", "checks", "cyan", **SHOWN) for i, m in enumerate(MOTIONS)]
    videos = torch.from_numpy(np.stack([clip.frames()[MIDDLE : MIDDLE + window] for clip in drivers]))
    motion = model.motion_extractor(videos)[:, 0]
    shown: list[np.ndarray] = []
    for clip in motion_clips(PICTURE_ROWS, 8_000_009, **SHOWN):
        frame = clip.frame(MIDDLE)
        source = (torch.from_numpy(frame).float() / 127.5 - 1).expand(len(MOTIONS), -1, -1, -1)
        side = SIDE_PX // config.pixels_per_latent
        noise = torch.randn(1, side, side, 3, generator=torch.Generator().manual_seed(0))
        delta = torch.full((len(MOTIONS),), float(reach))
        latents = model.frame_generator.sample(
            source, motion, delta, PICTURE_STEPS, noise=noise.expand(len(MOTIONS), -1, -1, -1)
        )
        made = (autoencoder.decode(latents) * 127.5 + 127.5).round().byte().numpy()
        shown += [frame, *made]
    return panel([np.kron(picture, np.ones((3, 3, 1), np.uint8)) for picture in shown], columns=1 + len(MOTIONS))


def lines(metrics: dict[str, float]) -> list[str]:
    """The table, for people: accuracy and, in brackets, how many times chance it is."""
    columns = {"DisMo": "", "flow histogram": "_flow_histogram", "untrained frame features": "_untrained_frames"}
    table = [f"{'kNN accuracy, %':<18}{'chance':>8}" + "".join(f"{name:>28}" for name in columns)]
    for label in LABELS:
        row = f"{label:<18}{100 * metrics[f'knn_{label}_chance']:>8.1f}"
        for suffix in columns.values():
            accuracy = metrics[f"knn_{label}{suffix}"]
            shown = f"{100 * accuracy:.1f} (x {metrics[f'knn_{label}{suffix}_over_chance']:.2f})"
            row += f"{shown:>28}"
        table.append(row)
    hit, same = (
        f"{100 * metrics[f'search_{name}']:.1f} (chance {100 * metrics[f'search_{name}_chance']:.1f})"
        for name in ("hit", "same")
    )
    return [
        *table,
        f"search: one of the same motion in the first {SEARCHED} for {hit} % of the clips, {same} % of all found; "
        f"the first one for {100 * metrics['search_first']:.1f} %",
        f"trained for {metrics['train_seconds'] / 60:.1f} minutes of processor time",
    ]


def main(arguments: Sequence[str]) -> int:
    """See the top of the file."""
    os.environ.setdefault("KINEMA_ENGINE", "serial")
    with tempfile.TemporaryDirectory(prefix="kinema-dismo-") as temporary:
        folder = Path(arguments[0] if arguments else temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        metrics = learn(folder, [f"steps={arguments[1]}"] if len(arguments) > 1 else ())
    print("\n".join(lines(metrics)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
