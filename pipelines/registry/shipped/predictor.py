"""The registered model as MLflow calls it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.pyfunc import PythonModel

from .network import build_model


class Predictor(PythonModel):
    """`predict(inputs, params)`; the module named by config.json's `serving` says what goes in and comes out.

    Runs on the CPU unless loaded with `model_config={"device": "cuda"}`. The hint on `model_input` is the one form that
    MLflow neither advises against nor takes for a schema; a mapping of arrays by input name is the usual one.
    """

    def load_context(self, context: Any) -> None:
        """Build the network from config.json and load its weights strictly."""
        self.config = json.loads(Path(context.artifacts["config"]).read_text())
        self.device = torch.device((context.model_config or {}).get("device", "cpu"))
        network = getattr(importlib.import_module(f".{self.config['module']}", __package__), self.config["class"])
        self.model = build_model(network, self.config, context.artifacts["weights"]).to(self.device)
        self.form = importlib.import_module(f".{self.config['serving']}", __package__)

    def predict(self, context, model_input: np.ndarray, params=None) -> dict[str, np.ndarray]:
        """Arrays by name, as `answer` of the serving module describes them."""
        with torch.no_grad():
            return self.form.answer(self.model, model_input, params or {}, self.config, self.device)
