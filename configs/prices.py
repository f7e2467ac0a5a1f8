"""What nodes cost."""

from __future__ import annotations

from dataclasses import dataclass, fields

from kinema.configs.checks import require


@dataclass(frozen=True)
class PricesConfig:
    """Dollars for a node and hour, by what the node has; for `kinema status` and for the metrics of a workflow."""

    cpu_node: float = 0.0
    """A node with CPUs."""
    gpu_node: float = 0.0
    """A node with a GPU."""
    head: float = 0.0
    """A node without CPUs of Ray's: the head."""

    def __post_init__(self) -> None:
        for price in fields(self):
            value = getattr(self, price.name)
            require(value >= 0, f"prices.{price.name}", value, "use dollars for an hour, or 0")
