"""Code that travels with a registered model; it may import torch, numpy, mlflow and its neighbours only."""

from .predictor import Predictor

__all__ = ["Predictor"]
