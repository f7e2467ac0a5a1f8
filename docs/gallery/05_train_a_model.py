"""A small FlowFeat learns from scratch; the run folder holds checkpoints, metrics and pictures."""

import shutil
from pathlib import Path

import kinema

done = kinema.train(
    clips="clips",
    flow="flow/dis",
    out="run",
    flowfeat={
        "variant": "conv_small",
        "fit_with": "trained",
        "resize": 64,
        "crop": 48,
        "ema_every": 1,
        "ema_decay": 0.5,
    },
    loader={"num_workers": 0},
    steps=12,
    batch_size=4,
    lr=2e-3,
    pictures_every=0,
)
print(f"step {done.step}, loss {done.loss:.3f}, {done.samples_per_second:.1f} samples/s")
shutil.copyfile(sorted(Path("run/pictures").glob("*.png"))[-1], "05_train_a_model.png")
