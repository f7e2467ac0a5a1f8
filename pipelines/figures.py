"""Figures of a stage that is running, told to whoever listens: Ray's Prometheus endpoint, a workflow's MLflow run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figures:
    """How far a stage is."""

    stage: str
    unit: str
    """What is counted."""
    done: int
    total: int
    per_second: float
    eta_s: float | None
    """Seconds left; None where nothing is finished yet."""

    def numbers(self) -> dict[str, float]:
        """By name, as Prometheus and MLflow get them."""
        found = {"items_done": float(self.done), "items_total": float(self.total), "items_per_second": self.per_second}
        return found if self.eta_s is None else found | {"eta_seconds": self.eta_s}


Listener = Callable[[Figures], None]
_listeners: list[Listener] = []
_gauges: dict[str, Any] = {}
_MEANING = {
    "items_done": "Clips, videos or steps that are finished",
    "items_total": "Clips, videos or steps in all",
    "items_per_second": "Finished per second, since the stage began",
    "eta_seconds": "Seconds left at that rate",
    "cost_dollars": "Dollars since the stage began, from prices in the config",
}


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Meanwhile, the figures of every stage of this process go to `listener` too."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(figures: Figures) -> None:
    """Hand the figures on."""
    export(figures.stage, figures.numbers())
    for listener in [*_listeners]:
        listener(figures)


def export(stage: str, numbers: dict[str, float]) -> None:
    """Set Ray's gauges `ray_kinema_NAME{stage=...}`, which its Prometheus endpoint shows; nothing without Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    from ray.util.metrics import Gauge

    for name, value in numbers.items():
        if name not in _gauges:
            _gauges[name] = Gauge(f"kinema_{name}", description=_MEANING[name], tag_keys=("stage",))
        _gauges[name].set(value, tags={"stage": stage})
