"""Small messages between the driver and its ranks: `stop`, `failed.json`, `finished.json`, `progress.json`.

Through a folder that all of them see, or, where they share none, through an actor on the driver's node.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol


class Exchange(Protocol):
    """Named texts; the last one written counts. Travels to the ranks."""

    def put(self, name: str, text: str) -> None:
        """Write, whole or not at all."""

    def get(self, name: str) -> str | None:
        """Read; None when nobody has written."""


class FolderExchange:
    """Files of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def put(self, name: str, text: str) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}.partial"
        temporary.write_text(text)
        os.replace(temporary, self.folder / name)

    def get(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            return None


class ActorExchange:
    """An actor that lives as long as the driver, on its node: losing another node loses no message."""

    def __init__(self) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.box: Any = ray.remote(_Box).options(num_cpus=0, scheduling_strategy=here).remote()

    def put(self, name: str, text: str) -> None:
        import ray

        ray.get(self.box.put.remote(name, text))

    def get(self, name: str) -> str | None:
        import ray

        return ray.get(self.box.get.remote(name))


class _Box:
    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def put(self, name: str, text: str) -> None:
        self.texts[name] = text

    def get(self, name: str) -> str | None:
        return self.texts.get(name)
