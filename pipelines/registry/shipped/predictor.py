"""The registered model as MLflow calls it."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from .network import build_model

with warnings.catch_warnings():
    # MLflow advises a type hint, but would take it for a schema, of forms that arrays cannot be.
    warnings.simplefilter("ignore")

    class Predictor(PythonModel):
        """`predict(inputs, params)`; the module named by config.json's `serving` says what goes in and comes out.

        Runs on the CPU unless loaded with `model_config={"device": "cuda"}`.
        """

        def load_context(self, context: Any) -> None:
            """Build the network from config.json and load its weights strictly."""
            self.config = json.loads(Path(context.artifacts["config"]).read_text())
            self.device = torch.device((context.model_config or {}).get("device", "cpu"))
            network = getattr(importlib.import_module(f".{self.config['module']}", __package__), self.config["class"])
            self.model = build_model(network, self.config, context.artifacts["weights"]).to(self.device)
            self.form = importlib.import_module(f".{self.config['serving']}", __package__)

        def predict(self, context, model_input, params=None) -> dict[str, np.ndarray]:
            """Arrays by name, as `answer` of the serving module describes them."""
            with torch.no_grad():
                return self.form.answer(self.model, model_input, params or {}, self.config, self.device)
