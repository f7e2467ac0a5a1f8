"""The one table of models: what lists, checks, builds, trains, evaluates, registers or shows models reads it.

A package of yours adds a row with `MODELS.add(ModelRow(...))` in a module that the environment variable KINEMA_MODELS
names (several with commas), or that an entry point of the group `kinema.models` names; docs/ADD_A_MODEL.md shows how.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Iterator, Mapping

from kinema.configs.models.row import Kind, ModelRow
from kinema.configs.models.rows import ROWS

PLUGINS_VARIABLE = "KINEMA_MODELS"
PLUGINS_GROUP = "kinema.models"


class ModelTable(Mapping[str, ModelRow]):
    """Rows by name, in the order in which people should see them. Rows of plugins are there from the first look on."""

    def __init__(self, rows: tuple[ModelRow, ...]):
        self._rows = {row.name: row for row in rows}
        self._complete = False

    def add(self, row: ModelRow) -> None:
        """Add a model, or replace the one of this name. Raises: ValueError for a section that is another model's."""
        for other in self._rows.values():
            if row.section and other.section == row.section and other.settings is not row.settings:
                raise ValueError(f"section {row.section!r} of model {row.name} belongs to {other.name}; choose another")
        self._rows[row.name] = row

    def __getitem__(self, name: str) -> ModelRow:
        return self._all()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def trainable(self) -> tuple[str, ...]:
        """Models that `kinema train` trains."""
        return tuple(name for name, row in self.items() if row.recipe)

    def teachers(self) -> tuple[str, ...]:
        """Models that `kinema teach` runs."""
        return tuple(name for name, row in self.items() if row.teacher)

    def trackers(self) -> tuple[str, ...]:
        """Models that `kinema track` runs."""
        return tuple(name for name, row in self.items() if row.tracker)

    def of_kind(self, kind: Kind) -> tuple[str, ...]:
        """Models that give this."""
        return tuple(name for name, row in self.items() if row.kind == kind)

    def demos(self) -> tuple[str, ...]:
        """Models with a `kinema demo`."""
        return tuple(name for name, row in self.items() if row.demo)

    def sections(self) -> dict[str, type]:
        """{section: dataclass} of every model's training settings."""
        return {row.section: row.settings for row in self.values() if row.settings}

    def _all(self) -> dict[str, ModelRow]:
        if not self._complete:
            self._complete = True
            for module in filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(",")):
                try:
                    importlib.import_module(module.strip())
                except ModuleNotFoundError as error:
                    raise ValueError(
                        f"{PLUGINS_VARIABLE}={module}: {error}; name an importable module, or unset it"
                    ) from None
            for entry in importlib.metadata.entry_points(group=PLUGINS_GROUP):
                entry.load()
        return self._rows


MODELS = ModelTable(ROWS)
