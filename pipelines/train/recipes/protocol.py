"""What differs between models in training: one object with a handful of methods.

The loop (`loop.py`) knows nothing of flow, tracks or features; a recipe knows nothing of ranks, checkpoints,
schedules or logging.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from kinema.configs import TrainConfig

Batch = dict[str, Any]


@dataclass
class Loss:
    """What one forward pass says.

    `value` is the mean over the `num_samples` samples that count, with a graph even if none does (then 0); the
    loop weighs it by that number, so that skipped samples, accumulation and ranks never change a sample's weight.
    """

    value: Tensor
    """Scalar, float32."""
    num_samples: Tensor
    """Scalar: samples of the batch that counted."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Scalars, means over the same samples; the same names in every step and on every rank."""


def as_count(number: int, like: Tensor) -> Tensor:
    """`Loss.num_samples`, on a tensor's device: not copied there, which would wait for all that is queued."""
    return like.new_full((), number, dtype=torch.float32)


@dataclass(frozen=True)
class ExportedModel:
    """A trained model as the registry stores it: no pickle, no reference to the run that made it."""

    architecture: str
    """The model's name in the table of models."""
    config: Mapping[str, Any]
    """Keyword arguments of that builder, JSON values only."""
    tensors: Mapping[str, Tensor]
    """The model's whole state dict."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """How images in 0..1 become the model's input: `mean` and `std` per channel."""
    licences: Mapping[str, str] = field(default_factory=dict)
    """Licence of each published part the tensors derive from."""


class Recipe(Protocol):
    """A model's side of training. Instances are pickled to the ranks, so they hold settings, not tensors."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Sidecars without which `read_sample` cannot work, for example `("flow",)`."""

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """The recipe that a training's config asks for; `config.settings` are of the row's dataclass."""

    def check(self) -> None:
        """Refuse, before anything starts, settings and weights that cannot work (ValueError)."""

    def build(self) -> nn.Module:
        """The whole trainable module, moving averages included. The loop has seeded every generator."""

    def read_sample(self, clip: Any, rng: np.random.Generator) -> Any:
        """One sample from one clip, or `Skip(reason)`; runs in loader workers, all randomness from `rng`.

        A recipe may also have `read_samples(clip, rngs)`, which gives for each generator what `read_sample` would, but
        opens and decodes once; it is used where `loader.samples_per_clip` > 1. One may have `notices()`: sentences that
        a user must know of a model trained so, such as an untrained encoder or a licence; the driver says them. One
        whose model may be sharded has `shard_units(module)`: the modules whose weights are shared out over ranks and
        gathered while their forward runs, inner ones first; together they hold all that is trained. And
        `measure(module, clips)`: figures, by name, of what the module makes of held-out clips, for `measure_every`.
        `compiled_units(module)`: the layers that `train.compile` compiles, on a GPU unasked where the recipe has
        `compiles_on_gpu = True`.
        One with `learns_in_bf16 = True` trains so on CPUs with `precision=auto`, too (`precision.py`).
        """

    def loss(self, module: nn.Module, batch: Batch) -> Loss:
        """Forward pass of one (micro-)batch on the module's device."""

    def after_step(self, module: nn.Module, step: int) -> None:
        """Called after optimizer step number `step` (the first is 1): moving averages."""

    def pictures(self, module: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Pictures to look at, uint8 [H, W, 3], by name."""

    def published_model(self, tensors: Mapping[str, Tensor], ema: bool = True) -> nn.Module:
        """The model to use, in eval mode, from the state dict of `build()`'s module (a checkpoint)."""

    def export(self, model: nn.Module) -> ExportedModel:
        """What the registry stores of `published_model`'s result."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Every tensor of the batch on the device; the rest unchanged."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
