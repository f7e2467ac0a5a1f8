"""The adapted video model as the loop trains it: what is saved is the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kinema.models.dismo.transfer.model import MotionTransfer


class AdapterTraining(nn.Module):
    """Holds the whole model; its state dict is the adapter's, under the published keys."""

    def __init__(self, model: MotionTransfer):
        super().__init__()
        self.model = model

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter; the base, tens of gigabytes that nobody changes, is not saved again."""
        return self.model.adapter_state()

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *_: Any, **__: Any) -> Any:
        """The adapter. Raises: ValueError if it does not fit."""
        self.model.load_adapter(state_dict, "checkpoint")
