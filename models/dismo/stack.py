"""Runs a stack of transformer layers, keeping activations or making them again in the backward pass."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute


def run_layers(layers: Iterable[nn.Module], x: Tensor, *arguments: Tensor | None, checkpoint: bool = False) -> Tensor:
    """x through all layers, each called as `layer(x, *arguments)`.

    Args: checkpoint keeps only the input of every layer for the backward pass and runs the layer once more there.
    """
    for layer in layers:
        if checkpoint and torch.is_grad_enabled():
            x = recompute(layer, x, *arguments, use_reentrant=False)
        else:
            x = layer(x, *arguments)
    return x
