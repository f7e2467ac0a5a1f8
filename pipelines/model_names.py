"""Names of the table of models as `model=` takes them."""

from __future__ import annotations

from kinema.configs.models.row import ModelRow
from kinema.configs.models.table import MODELS

REGISTRY_SCHEMES = ("models:/", "runs:/")


def named_row(address: str) -> ModelRow | None:
    """The row whose network goes by this name; None for paths and registry addresses."""
    if address.startswith(REGISTRY_SCHEMES):
        return None
    return next((row for row in MODELS.values() if row.build and address in row.names()), None)
