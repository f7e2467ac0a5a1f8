"""An averaged copy of a model that is being trained, with the schedule FlowFeat was published with.

The averaged copy follows the trained ("online") model by ema += (1 - decay) * (online - ema). The state
dict holds the online model (a second name of its tensors), the copy, whether it was started, and the
number of calls.
"""

import copy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """Exponential moving average of a model's parameters and buffers.

    Args:
        model: the trained model; it stays shared, not copied.
        beta: largest decay.
        update_every: the average moves at calls 0, n, 2n, ... of `update`.
        power: the decay warms up as 1 - (1 + k)^-power, where k is the number of calls before the current
            one, less one.
    """

    initted: Tensor
    step: Tensor

    def __init__(self, model: nn.Module, beta: float = 0.999, update_every: int = 5, power: float = 2 / 3):
        super().__init__()
        self.beta, self.update_every, self.power = beta, update_every, power
        self.online_model = model
        self.ema_model = copy.deepcopy(model).requires_grad_(False).eval()
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0))

    def decay(self) -> float:
        """Decay that the present number of calls gives."""
        calls = max(int(self.step) - 2, 0)
        return min(1 - (1 + calls) ** -self.power, self.beta) if calls else 0.0

    @torch.no_grad()
    def update(self) -> None:
        """Count a training step; move the average if it is due."""
        call = int(self.step)
        self.step.add_(1)
        if not self.initted:
            self._blend(1.0)
            self.initted.fill_(True)
        elif call % self.update_every == 0:
            self._blend(1.0 if call <= 1 else 1.0 - self.decay())

    def forward(self, *args, **kwargs) -> Tensor:
        """The averaged model's output, without gradient."""
        with torch.no_grad():
            return self.ema_model(*args, **kwargs)

    def train(self, mode: bool = True) -> "EMA":
        super().train(mode)
        self.ema_model.eval()
        return self

    def _blend(self, share: float) -> None:
        """Move the average towards the online model by `share` of the distance."""
        online, average = self.online_model.state_dict(), self.ema_model.state_dict()
        for key, value in average.items():
            if share == 1.0 or not value.is_floating_point():
                value.copy_(online[key])
            else:
                value.lerp_(online[key], share)
