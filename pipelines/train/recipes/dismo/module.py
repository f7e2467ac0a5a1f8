"""DisMo as the loop trains it: the model and its average."""

from __future__ import annotations

from typing import Any

from torch import nn

from kinema.models.dismo import DisMo
from kinema.models.ema import EMA


class DisMoTraining(nn.Module):
    """The trained model and its moving average."""

    def __init__(self, model: DisMo, decay: float, update_every: int):
        super().__init__()
        self.model = model
        self.average = EMA(model, beta=decay, update_every=update_every)

    def chosen(self, ema: bool = True) -> Any:
        """The averaged model, or the trained one."""
        return self.average.ema_model if ema else self.model
