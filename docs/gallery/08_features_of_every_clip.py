"""Every clip embedded; which ones are alike."""

import numpy as np
import torch

import kinema
from kinema.pipelines.pictures import write_png
from kinema.pipelines.pictures.projection import Projection

kinema.embed(model="run", clips="clips", out="features", features="pooled", short_side=64)
features = kinema.open("features")
means = np.stack([features[key]["y_dec"].mean(axis=0) for key in features])
means = (means - means.mean(axis=0)) / np.linalg.norm(means - means.mean(axis=0), axis=1, keepdims=True)
alike = means @ means.T
print(f"{len(features)} clips; the most alike two: {np.max(alike - 2 * np.eye(len(alike))):.2f}")
picture = Projection.of([torch.from_numpy(alike)[None]]).picture(torch.from_numpy(alike)[None])
write_png("08_features_of_every_clip.png", np.kron(picture, np.ones((24, 24, 1), np.uint8)))
