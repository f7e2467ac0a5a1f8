"""The registered model as MLflow calls it: images in, features out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from .network import build_model, images_to_input

IMAGES_PER_CALL = 8


class Predictor(PythonModel):
    """`predict(images)`; see `images_to_input` for what images may be.

    Runs on the CPU unless loaded with `model_config={"device": "cuda"}`. `predict` has no type hint on its input:
    MLflow asks for one, but would take it for a schema, of forms that arrays cannot be.
    """

    def load_context(self, context: Any) -> None:
        """Build the network from config.json and load its weights strictly."""
        self.config = json.loads(Path(context.artifacts["config"]).read_text())
        self.device = torch.device((context.model_config or {}).get("device", "cpu"))
        self.model = build_model(self.config, context.artifacts["weights"], __package__).to(self.device)

    def predict(self, context, model_input, params=None) -> dict[str, np.ndarray]:
        """Features of a batch of images, float32, by name (FlowFeat: y_enc [B, C, h, w] and y_dec [B, 128, H, W])."""
        images = images_to_input(model_input, self.config["inputs"])
        parts = []
        with torch.no_grad():
            for part in images.split(IMAGES_PER_CALL):
                outputs = self.model(part.to(self.device))
                parts.append([output.float().cpu() for output in outputs])
        joined = [torch.cat(outputs).numpy() for outputs in zip(*parts, strict=True)]
        return dict(zip(self.config["outputs"], joined, strict=True))
