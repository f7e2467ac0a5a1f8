"""Code that travels with a registered model; it may import torch, numpy, mlflow and its neighbours only."""
