"""A registered model serves programs that have mlflow, torch and numpy, but not kinema."""

import mlflow
import torch

import kinema
from kinema.pipelines.pictures import feature_pca, write_png

version = kinema.register(model="run")
mlflow.set_tracking_uri(version.out)
model = mlflow.pyfunc.load_model(version.uri)
frames = kinema.open("clips")[0].frames([0, 7])
small = model.predict(frames, params={"pooled": True, "outputs": "y_dec"})
maps = model.predict(frames, params={"outputs": "y_dec"})
print(f"{version.name} version {version.version}: pooled {small['y_dec'].shape}, maps {maps['y_dec'].shape}")
write_png("07_registry.png", feature_pca(torch.from_numpy(maps["y_dec"][0])))
